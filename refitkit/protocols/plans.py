"""Plans and stored programs, as objects of plugins see them. refitkit implements both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from refitkit.model import PlanData
    from refitkit.protocols.sources import WeightSource


@runtime_checkable
class Plan(Protocol, metaclass=Ability):
    """A plan that strategies, checks, transforms and verifiers read. Plugins never change it."""

    @property
    def data(self) -> PlanData:
        """Ledger, leaves, ties, guards and fingerprint."""

    def pinned(self, name: str) -> torch.Tensor:
        """Return a tensor that the plan stores. Do not write to it.

        Args:
            name: Name of the tensor in the plan: a key of ``data.pinned``.

        Raises:
            KeyError: The plan stores no tensor of this name.
        """


class BindableProgram(Protocol, metaclass=Ability):
    """A program that was stored without its weights.

    Both methods read weights from a source. They call ``pinned`` for a leaf that no state_dict
    contains and that the source lacks. It raises KeyError for an unknown name: pass
    ``Plan.pinned``.
    """

    def bind(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> Callable[..., Any]:
        """Return the program as an eager callable that reads the weights of a source.

        Verifiers call this in ``prepare`` to compute reference outputs. Each call of the result
        reads a tensor when the program needs it, so not all weights are in memory at once.

        Args:
            source: Weights by FQN.
            pinned: Returns a tensor that the plan stores, by name.

        Returns:
            A callable with the signature of the model. Its results have no gradient history. It
            raises SourceError if the source cannot be read.

        Raises:
            SourceError: The source lacks a weight that the program needs.
            PlanMismatchError: The stored program is damaged, or another torch wrote it.
        """

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> torch.export.ExportedProgram:
        """Return the program with the weights of a source.

        Strategies call this if they compile or interpret the program again. The program shares
        tensors with the source, except for those that it changes or keeps on another device.

        Args:
            source: Weights by FQN.
            pinned: Returns a tensor that the plan stores, by name.

        Raises:
            SourceError: The source lacks a weight that the program needs, or cannot be read.
            PlanMismatchError: The stored program is damaged, or another torch wrote it.
        """
