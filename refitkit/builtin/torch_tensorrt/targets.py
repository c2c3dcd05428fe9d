"""Finds the engines and the torch parts of a target, by type and by structure.

``inspect_target`` is the entry: it decides whether a target is one of this backend's and returns
a :class:`Target`. It never changes the target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from refitkit.builtin.torch_tensorrt.children import (
    AttributeEngine,
    EngineLocation,
    ModuleEngine,
    PythonModuleEngine,
    is_engine,
    is_packed_engine,
    is_runtime_instance,
)
from refitkit.builtin.torch_tensorrt.settings import check_refittable, is_stripped, shared_settings
from refitkit.errors import Problem, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

Handle = ModuleEngine | PythonModuleEngine | AttributeEngine

REST = "_rest"
"""Name of the torch part with the tensors that belong to the target itself and to no child."""

_SUFFIX = "_engine"
_WRAPPERS = {
    "MutableTorchTensorRTModule": "gm",
    "CudaGraphsTorchTensorRTModule": "compiled_module",
}


@dataclass(frozen=True)
class Target:
    """A target's engines and torch parts.

    Attributes:
        module: The module that the user calls.
        engines: All engines by name.
        torch_parts: Parts that torch executes, by name of the child. ``REST`` has the tensors of
            the target itself; if the program is inlined, these are all tensors.
        settings: The ``CompilationSettings`` that all engines share.
        inlined: Whether the parts that torch executes are inlined into ``module``.
        stripped: Whether the engines contain zeros until the first full refit.
        program: The program that ``module`` was created from; None if the target is a module.
    """

    module: torch.nn.Module
    engines: Mapping[str, Handle]
    torch_parts: Mapping[str, torch.fx.GraphModule]
    settings: Any
    inlined: bool = False
    stripped: bool = False
    program: ExportedProgram | None = field(default=None, repr=False)


def inspect_target(target: object) -> Target | None:
    """Find the engines and torch parts of a target; None if it has no Torch-TensorRT engine.

    Args:
        target: Any object. A program is unlifted; its engines and tensors stay the same objects.

    Raises:
        UnsupportedTargetError: The engines cannot be used as they are, or were compiled with
            different settings.
        NotRefittableError: The engines cannot take other weights.
    """
    # first: a wrapper is a module with engines below it, and would be opened as one
    _check_not_wrapper(target)
    if isinstance(target, ExportedProgram):
        return _inspect_program(target)
    if isinstance(target, torch.nn.Module):
        return _target_of(target, _find_engines(target, {}), None)
    return None


def _inspect_program(program: ExportedProgram) -> Target | None:
    packed = sorted(name for name, one in program.constants.items() if is_packed_engine(one))
    if packed:
        raise UnsupportedTargetError(
            "torch_tensorrt.save packed the engines of this program, so they cannot run.",
            problems=[Problem(name, "packed") for name in packed],
            hint="Load the saved file and open the result.",
        )
    if not any(is_engine(one) for one in program.constants.values()):
        return None
    # the unlifted module has the same tensors and engines, so a refit of it changes the program too
    module = program.module()
    return _target_of(module, _find_engines(module, program.constants), program)


def inspect_module(module: torch.nn.Module, program: ExportedProgram | None) -> Target:
    """Like ``inspect_target``, for a module that is known to contain engines.

    Args:
        module: The module that the user calls.
        program: The program whose engines and tensors the module shares; None if there is none.

    Raises:
        UnsupportedTargetError: The module contains no engine.
    """
    constants = {} if program is None else program.constants
    target = _target_of(module, _find_engines(module, constants), program)
    if target is None:
        raise UnsupportedTargetError("The module contains no engine of Torch-TensorRT.")
    return target


def _target_of(
    module: torch.nn.Module, engines: dict[str, Handle], program: ExportedProgram | None
) -> Target | None:
    if not engines:
        return None
    settings = shared_settings({name: engine.settings for name, engine in engines.items()})
    for name in engines:  # the settings are the same, but the error names the engine
        check_refittable(settings, name)
    return Target(
        module=module,
        engines=engines,
        torch_parts=_torch_parts(module, engines),
        settings=settings,
        inlined=_is_inlined(module, engines),
        stripped=is_stripped(settings),
        program=program,
    )


def _check_not_wrapper(target: object) -> None:
    for name, attribute in _WRAPPERS.items():
        if is_runtime_instance(target, name):
            raise UnsupportedTargetError(
                f"A {name} has state of its own besides its engines.",
                hint=f"Open the compiled module inside it: its attribute {attribute!r}.",
            )
    if _is_child(target):
        raise UnsupportedTargetError(
            "The target is one engine, not a compiled model.",
            hint="Open the module that contains the engine.",
        )


def _is_child(value: object) -> bool:
    return is_runtime_instance(value, "TorchTensorRTModule") or is_runtime_instance(
        value, "PythonTorchTensorRTModule"
    )


def _find_engines(root: torch.nn.Module, constants: MutableMapping[str, Any]) -> dict[str, Handle]:
    """Handles of all engines by name, in the order of the module tree."""
    engines: dict[str, Handle] = {}
    nested = []
    # nested engines are collected first, so that the error lists all of them
    for path, module in root.named_modules():
        handles = _handles_in(path, module, constants)
        nested += [handle.name for handle in handles if "." in handle.name]
        for handle in handles:
            if handle.name in engines:
                raise UnsupportedTargetError(f"Two engines have the name {handle.name!r}.")
            engines[handle.name] = handle
    if nested:
        raise UnsupportedTargetError(
            "The module has nested engines; torch_tensorrt.compile puts engines at the top level.",
            problems=[Problem(name, "nested") for name in nested],
            hint="Open the compiled module itself, not a module that contains it.",
        )
    return engines


def _handles_in(
    path: str, module: torch.nn.Module, constants: MutableMapping[str, Any]
) -> list[Handle]:
    if is_runtime_instance(module, "TorchTensorRTModule"):
        return [ModuleEngine(path, _checked_child(path, module))]
    if is_runtime_instance(module, "PythonTorchTensorRTModule"):
        return [PythonModuleEngine(path, _checked_child(path, module))]
    attributes = {key: one for key, one in vars(module).items() if is_engine(one)}
    return [
        AttributeEngine(
            _engine_name(path, key),
            [EngineLocation(vars(module), key), *_locations_in(engine, constants)],
        )
        for key, engine in attributes.items()
    ]


def _checked_child(name: str, child: torch.nn.Module) -> Any:
    if not getattr(child, "serialized_engine", None):
        raise UnsupportedTargetError(
            f"The child {name!r} contains no engine.",
            hint="If it was created from a state_dict, load the whole module instead.",
        )
    return child


def _engine_name(path: str, attribute: str) -> str:
    """The engine's name, without upstream's suffix.

    An attribute ``_run_on_acc_0_engine`` of the target, and the attribute ``engine`` of a child
    ``_run_on_acc_0``, are both ``_run_on_acc_0``.
    """
    if path and attribute == "engine":
        return path
    name = attribute.removesuffix(_SUFFIX)
    return f"{path}.{name}" if path else name


def _locations_in(engine: Any, constants: MutableMapping[str, Any]) -> list[EngineLocation]:
    return [EngineLocation(constants, key) for key, one in constants.items() if one is engine]


def _torch_parts(
    root: torch.nn.Module, engines: Mapping[str, Handle]
) -> dict[str, torch.fx.GraphModule]:
    # inlined parts are no longer children, so all tensors together are one part
    if _is_inlined(root, engines):
        names = _tensor_names(root)
        return {REST: _tensor_module(root, names)} if names else {}
    parts = {
        name: _as_graph_module(child)
        for name, child in root.named_children()
        if name not in engines and _is_torch_part(child)
    }
    own = [name for name in _tensor_names(root) if "." not in name]
    return {**parts, REST: _tensor_module(root, own)} if own else parts


def _is_inlined(root: torch.nn.Module, engines: Mapping[str, Handle]) -> bool:
    # upstream's exporter turns engine children into attributes when it inlines
    return not engines.keys() & dict(root.named_children()).keys()


def _is_torch_part(child: torch.nn.Module) -> bool:
    """Whether a child runs ops or has tensors. The ``GuardsFn`` of an export does neither."""
    return isinstance(child, torch.fx.GraphModule) or bool(_tensor_names(child))


def _tensor_names(module: torch.nn.Module) -> list[str]:
    # all names of a tied tensor: the graph can use any of them
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [*parameters, *dict(module.named_buffers(remove_duplicate=False))]


def _as_graph_module(child: torch.nn.Module) -> torch.fx.GraphModule:
    return (
        child
        if isinstance(child, torch.fx.GraphModule)
        else _tensor_module(child, _tensor_names(child))
    )


def _tensor_module(module: torch.nn.Module, names: Sequence[str]) -> torch.fx.GraphModule:
    """A module that shares the named tensors of another module, and has nothing else."""
    graph = torch.fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in names))
    return torch.fx.GraphModule(module, graph)
