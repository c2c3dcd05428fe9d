"""Copies of targets: independent ones to refit, and programs to save."""

from __future__ import annotations

import copy
import warnings
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.children import AttributeEngine, ModuleEngine
from refitkit.builtin.torch_tensorrt.engine_info import info_of, is_engine
from refitkit.builtin.torch_tensorrt.targets import Target, understand_module
from refitkit.errors import EngineError, UnsupportedTargetError, raised_as

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def duplicate(target: Target) -> Target:
    """A second target with the present weights that shares nothing that a refit changes.

    A deepcopy alone does not do: ``TorchTensorRTModule.__deepcopy__`` of 2.14 hands the very engine
    object to the copy, so refitting the copy would change the original.

    Raises:
        EngineError: torch_tensorrt cannot set up an engine a second time.
    """
    with raised_as(EngineError, "The compiled module cannot be copied"):
        module = copy.deepcopy(target.module)
    second = understand_module(module, target.program)
    for name, engine in second.engines.items():
        first = target.engines[name]
        if isinstance(engine, ModuleEngine) and isinstance(first, ModuleEngine):
            engine.part_from(first)
    return second


def as_program(target: Target) -> ExportedProgram:
    """The target with its present weights as a program that ``torch.export.save`` can write.

    Raises:
        UnsupportedTargetError: Torch-TensorRT cannot export such a module.
    """
    for engine in target.engines.values():
        engine.engine_bytes()
    if target.program is not None:
        program = _bound(target.program, target.module)
    else:
        program = _exported(target)
    _pack(program)
    return program


def _exported(target: Target) -> ExportedProgram:
    unfit = [name for name, one in target.engines.items() if not isinstance(one, ModuleEngine)]
    if unfit:
        kinds = {type(target.engines[name]) for name in unfit}
        raise UnsupportedTargetError(
            f"Torch-TensorRT cannot export the engines {', '.join(unfit)} again.",
            hint="Open the ExportedProgram that the module comes from."
            if AttributeEngine in kinds
            else "Compile with use_python_runtime=False to save the module.",
        )
    for engine in target.engines.values():
        engine.set_up()
    upstream.torch_tensorrt()
    from torch_tensorrt.dynamo._exporter import export  # noqa: PLC0415 - heavy

    with warnings.catch_warnings():
        # fx warns of the attributes that upstream's exporter (2.14) sets for its engines
        warnings.simplefilter("ignore", UserWarning)
        with raised_as(UnsupportedTargetError, "torch_tensorrt cannot export the module"):
            program = export(target.module, use_legacy_exporter=True)
    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError("torch_tensorrt exports the module as something else.")
    return program


def _bound(program: ExportedProgram, module: torch.nn.Module) -> ExportedProgram:
    """A program that shares its graph with another, and tensors and engines with a module."""
    bound = copy.copy(program)
    bound._state_dict = _present(module, program.state_dict)  # noqa: SLF001 - as its __init__ does
    bound._constants = _present(module, program.constants)  # noqa: SLF001
    return bound


def _present(module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the module has under these names now; the old value where it has nothing."""
    present = {}
    for name, value in values.items():
        try:
            present[name] = attrgetter(name)(module)
        except AttributeError:
            present[name] = value
    return present


def _pack(program: ExportedProgram) -> None:
    """Put upstream's packed form in the place of engines, as ``torch_tensorrt.save`` of 2.13 does.

    Older ones have none, and torch writes their C++ engines as they are.
    """
    from torch_tensorrt.dynamo import runtime  # noqa: PLC0415 - heavy

    packed = getattr(getattr(runtime, "_TRTEngine", None), "EngineSerializer", None)
    if packed is None:
        return
    for name, constant in list(program.constants.items()):
        if is_engine(constant):
            program.constants[name] = packed(info_of(constant, name).packed())
