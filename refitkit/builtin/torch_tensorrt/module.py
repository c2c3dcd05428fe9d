"""Opened targets of the backend ``torch_tensorrt``: open, call, save, copy.

A target is a compiled module, a program with engines in it, or a file of ``torch_tensorrt.save``.

Reading order: ``open_target`` opens one. ``EngineFactory`` creates the units of a refit for its
engines and torch parts. ``TorchTensorRTOpened`` is the opened target. ``copy_target`` and
``export_target`` copy a target, to refit the copy or to save it. ``describe_file`` and
``read_attachments`` read a saved file without loading its engines.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.export import ExportedProgram

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.children import (
    AttributeEngine,
    ModuleEngine,
    info_of,
    is_engine,
)
from refitkit.builtin.torch_tensorrt.engine import EngineOptions, create_engine
from refitkit.builtin.torch_tensorrt.names import NAME
from refitkit.builtin.torch_tensorrt.order import CallOrder
from refitkit.builtin.torch_tensorrt.parts import check_structures
from refitkit.builtin.torch_tensorrt.program_file import ProgramFile, extra_files, read_program_file
from refitkit.builtin.torch_tensorrt.recording import interpret
from refitkit.builtin.torch_tensorrt.targets import Target, inspect_module, inspect_target
from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from refitkit.errors import EngineError, InputMismatchError, UnsupportedTargetError, raised_as
from refitkit.files.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.builtin.torch_tensorrt.children import EngineHandle
    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.builtin.torch_tensorrt.recording import Interpreted
    from refitkit.model import Slot
    from refitkit.protocols import Engine, Tools


T = TypeVar("T")

# -- opening ------------------------------------------------------------------------------------


def open_target(target: object, factory: EngineFactory | None = None) -> TorchTensorRTOpened | None:
    """Open a target without changing it.

    Opening a file loads it with torch, which can run code from the file. The checks of
    :mod:`~refitkit.builtin.torch_tensorrt.program_file` do not rule that out.

    Args:
        target: A compiled module, a program with engines in it, a file, or anything else.
        factory: Creates the units of a refit; by default :func:`default_engine_factory`.

    Returns:
        The opened target; None if it does not belong to this backend.

    Raises:
        UnsupportedTargetError: The target is damaged, hostile, or needs a GPU.
        NotRefittableError: The target cannot take other weights; names the flag to set.
        ToolchainError: The target is a file, and torch_tensorrt is not installed.
    """
    if factory is None:
        factory = default_engine_factory()
    if isinstance(target, Path):
        return _open_file(target, factory) if target.is_file() else None
    # no object can hold an engine before torch_tensorrt is imported, and importing it is slow
    if not upstream.is_imported():
        return None
    understood = inspect_target(target)
    return None if understood is None else TorchTensorRTOpened(understood, factory)


def _open_file(path: Path, factory: EngineFactory) -> TorchTensorRTOpened | None:
    attachments = read_program_file(path, _checked_attachments)
    if attachments is None:
        return None
    if not upstream.has_gpu():
        raise UnsupportedTargetError(
            f"{str(path)!r} contains TensorRT engines, which need a machine with an NVIDIA GPU.",
            hint="Without a GPU, plan and build with backend='tensorrt_network'.",
        )
    understood = inspect_target(_load_program(path))
    if understood is None:
        raise UnsupportedTargetError(f"{str(path)!r} contains no engine that can run.")
    return TorchTensorRTOpened(understood, factory, attachments)


def _checked_attachments(file: ProgramFile) -> Mapping[str, bytes]:
    file.check()
    return file.attachments()


def _load_program(path: Path) -> Any:
    upstream.torch_tensorrt()  # registers its operators and engine classes
    refused = raised_as(UnsupportedTargetError, f"torch cannot load {str(path)!r}")
    with refused, path.open("rb") as file:
        return torch.export.load(file)


@dataclass(frozen=True)
class EngineFactory:
    """Functions that create the units of a refit.

    Attributes:
        engine: Creates the unit of a TensorRT engine.
        torch_part: Creates the unit of a part that torch executes, from its name and its module.
    """

    engine: Callable[[EngineHandle], Engine]
    torch_part: Callable[[str, torch.fx.GraphModule], Engine]


def default_engine_factory(
    known: Mapping[str, Mapping[str, Slot]] | None = None,
    *,
    tools: Tools | None = None,
) -> EngineFactory:
    """Create engines with a persistent refitter, and torch parts that are written in place.

    Args:
        known: Slots from a plan, by engine and name. They are needed if this TensorRT does not
            report dtypes and counts.
        tools: Settings of the pipeline; None: those of a pipeline without settings.
    """
    known = known or {}
    check_finite = tools is None or tools.check_finite
    direct, cache = tools is None or tools.direct, None if tools is None else tools.cache

    def engine(handle: EngineHandle) -> Engine:
        device = torch.device("cuda", handle.settings.device.gpu_id)
        options = EngineOptions(
            device=device,
            known=known.get(handle.name, {}),
            check_finite=check_finite,
            direct=direct,
            cache=cache,
        )
        return create_engine(handle, upstream.tensorrt(), options)

    return EngineFactory(engine=engine, torch_part=TorchPartEngine)


# -- the opened target --------------------------------------------------------------------------


@dataclass
class TorchTensorRTOpened:
    """An opened target; see :class:`refitkit.protocols.OpenedModule`.

    Engines that were stripped of their weights (``target.stripped``) compute with zeros until the
    first full refit. Upstream's own modules do the same, so calls are not refused.

    Attributes:
        target: The module, its engines and its torch parts.
        factory: Creates the units of a refit.
        attachments: Files that were saved beside the engines, by name.
        structures: Ops, inputs and outputs of all parts, once a plan was made for the target.
            Engines do not report their ops.
    """

    target: Target
    factory: EngineFactory
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    structures: tuple[Structure, ...] = ()

    def __post_init__(self) -> None:
        self._cached: tuple[weakref.ref[ExportedProgram], Interpreted] | None = None
        engines = {name: self.factory.engine(one) for name, one in self.target.engines.items()}
        parts = {
            name: self.factory.torch_part(name, part)
            for name, part in self.target.torch_parts.items()
        }
        self._engines = {**engines, **parts}
        self._order = CallOrder(self._devices())

    def _devices(self) -> Iterator[torch.device]:
        for engine in self._engines.values():
            found = getattr(engine, "device", None)
            if isinstance(found, torch.device):
                yield found
        yield from (tensor.device for tensor in self.target.module.buffers())
        yield from (tensor.device for tensor in self.target.module.parameters())

    @property
    def backend(self) -> str:
        """``torch_tensorrt``."""
        return NAME

    @property
    def engines(self) -> Mapping[str, Engine]:
        """TensorRT engines and parts that torch executes, by name of the child module."""
        return self._engines

    @property
    def module(self) -> torch.nn.Module:
        """The module that calls run: the user's own, or that of a program."""
        return self.target.module

    @property
    def precision(self) -> Mapping[str, str]:
        """Float16 for float32 outputs: TensorRT uses TF32 unless ``disable_tf32`` is set."""
        return {} if self.target.settings.disable_tf32 else {"float32": "float16"}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the target without gradients. Inputs are not moved to another device.

        Raises:
            InputMismatchError: The inputs do not fit the signature of the model.
            EngineError: The call failed.
        """
        module = self.target.module
        try:
            inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as exc:
            raise InputMismatchError(f"The inputs do not fit the model: {exc}") from exc
        for engine in self.target.engines.values():
            engine.set_up()
        with torch.no_grad(), raised_as(EngineError, "The compiled module failed"):
            return self._order.call(lambda: module(*args, **kwargs))

    def ordered(self, do: Callable[[], T]) -> T:
        """Run a function as a call; see :class:`refitkit.protocols.OrdersCalls`."""
        return self._order.call(do)

    def order(self) -> None:
        """Let calls so far end first; see :class:`refitkit.protocols.OrdersCalls`."""
        self._order.order()

    def committed(self) -> None:
        """Let later calls begin later; see :class:`refitkit.protocols.OrdersCalls`."""
        self._order.committed()

    def settle(self) -> None:
        """Wait for the last commit; see :class:`refitkit.protocols.OrdersCalls`."""
        self._order.settle()

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the target, then restore all its buffers."""
        buffers = list(self.target.module.buffers())
        saved = [buffer.detach().clone() for buffer in buffers]
        # buffers that were created under inference mode can be written only under it
        with torch.inference_mode(any(buffer.is_inference() for buffer in buffers)):
            try:
                return self.run(args, kwargs)
            finally:
                with torch.no_grad():
                    for buffer, value in zip(buffers, saved, strict=True):
                        buffer.copy_(value)

    def synchronize(self) -> None:
        """Wait for pending work on all devices."""
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write a file that ``torch_tensorrt.load`` can load, too.

        Raises:
            UnsupportedTargetError: Torch-TensorRT cannot export the module.
        """
        program = export_target(self.target)
        with replacing(path) as file:
            torch.export.save(program, file, extra_files=extra_files(attachments))

    def rebuilt(
        self, program: ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots that the interpreter computes for a program, by engine and slot.

        Each value is one-dimensional.

        Raises:
            PlanMismatchError: The program is partitioned into other engines.
        """
        return self.interpreted(program, tools).values()

    def interpreted(
        self, program: ExportedProgram, tools: Tools, *, record: bool = False
    ) -> Interpreted:
        """Partition and interpret a program with the settings of this module.

        The structures of the first program are kept, and later programs must have the same.

        Args:
            program: The program.
            tools: Tools of the pipeline.
            record: Whether to record how weights follow from those of the program.

        Raises:
            PlanMismatchError: The program is partitioned into other engines than the target, or
                than the first program.
        """
        found = self._take_cached(program) if record else None
        if found is None:
            found = interpret(program, self.target, tools, record=record)
        if self.structures:
            check_structures(found.structures, self.structures)
        self.structures = found.structures
        return found

    def cache_interpreted(self, program: ExportedProgram, found: Interpreted) -> None:
        """Keep the recorded interpretation of a program for the next plan that is made of it."""
        # weak: the cache must not keep the program alive
        self._cached = weakref.ref(program), found

    def _take_cached(self, program: ExportedProgram) -> Interpreted | None:
        # forgotten once taken, because it holds all weights
        cached, self._cached = self._cached, None
        return cached[1] if cached is not None and cached[0]() is program else None

    def reopen(self) -> TorchTensorRTOpened:
        """An independent second module with the same present weights.

        Raises:
            EngineError: The target cannot be copied.
        """
        second = copy_target(self.target)
        return TorchTensorRTOpened(second, self.factory, self.attachments, self.structures)


