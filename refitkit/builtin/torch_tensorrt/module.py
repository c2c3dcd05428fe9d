"""An opened target: call it, save it, open it a second time."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.children import (
    AttributeEngine,
    ModuleEngine,
    info_of,
    is_engine,
)
from refitkit.builtin.torch_tensorrt.engine import EngineOptions, engine_for
from refitkit.builtin.torch_tensorrt.names import NAME
from refitkit.builtin.torch_tensorrt.parts import check_structures
from refitkit.builtin.torch_tensorrt.program_file import ProgramFile, extra_files, read_program_file
from refitkit.builtin.torch_tensorrt.recording import interpret
from refitkit.builtin.torch_tensorrt.targets import Target, inspect_module, inspect_target
from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from refitkit.errors import EngineError, InputMismatchError, UnsupportedTargetError, raised_as
from refitkit.files.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.builtin.torch_tensorrt.children import EngineHandle
    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.builtin.torch_tensorrt.recording import Interpreted
    from refitkit.model import Slot
    from refitkit.protocols import Engine, Tools


@dataclass(frozen=True)
class Makers:
    """What makes refittable units.

    Attributes:
        engine: Of a TensorRT engine.
        torch_part: Of a part that torch executes, by its name.
    """

    engine: Callable[[EngineHandle], Engine]
    torch_part: Callable[[str, torch.fx.GraphModule], Engine]


@dataclass
class TorchTensorRTOpened:
    """An opened target; see :class:`refitkit.protocols.OpenedModule`.

    Engines that were stripped of their weights (``target.stripped``) answer with zeros until the
    first full refit. Upstream's own modules do; it is not refused here.

    Attributes:
        target: What was opened.
        makers: What makes its refittable units.
        attachments: What was saved beside the engines.
        structures: What its parts are, apart from their weights, once a plan was made for it: the
            engines themselves do not tell their ops.
    """

    target: Target
    makers: Makers
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    structures: tuple[Structure, ...] = ()

    def __post_init__(self) -> None:
        self._planned: tuple[weakref.ref[ExportedProgram], Interpreted] | None = None
        engines = {name: self.makers.engine(one) for name, one in self.target.engines.items()}
        parts = self.target.torch_parts.items()
        self._engines = {**engines, **{name: self.makers.torch_part(name, p) for name, p in parts}}

    @property
    def backend(self) -> str:
        """``torch_tensorrt``."""
        return NAME

    @property
    def engines(self) -> Mapping[str, Engine]:
        """TensorRT engines and parts that torch executes, by name of the child."""
        return self._engines

    @property
    def module(self) -> torch.nn.Module:
        """What is called: the user's own module, or that of a program."""
        return self.target.module

    @property
    def precision(self) -> Mapping[str, str]:
        """TF32, which TensorRT computes in unless it is told not to, has float16's precision."""
        return {} if self.target.settings.disable_tf32 else {"float32": "float16"}

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the target as it is; inputs are not moved, outputs have no gradient history."""
        module = self.target.module
        try:
            inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as exc:
            raise InputMismatchError(f"The inputs do not fit the model: {exc}") from exc
        for engine in self.target.engines.values():
            engine.set_up()
        with torch.no_grad(), raised_as(EngineError, "The compiled module failed"):
            return module(*args, **kwargs)

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call it, then put back all buffers."""
        buffers = list(self.target.module.buffers())
        kept = [buffer.detach().clone() for buffer in buffers]
        # buffers that were made under inference mode can be written there alone
        with torch.inference_mode(any(buffer.is_inference() for buffer in buffers)):
            try:
                return self.run(args, kwargs)
            finally:
                with torch.no_grad():
                    for buffer, value in zip(buffers, kept, strict=True):
                        buffer.copy_(value)

    def drain(self) -> None:
        """Wait for pending work of all devices."""
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write a file that ``torch_tensorrt.load`` loads, too."""
        program = as_program(self.target)
        with replacing(path) as file:
            torch.export.save(program, file, extra_files=extra_files(attachments))

    def rebuilt(
        self, program: ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots as the interpreter makes them of a program, flat.

        Raises:
            PlanMismatchError: The program makes other engines.
        """
        return self.interpreted(program, tools).values()

    def interpreted(
        self, program: ExportedProgram, tools: Tools, *, record: bool = False
    ) -> Interpreted:
        """A program, cut and interpreted as this module's was; the first one is remembered.

        Args:
            program: The program.
            tools: What the pipeline lends.
            record: Whether to write down how weights follow from those of the program.

        Raises:
            PlanMismatchError: The program makes other engines, or other ones than the first.
        """
        found = self._remembered(program) if record else None
        if found is None:
            found = interpret(program, self.target, tools, record=record)
        if self.structures:
            check_structures(found.structures, self.structures)
        self.structures = found.structures
        return found

    def remember(self, program: ExportedProgram, found: Interpreted) -> None:
        """Note what this very program was interpreted as, for the plan that is made next."""
        self._planned = weakref.ref(program), found

    def _remembered(self, program: ExportedProgram) -> Interpreted | None:
        """That, once: it holds all weights."""
        planned, self._planned = self._planned, None
        return planned[1] if planned is not None and planned[0]() is program else None

    def reopen(self) -> TorchTensorRTOpened:
        """A second, independent one with the same present weights."""
        second = duplicate(self.target)
        return TorchTensorRTOpened(second, self.makers, self.attachments, self.structures)


