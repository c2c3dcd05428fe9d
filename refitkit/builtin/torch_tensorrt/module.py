"""An opened target: call it, save it, open it a second time."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.copying import as_program, duplicate
from refitkit.builtin.torch_tensorrt.in_process import interpret
from refitkit.builtin.torch_tensorrt.matching import check_structures
from refitkit.builtin.torch_tensorrt.names import NAME
from refitkit.builtin.torch_tensorrt.program_file import extra_files
from refitkit.errors import EngineError, InputMismatchError, raised_as
from refitkit.replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.handles import EngineHandle
    from refitkit.builtin.torch_tensorrt.in_process import Interpreted
    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.builtin.torch_tensorrt.targets import Target
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
