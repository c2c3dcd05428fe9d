"""Refittable units, and what some of them can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from refitkit.model import EngineMemory, Slot


class SlotValue(NamedTuple):
    """A new value for one slot, computed on demand.

    A refit makes one for each slot, and a named tuple is made in a third of a frozen dataclass's
    time.

    Attributes:
        slot: The slot that it is for.
        strategy: Name of the strategy that gives it.
        sources: FQNs that it comes from.
        load: Returns the tensor: dtype and shape of the slot, any layout, any device. It may be a
            view of the caller's tensor: read it, never write or keep it.
        identity: Whether the value is a source's tensor itself, so that ``load`` is free.
        pinned: Whether it is a value that the plan keeps, and nothing of the source's.
        pieces: Gives the same elements in pieces, where that can be: see ``GivesPieces``.
    """

    slot: Slot
    strategy: str
    sources: tuple[str, ...]
    load: Callable[[], torch.Tensor]
    identity: bool = False
    pinned: bool = False
    pieces: Callable[[], Iterator[torch.Tensor] | None] | None = None


class StagedRefit(Protocol):
    """New values beside the ones that an engine serves, on their way in.

    The pipeline calls either ``discard``, or ``commit`` and then, if anything fails, ``rollback``.
    Each may raise. When ``rollback`` raises, the module is lost.
    """

    def commit(self) -> None:
        """Make the new values live. When it raises, ``rollback`` is called.

        No call of the module runs meanwhile. ``OpenedModule.synchronize`` has waited for the work
        that earlier calls left pending.
        """

    def rollback(self) -> None:
        """Make the old values live again, bit for bit; also right after a failed ``commit``.

        Called again after it was interrupted, at any line or right after it was done.
        """

    def discard(self) -> None:
        """Forget the new values; the live ones were never touched."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None where the engine cannot tell.

        Called before ``commit``.
        """


class Engine(Protocol):
    """One refittable unit."""

    @property
    def name(self) -> str:
        """Its name, unique within its module."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All its slots by name."""

    @property
    def memory(self) -> EngineMemory:
        """Where old weights are kept for a rollback, and what that costs once staged."""

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for *all* slots beside the live ones, which go on serving.

        Must check dtype and shape of every tensor before it is used, and copy it: the caller's
        tensor is free when this returns. When it raises, the live values are untouched.
        """


@runtime_checkable
class SupportsReadback(Protocol):
    """An engine that can read its weights back."""

    def read(self, slot: str) -> torch.Tensor:
        """The live value: an alias, valid until the next commit. Not to be written to."""


@runtime_checkable
class RemembersWeights(Protocol):
    """An engine that cannot be read, and keeps what was last written to it."""

    def remembered(self, slot: str) -> torch.Tensor | None:
        """The live value: an alias, valid until the next refit. Not to be written to.

        None where nobody knows it, as before the first refit.
        """


@runtime_checkable
class ShowsStaged(Protocol):
    """Staged values that can be looked at beside the live ones, before they are committed."""

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot that one was given for, in its dtype and shape.

        An alias, valid until ``commit`` or ``discard``. Not to be written to.
        """


@dataclass(frozen=True)
class Place:
    """Where the value of a slot lies in a piece of memory.

    Attributes:
        slot: Its name.
        dtype: Its dtype.
        offset: Where it begins, in bytes: a multiple of the size of an element.
        count: Number of its elements; they lie one after another.
    """

    slot: str
    dtype: torch.dtype
    offset: int
    count: int


class Places:
    """Where all slots of an engine lie. Never changes: what follows from it is found out once.

    Attributes:
        all: One place for each slot, in any order.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        """Take the places of all slots."""
        self.all = tuple(places)


@dataclass(frozen=True, eq=False)
class SideBySide:
    """All values of an engine, the live and the staged ones, each in one piece of memory.

    Attributes:
        live: Bytes of the live values: a flat tensor of ``uint8``, on any device.
        staged: Bytes of the staged values, likewise, of the same size.
        places: Where slots lie in both: the same object from refit to refit.
    """

    live: torch.Tensor
    staged: torch.Tensor
    places: Places


@runtime_checkable
class ShowsMemory(Protocol):
    """Staged values that lie as the live ones do: all slots are compared by a few operations.

    For engines with many slots, where one operation for each would cost more than what it does.
    """

    def side_by_side(self) -> SideBySide | None:
        """Both, valid until ``commit`` or ``discard``, not to be written to.

        None where nobody knows the live values.
        """


@runtime_checkable
class SupportsPartial(Protocol):
    """An engine that can change some slots and keep the others."""

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Like ``stage``, for some slots; all others keep their live values."""


@runtime_checkable
class SupportsSpareBuffer(Protocol):
    """An engine with a second set of weights in memory."""

    def free_spare(self) -> int:
        """Free the second set; returns its bytes. The next refit allocates it again."""


@runtime_checkable
class HoldsPrevious(Protocol):
    """An engine that has its values from before the last commit, until something is staged."""

    def previous(self) -> Mapping[str, torch.Tensor]:
        """What slots held before the last commit: those that it changed, or more.

        Values are usable until the ``stage`` that they are given to returns, and not to be written
        to. Nothing where there was no commit, where it was rolled back, or where the values were
        overwritten or freed since.
        """


@runtime_checkable
class SupportsOverwrite(Protocol):
    """An engine that can do without a second set of weights, and without a way back."""

    def stage_over(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Like ``stage``, or ``stage_partial`` where slots are left out; but nothing is copied.

        Names are checked now. A second set of weights is freed, and ``commit``, while no call runs,
        reads the values and writes them over the live ones. From then on ``rollback`` raises an
        ``EngineError``: see ``refitkit.recipe.Overwriting``, which does just that.

        Raises:
            WeightMismatchError: There are no such slots, or some are given twice.
            NotRefittableError: Some have no value, and what they hold cannot be kept.
        """


@runtime_checkable
class SupportsWarming(Protocol):
    """An engine whose first refit is slow unless it was warmed."""

    def warm(self, progress: Callable[[str], None]) -> None:
        """Do now what the first refit would have to. Its weights and answers do not change.

        Args:
            progress: Called with one line of text for each step.
        """