# MERGED opening: Opening targets: live objects of torch_tensorrt, and files of
# ``torch_tensorrt.save``.


def open_target(target: object, makers: Makers | None = None) -> TorchTensorRTOpened | None:
    """Open a target; None where it is none of this backend's. The target is not changed.

    Opening a file loads it with torch, which runs code of whoever made it, in spite of the checks
    that :mod:`~refitkit.builtin.torch_tensorrt.program_file` makes.

    Args:
        target: A compiled module, a program with engines in it, a file, or anything else.
        makers: What makes refittable units; by default :func:`~.making.default_makers`.

    Raises:
        UnsupportedTargetError: It is damaged, hostile, or needs a GPU.
        NotRefittableError: It cannot take other weights; names the flag to set.
        ToolchainError: It is a file, and torch_tensorrt is not installed.
    """
    if makers is None:
        makers = default_makers()
    if isinstance(target, Path):
        return _open_file(target, makers) if target.is_file() else None
    if not upstream.is_imported():
        return None
    understood = inspect_target(target)
    return None if understood is None else TorchTensorRTOpened(understood, makers)


def _open_file(path: Path, makers: Makers) -> TorchTensorRTOpened | None:
    attachments = read_program_file(path, _checked_attachments)
    if attachments is None:
        return None
    if not upstream.has_gpu():
        raise UnsupportedTargetError(
            f"{str(path)!r} holds TensorRT engines, which can be loaded only on a machine with an "
            "NVIDIA GPU.",
            hint="Without a GPU, plan and build with backend='tensorrt_network'.",
        )
    understood = inspect_target(_loaded(path))
    if understood is None:
        raise UnsupportedTargetError(f"{str(path)!r} holds no engine that can run.")
    return TorchTensorRTOpened(understood, makers, attachments)


def _checked_attachments(file: ProgramFile) -> Mapping[str, bytes]:
    file.check()
    return file.attachments()


def _loaded(path: Path) -> Any:
    upstream.torch_tensorrt()  # registers its operators and engine classes
    refused = raised_as(UnsupportedTargetError, f"torch cannot load {str(path)!r}")
    with refused, path.open("rb") as file:
        return torch.export.load(file)


def describe_file(path: Path) -> Mapping[str, Any] | None:
    """What a saved file holds, as plain data, without running any of it; None: another's file.

    Raises:
        UnsupportedTargetError: It is damaged or hostile.
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


def attachments_of(path: Path) -> Mapping[str, bytes]:
    """What a saved file keeps beside its engines, without running any of it.

    Raises:
        UnsupportedTargetError: It is damaged.
    """
    return read_program_file(path, ProgramFile.attachments) or {}


# MERGED making: Refittable units for the engines and torch parts of an opened target.


def default_makers(
    known: Mapping[str, Mapping[str, Slot]] | None = None, *, check_finite: bool = True
) -> Makers:
    """Engines with a persistent refitter, and torch parts that are written in place.

    Args:
        known: What is known of slots, by engine and name. Needed where TensorRT cannot tell dtypes
            and counts itself.
        check_finite: Whether new values must be finite where the live ones are known to be.
    """
    known = known or {}

    def engine(handle: EngineHandle) -> Engine:
        device = torch.device("cuda", handle.settings.device.gpu_id)
        options = EngineOptions(
            device=device, known=known.get(handle.name, {}), check_finite=check_finite
        )
        return engine_for(handle, upstream.tensorrt(), options)

    return Makers(engine=engine, torch_part=TorchPartEngine)


# MERGED copying: Copies of targets: independent ones to refit, and programs to save.


def duplicate(target: Target) -> Target:
    """A second target with the present weights that shares nothing that a refit changes.

    A deepcopy alone does not do: ``TorchTensorRTModule.__deepcopy__`` of 2.14 hands the very engine
    object to the copy, so refitting the copy would change the original.

    Raises:
        EngineError: torch_tensorrt cannot set up an engine a second time.
    """
    with raised_as(EngineError, "The compiled module cannot be copied"):
        module = copy.deepcopy(target.module)
    second = inspect_module(module, target.program)
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
