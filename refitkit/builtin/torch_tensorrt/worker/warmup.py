"""What every session would do first, done once in the process that sessions are forked from.

The first program that a process reads, lowers and cuts costs a third of a second more than the
second: modules are imported, tables made, type hints looked up. No network is made and nothing is
built, so no library starts a thread, and what is forked afterwards starts clean.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from refitkit.builtin.torch_tensorrt.lowering import lower
from refitkit.builtin.torch_tensorrt.options import settings_from_options
from refitkit.builtin.torch_tensorrt.parts import cut
from refitkit.program import KeptProgram
from refitkit.program.facts import tensors_of
from refitkit.recipe import Tape, TensorMap

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class _Small(torch.nn.Module):
    """A little of what most models have; too small for any library to want threads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Of one small image."""
        x = torch.relu(self.norm(self.conv(image)))
        result: torch.Tensor = self.linear(x.mean((2, 3)))
        return result


def warm_up() -> None:
    """Read, lower and cut one small program, as a session does, while a tape watches."""
    _no_monitor()
    program = _handed_over(torch.export.export(_Small().eval(), (torch.zeros(1, 1, 4, 4),)))
    settings = settings_from_options({"min_block_size": 1})
    with Tape(tensors_of(program)):
        cut(lower(program, settings), settings, inlined=False)


def _no_monitor() -> None:
    """Have no thread watch progress bars: a fork while it holds their lock would never get it.

    ``torch/fx/interpreter.py`` makes bars, the first of which starts the thread.
    """
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # noqa: PLC0415 - torch_tensorrt brings it, or nothing does

        tqdm.monitor_interval = 0


def _handed_over(program: ExportedProgram) -> ExportedProgram:
    """The same, written and read again."""
    kept = KeptProgram.of(program)
    if kept is None:
        return program
    values = {name: tensor.detach() for name, tensor in tensors_of(program).items()}
    return kept.restore(TensorMap(values), values.__getitem__)
