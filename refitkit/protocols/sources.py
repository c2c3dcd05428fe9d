"""Where new weights come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from refitkit.model import TensorInfo


@runtime_checkable
class WeightSource(Protocol):
    """Where new weights come from, read lazily by FQN."""

    @property
    def description(self) -> str:
        """What it is, in words, for reports and messages."""

    def names(self) -> Collection[str]:
        """FQNs of everything it has."""

    def info(self, fqn: str) -> TensorInfo:
        """What it has under this name, without reading the data.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be described.
        """

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of this name. Not to be written to, and to be copied before it is kept.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be read.
        """


@runtime_checkable
class HoldsProgram(Protocol):
    """A source whose weights are those of a program, which is at hand."""

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The program. Not to be changed."""
