"""The backend ``torch_tensorrt``: engines of Torch-TensorRT, compiled and refitted on a GPU."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import module as opening
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
from refitkit.builtin.torch_tensorrt.module import TorchTensorRTOpened, default_makers
from refitkit.builtin.torch_tensorrt.names import NAME
from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram, plan_program
from refitkit.builtin.torch_tensorrt.recording import draft_of, interpret, own_copy, slots_of
from refitkit.builtin.torch_tensorrt.settings import (
    key_of_options,
    key_of_settings,
    settings_text,
    unknown_options,
)
from refitkit.builtin.torch_tensorrt.targets import inspect_target
from refitkit.errors import (
    CompileError,
    ConfigError,
    NotRefittableError,
    Problem,
    ToolchainError,
    raised_as,
)
from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.recording import Interpreted
    from refitkit.protocols import OpenedModule, PlanDraft, PlanKey, Tools

_UNFIT = {
    "immutable_weights": "immutable_weights=False",
    "refit_identical_engine_weights": "refit_identical_engine_weights=False",
}
"""Options that make engines unfit for refits where they are true, and what to set instead."""
_OF_THE_ENGINE = frozenset(
    {
        *_UNFIT,
        "strip_engine_weights",
        "use_python_runtime",
        "device",
        "cache_built_engines",
        "reuse_cached_engines",
        "engine_cache_dir",
        "engine_cache_size",
        "custom_engine_cache",
        "inputs",
        "arg_inputs",
        "kwarg_inputs",
    }
)
"""Options that say how an engine is built and held, which planning does not."""


class TorchTensorRTBackend:
    """``torch_tensorrt``: TensorRT and TensorRT-RTX through Torch-TensorRT."""

    @property
    def name(self) -> str:
        """Its name."""
        return NAME

    def compile(
        self, program: ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> TorchTensorRTOpened:
        """Compile a program; ``options`` are those of ``torch_tensorrt.dynamo.compile``."""
        if upstream.is_installed() and not upstream.has_gpu():
            raise ToolchainError(
                "Torch-TensorRT compiles for the GPU that it runs on, and there is none here.",
                hint="backend='tensorrt_network' builds engines of TensorRT-RTX without one.",
            )
        package = upstream.torch_tensorrt()
        _check_options(package, options)
        module = _compiled(package, program, options)
        target = inspect_target(module)
        if target is None:
            raise CompileError(
                "Torch-TensorRT made no engine of the program: it supports too few of its ops.",
                hint="Lower min_block_size, or compile with 'aotinductor'.",
            )
        found = interpret(program, target, tools, record=True)
        makers = default_makers(found.slots, check_finite=tools.check_finite)
        opened = TorchTensorRTOpened(target, makers, structures=found.structures)
        opened.remember(program, found)
        if not target.stripped:
            _adopt(opened, found)
        return opened

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Every slot, with the recipe that was recorded for it."""
        found: Interpreted | PlannedProgram = next(iter(parts.values()))
        if isinstance(found, PlannedProgram):
            return draft_of(found, found.all_slots, "cpu")
        return draft_of(found, slots_of(module) if module else (), "cuda")

    def plan_key(
        self,
        program: ExportedProgram,  # noqa: ARG002 - the protocol's
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """The options when planning offline, the settings of the engines otherwise."""
        if isinstance(module, TorchTensorRTOpened):
            return key_of_settings(settings_text(module.target.settings))
        return key_of_options(_of_planning(options))

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """What a saved file holds, without loading its engines."""
        return opening.describe_file(path) if path.is_file() else None

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved file keeps beside its engines, without loading them."""
        return opening.attachments_of(path) if path.is_file() else {}


def partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Interpreted | PlannedProgram]:
    """The parts of a program, as what holds all of them, by name.

    Without a module they are made in a process that needs no GPU.

    Raises:
        PlanMismatchError: They are not the parts of the module.
    """
    if isinstance(module, TorchTensorRTOpened):
        found = module.interpreted(program, tools, record=True)
        return dict.fromkeys(module.engines, found)
    planned = plan_program(program, _of_planning(options), tools, record=True)
    return {structure.name: planned for structure in planned.structures}


def _of_planning(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options on which parts and slots depend: the others are for the machine with the GPU."""
    return {name: value for name, value in options.items() if name not in _OF_THE_ENGINE}


def _check_options(package: Any, options: Mapping[str, Any]) -> None:
    unfit = [
        Problem(name, "unfit for refits", "True", hint=f"set {wanted}")
        for name, wanted in _UNFIT.items()
        if options.get(name)
    ]
    if unfit:
        raise NotRefittableError("Such an engine could not be refitted.", problems=unfit)
    known = set(inspect.signature(package.dynamo.compile).parameters) - {"kwargs"}
    problems = list(unknown_options(options, known))
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)


def _compiled(
    package: Any, program: ExportedProgram, options: Mapping[str, Any]
) -> torch.nn.Module:
    if program.example_inputs is None and not {"inputs", "arg_inputs"} & options.keys():
        raise CompileError(
            "The program has no example inputs, which Torch-TensorRT needs.",
            hint="Export it again: torch.export.export(model, inputs).",
        )
    chosen = {"immutable_weights": False, **options}
    if not {"inputs", "arg_inputs"} & options.keys():
        args, kwargs = program.example_inputs or ((), {})
        chosen |= {"arg_inputs": tuple(args), "kwarg_inputs": dict(kwargs or {})}
    with raised_as(CompileError, "Torch-TensorRT cannot compile the program"):
        module: torch.nn.Module = package.dynamo.compile(own_copy(program), **chosen)
    return module


def _adopt(opened: TorchTensorRTOpened, found: Interpreted) -> None:
    """Tell engines what they were built with: the way back from the first refit."""
    made = found.values()
    for name, engine in opened.engines.items():
        values = made.get(name, {})
        if isinstance(engine, RefitterEngine) and engine.slots.keys() <= values.keys():
            engine.adopt(
                [
                    SlotValue(slot, "compile", (), _Held(values[slot.name], slot.shape))
                    for slot in engine.slots.values()
                ]
            )


class _Held:
    """Gives a tensor in the shape of its slot."""

    def __init__(self, value: torch.Tensor, shape: tuple[int, ...] | None) -> None:
        self._value, self._shape = value, shape

    def __call__(self) -> torch.Tensor:
        return self._value if self._shape is None else self._value.reshape(self._shape)