# -- copies of a target -------------------------------------------------------------------------


def copy_target(target: Target) -> Target:
    """Copy a target with its present weights. A refit of the copy does not change the original.

    Raises:
        EngineError: torch_tensorrt cannot set up an engine a second time.
    """
    with raised_as(EngineError, "The compiled module cannot be copied"):
        module = copy.deepcopy(target.module)
    second = inspect_module(module, target.program)
    for name, engine in second.engines.items():
        first = target.engines[name]
        # A deepcopy is not enough: `TorchTensorRTModule.__deepcopy__` of 2.14 gives the copy the
        # same engine object, so refitting the copy would change the original.
        if isinstance(engine, ModuleEngine) and isinstance(first, ModuleEngine):
            engine.part_from(first)
    return second


def export_target(target: Target) -> ExportedProgram:
    """The target with its present weights, as a program that ``torch.export.save`` can write.

    Raises:
        UnsupportedTargetError: Torch-TensorRT cannot export the module.
    """
    for engine in target.engines.values():
        engine.engine_bytes()  # brings stale bytes up to date
    if target.program is not None:
        program = _bind_program(target.program, target.module)
    else:
        program = _export_module(target)
    _pack_engines(program)
    return program


def _export_module(target: Target) -> ExportedProgram:
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
        engine.set_up()  # upstream may have put that off
    upstream.torch_tensorrt()
    from torch_tensorrt.dynamo._exporter import export  # noqa: PLC0415 - heavy

    with warnings.catch_warnings():
        # fx warns about the attributes that upstream's exporter (2.14) sets for its engines
        warnings.simplefilter("ignore", UserWarning)
        with raised_as(UnsupportedTargetError, "torch_tensorrt cannot export the module"):
            program = export(target.module, use_legacy_exporter=True)
    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError(
            f"torch_tensorrt exports the module as {type(program).__name__}, not as a program."
        )
    return program


