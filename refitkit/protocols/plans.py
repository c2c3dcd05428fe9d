"""A plan and a kept program, as plugins' objects see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from refitkit.model import PlanData
    from refitkit.protocols.sources import WeightSource


@runtime_checkable
class Plan(Protocol):
    """A plan as strategies, checks and verifiers see it."""

    @property
    def data(self) -> PlanData:
        """Ledger, leaves, ties and fingerprint."""

    def pinned(self, name: str) -> torch.Tensor:
        """A tensor that the plan keeps. Not to be written to."""


class BindableProgram(Protocol):
    """A program that was kept without its weights."""

    def bind(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> Callable[..., Any]:
        """The program as an eager callable with the source's weights, which calls read.

        Raises:
            SourceError: The source lacks something that the program needs. Calls raise it where
                the source cannot be read.
        """

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> torch.export.ExportedProgram:
        """The program with the source's weights, which it shares with the source.

        Raises:
            SourceError: The source lacks something that the program needs.
            PlanMismatchError: The kept program is damaged.
        """
