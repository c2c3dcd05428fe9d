"""A program as Torch-TensorRT lowers it before it cuts it into parts.

The steps and their order are those of ``torch_tensorrt/dynamo/_compiler.py`` and ``_refit.py``
(2.11 to 2.14). They change the program that they are given, so it has to be one of our own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import CompileError, Problem, raised_as
from refitkit.program import facts_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule


def lower(program: ExportedProgram, settings: Any) -> GraphModule:
    """Lower a program.

    Args:
        program: The program; it is changed, and its tensors are shared with the result.
        settings: A ``torch_tensorrt.dynamo.CompilationSettings``.

    Raises:
        CompileError: Torch-TensorRT cannot lower it, or the program changes buffers.
    """
    from torch_tensorrt.dynamo import lowering  # noqa: PLC0415 - imported by whoever calls this

    _check_pure(program)
    with torch.no_grad(), raised_as(CompileError, "Torch-TensorRT cannot lower the program"):
        program = lowering.pre_export_lowering(program, settings)
        program = program.run_decompositions(_decompositions(settings))
        lowered: GraphModule = lowering.post_lowering(program.module(), settings)
    return lowered


def _check_pure(program: ExportedProgram) -> None:
    """Refuse programs that change buffers: upstream turns those into inputs of the engines.

    ``_compiler.py`` of 2.14 lifts them (``lift_mutated_buffers``), its ``_refit.py`` does not.
    """
    changed = [leaf.fqn for leaf in facts_of(program).leaves if leaf.mutated]
    if changed:
        raise CompileError(
            "The program changes buffers while it runs, which Torch-TensorRT cannot refit.",
            problems=[Problem(name, "changed in place") for name in changed],
            hint="Put the model into eval mode before the export, or compile with 'aotinductor'.",
        )


def _decompositions(settings: Any) -> Any:
    """The table for these settings; its arguments differ from version to version."""
    from torch_tensorrt.dynamo.lowering import get_decompositions  # noqa: PLC0415

    wanted = {
        "enable_experimental_decompositions": settings.enable_experimental_decompositions,
        "decompose_attention": getattr(settings, "decompose_attention", False),
        "use_distributed_mode_trace": getattr(settings, "use_distributed_mode_trace", False),
        "use_fp32_acc": getattr(settings, "use_fp32_acc", False),
    }
    known = inspect.signature(get_decompositions).parameters
    return get_decompositions(**{name: value for name, value in wanted.items() if name in known})