def _bind_program(program: ExportedProgram, module: torch.nn.Module) -> ExportedProgram:
    """A program with the graph of another, and with the tensors and engines of a module."""
    bound = copy.copy(program)
    bound._state_dict = _current_values(module, program.state_dict)  # noqa: SLF001 - no setter
    bound._constants = _current_values(module, program.constants)  # noqa: SLF001
    return bound


def _current_values(module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """The module's present values of these names; the given value if the module has none."""
    current = {}
    for name, value in values.items():
        try:
            current[name] = attrgetter(name)(module)
        except AttributeError:
            current[name] = value
    return current


def _pack_engines(program: ExportedProgram) -> None:
    """Replace engines by upstream's packed form, as ``torch_tensorrt.save`` of 2.13 does.

    Older versions have no packed form, and torch writes their C++ engines directly.
    """
    from torch_tensorrt.dynamo import runtime  # noqa: PLC0415 - heavy

    packed = getattr(getattr(runtime, "_TRTEngine", None), "EngineSerializer", None)
    if packed is None:
        return
    for name, constant in list(program.constants.items()):
        if is_engine(constant):
            program.constants[name] = packed(info_of(constant, name).packed())


# -- saved files --------------------------------------------------------------------------------


def describe_file(path: Path) -> Mapping[str, Any] | None:
    """Describe the engines of a saved file as plain data, without running any of its code.

    Returns:
        Format, engines and names of attachments; None if the file has another format.

    Raises:
        UnsupportedTargetError: The file is damaged or hostile.
    """
    return read_program_file(path, _description)


def _description(file: ProgramFile) -> Mapping[str, Any]:
    engines = file.engines()
    return {
        "format": "program with TensorRT engines",
        "engines": {
            name: {
                "bytes": len(info.engine_bytes),
                "inputs": list(info.input_names),
                "outputs": list(info.output_names),
                "settings": {key: str(one) for key, one in metadata.settings.items()},
            }
            for name, (info, metadata) in engines.items()
        },
        "attachments": sorted(file.attachments()),
    }


def read_attachments(path: Path) -> Mapping[str, bytes]:
    """Read the attachments of a saved file, by name, without running any of its code.

    Returns:
        The attachments; empty if the file has another format.

    Raises:
        UnsupportedTargetError: The file is damaged.
    """
    return read_program_file(path, ProgramFile.attachments) or {}
