"""The backend ``torch_tensorrt``: compiles with Torch-TensorRT, and plans refits of its engines.

Compiling and refitting need a GPU. Planning does not: without a module, a worker process
partitions and interprets the program (see ``network.planning``).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
from refitkit.builtin.torch_tensorrt.module import (
    TorchTensorRTOpened,
    default_engine_factory,
    describe_file,
    read_attachments,
)
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

_NOT_REFITTABLE = {
    "immutable_weights": "immutable_weights=False",
    "refit_identical_engine_weights": "refit_identical_engine_weights=False",
}
"""Options with which engines cannot be refitted if they are true, and the setting to use."""
_ENGINE_OPTIONS = frozenset(
    {
        *_NOT_REFITTABLE,
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
"""Options on how an engine is built and stored. Parts and slots do not depend on them."""


class TorchTensorRTBackend:
    """The backend of TensorRT and TensorRT-RTX through Torch-TensorRT; see ``Backend``."""

    @property
    def name(self) -> str:
        """``torch_tensorrt``."""
        return NAME

    def compile(
        self, program: ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> TorchTensorRTOpened:
        """Compile a program.

        Args:
            program: The program. It stays unchanged: upstream gets a copy.
            options: Arguments of ``torch_tensorrt.dynamo.compile``.
            tools: Tools of the pipeline.

        Raises:
            ConfigError: An option does not exist, or has a value that cannot be used.
            NotRefittableError: With an option, the engines could not be refitted.
            ToolchainError: torch_tensorrt is not installed, or there is no GPU.
            CompileError: Torch-TensorRT refuses the program, or creates no engine for it.
        """
        # if the package is missing, the import below reports that, with the command to install it
        if upstream.is_installed() and not upstream.has_gpu():
            raise ToolchainError(
                "Torch-TensorRT compiles for the GPU of this machine, and there is none.",
                hint="backend='tensorrt_network' builds engines of TensorRT-RTX without a GPU.",
            )
        package = upstream.torch_tensorrt()
        _check_options(package, options)
        module = _compile_program(package, program, options)
        target = inspect_target(module)
        if target is None:
            raise CompileError(
                "Torch-TensorRT created no engine: it supports too few ops of the program.",
                hint="Lower min_block_size, or compile with 'aotinductor'.",
            )
        found = interpret(program, target, tools, record=True)
        factory = default_engine_factory(found.slots, tools=tools)
        opened = TorchTensorRTOpened(target, factory, structures=found.structures)
        # the pipeline plans next, with the same program: interpreting takes seconds
        opened.cache_interpreted(program, found)
        # stripped engines hold zeros, not the program's values
        if not target.stripped:
            _adopt_values(opened, found)
        return opened

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Every slot with the recipe that was recorded for it."""
        found: Interpreted | PlannedProgram = next(iter(parts.values()))
        # without a module, a worker process planned the program on the CPU
        if isinstance(found, PlannedProgram):
            return draft_of(found, found.all_slots, "cpu")
        return draft_of(found, slots_of(module) if module else (), "cuda")

    def plan_key(
        self,
        program: ExportedProgram,  # noqa: ARG002 - the protocol's
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """The settings of the engines; without a module, the options of planning."""
        if isinstance(module, TorchTensorRTOpened):
            return key_of_settings(settings_text(module.target.settings))
        return key_of_options(_planning_options(options))

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """Engines of a saved file as plain data; None for a folder. See ``describe_file``."""
        return describe_file(path) if path.is_file() else None

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """Attachments of a saved file by name; empty for a folder. See ``read_attachments``."""
        return read_attachments(path) if path.is_file() else {}


def partition_program(
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Interpreted | PlannedProgram]:
    """Partition a program as Torch-TensorRT does.

    Args:
        program: The program.
        module: Opened module that the parts must match. If it is None, a worker process that
            needs no GPU partitions the program.
        options: Arguments of ``torch_tensorrt.dynamo.compile``; unused with a module.
        tools: Tools of the pipeline.

    Returns:
        The interpreted program by name of each part. It is the same object for all parts.

    Raises:
        PlanMismatchError: The program has other parts than the module.
    """
    if isinstance(module, TorchTensorRTOpened):
        found = module.interpreted(program, tools, record=True)
        return dict.fromkeys(module.engines, found)
    planned = plan_program(program, _planning_options(options), tools, record=True)
    return {structure.name: planned for structure in planned.structures}


def _planning_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which parts and slots depend."""
    return {name: value for name, value in options.items() if name not in _ENGINE_OPTIONS}


def _check_options(package: Any, options: Mapping[str, Any]) -> None:
    refused = [
        Problem(name, "not refittable", "True", hint=f"set {setting}")
        for name, setting in _NOT_REFITTABLE.items()
        if options.get(name)
    ]
    if refused:
        raise NotRefittableError(
            "With these options the engines could not be refitted.", problems=refused
        )
    # upstream takes ``**kwargs``, so it would not refuse a misspelt option
    known = set(inspect.signature(package.dynamo.compile).parameters) - {"kwargs"}
    problems = list(unknown_options(options, known))
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)


def _compile_program(
    package: Any, program: ExportedProgram, options: Mapping[str, Any]
) -> torch.nn.Module:
    if program.example_inputs is None and not {"inputs", "arg_inputs"} & options.keys():
        raise CompileError(
            "Torch-TensorRT needs example inputs, and the program has none.",
            hint="Export it again: torch.export.export(model, inputs).",
        )
    # upstream's default, True, builds engines that cannot be refitted
    chosen = {"immutable_weights": False, **options}
    if not {"inputs", "arg_inputs"} & options.keys():
        args, kwargs = program.example_inputs or ((), {})
        chosen |= {"arg_inputs": tuple(args), "kwarg_inputs": dict(kwargs or {})}
    # a copy, because upstream changes the program that it compiles
    with raised_as(CompileError, "Torch-TensorRT cannot compile the program"):
        module: torch.nn.Module = package.dynamo.compile(own_copy(program), **chosen)
    return module


def _adopt_values(opened: TorchTensorRTOpened, found: Interpreted) -> None:
    """Record in each engine the values that it was built from.

    With known weights, the first refit can be rolled back without engine bytes.
    """
    by_engine = found.values()
    for name, engine in opened.engines.items():
        values = by_engine.get(name, {})
        # adopting needs a value for every slot
        if isinstance(engine, RefitterEngine) and engine.slots.keys() <= values.keys():
            engine.adopt(
                [
                    SlotValue(slot, "compile", (), _Reshaped(values[slot.name], slot.shape))
                    for slot in engine.slots.values()
                ]
            )


class _Reshaped:
    """Returns a flat tensor in the shape of its slot, or flat if the shape is unknown."""

    def __init__(self, value: torch.Tensor, shape: tuple[int, ...] | None) -> None:
        self._value, self._shape = value, shape

    def __call__(self) -> torch.Tensor:
        return self._value if self._shape is None else self._value.reshape(self._shape)
