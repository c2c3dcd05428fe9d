"""Engines: the units that a refit writes to, and the transaction that it writes in.

refitkit calls one engine in this order:

1. ``Engine.stage`` (or ``stage_partial``, ``stage_over``), while calls of the module go on;
2. the optional views of the staged values (:class:`ShowsStaged`), then
   ``StagedRefit.changed`` and ``Engine.memory``;
3. ``StagedRefit.commit``, behind the closed gate: no call of the module runs until step 5 is done;
4. the verifier, which calls or reads the module; of a module that publishes
   (:class:`~refitkit.protocols.OpensStaged`) it comes before step 3, and calls go on throughout;
5. nothing if the refit succeeded, else ``StagedRefit.rollback``.

If anything fails before step 3, it calls ``StagedRefit.discard`` instead. A module has at most one
refit at a time.

An error of :mod:`refitkit.errors` passes through. Any other exception becomes an ``EngineError``
that names the engine, or a ``ResourceError`` if the system refused memory.

:class:`Engine` and :class:`StagedRefit` are required. Each optional ability is a protocol of its
own. refitkit checks for its members, so no base class is inherited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping

    import torch

    from refitkit.model import EngineMemory, Slot


# -- new values -------------------------------------------------------------------------------


class SlotValue(NamedTuple):
    """A new value for one slot, computed when an engine loads it.

    A mapping strategy creates one for each slot; an engine gets them in ``stage``.

    Attributes:
        slot: Slot that the value is for.
        strategy: Name of the strategy that created the value.
        sources: FQNs of the weights that the value is computed from. Empty, unless ``pinned``: it
            is computed from the program as a whole, and counts as one that all weights reach.
        load: Returns the tensor, in the dtype and shape of the slot, with any strides, on any
            device. The tensor may be a view of the caller's weights: copy it, never write to it. It
            stays as it is until the engine has staged all values: other loads do not change it.
        identity: Whether the value is a tensor of the source itself, so ``load`` computes nothing.
        pinned: Whether the plan stores the value, and it uses nothing of the source.
        pieces: Returns the same elements as flat tensors, one after another, or None if only
            ``load`` can give them. Takes the memory to read them into, or None; see
            ``GivesPieces``. None: there are no pieces. ``refitkit.recipe.write_value`` calls it.
        has_bits: Returns whether a contiguous tensor on the CPU has the bits of the value; None if
            only ``load`` can tell; see ``KnowsBits``. None: only ``load`` can.
        keepable: Tells of a tensor that ``load`` returned whether an engine may keep it as its own
            memory, because nobody writes to it from now on. None: it may not.
        formula: Stands for ``load`` within this process: values of one slot and strategy with equal
            formulas, from ``sources`` with equal bits, have equal bits. A refit with ``delta`` then
            skips the slot if its sources did not change. None: it is written in each refit. The
            built-in recipes need none.
    """

    # A refit creates one for each slot, and a named tuple takes a third of a frozen dataclass's
    # time to create.

    slot: Slot
    strategy: str
    sources: tuple[str, ...]
    load: Callable[[], torch.Tensor]
    identity: bool = False
    pinned: bool = False
    pieces: Callable[[torch.Tensor | None], Iterator[torch.Tensor] | None] | None = None
    has_bits: Callable[[torch.Tensor], bool | None] | None = None
    keepable: Callable[[torch.Tensor], bool] | None = None
    formula: Hashable | None = None


class SteadyValues(Sequence[SlotValue]):
    """Values of one engine, for one refit after another. Nobody can change them.

    If an engine gets the same object again, its values are for the same slots, and load tensors
    with the same headers, other ones as a rule. Values with ``identity`` are in memory; the others
    are computed when they are loaded. An engine may keep a weak reference to find that out. It
    loads values anew in each refit, and never after it.
    """

    def __init__(self, values: Iterable[SlotValue]) -> None:
        """Hold values.

        Args:
            values: The values.
        """
        self._values = tuple(values)

    @overload
    def __getitem__(self, place: int) -> SlotValue: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[SlotValue]: ...

    def __getitem__(self, place: int | slice) -> SlotValue | Sequence[SlotValue]:
        """Return one value, or some."""
        return self._values[place]

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._values)

    def __iter__(self) -> Iterator[SlotValue]:
        """Iterate over the values."""
        return iter(self._values)


# -- what every engine implements -------------------------------------------------------------


class Engine(Protocol, metaclass=Ability):
    """One unit of a module whose weights are replaced together."""

    @property
    def name(self) -> str:
        """Name of the engine, unique within its module."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All slots by name. Never changes."""

    @property
    def memory(self) -> EngineMemory:
        """Where the engine keeps the old weights for a rollback, and how many bytes that takes.

        Read in each refit, after all engines are staged and before the commit.
        """

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Load and copy new values for *all* slots. The live weights stay in use.

        Called before the commit, while calls of the module run. What was staged before is committed
        or discarded by then. Check the dtype and shape of every tensor. Copy it: the caller may
        free it when this returns. If this raises, the live weights are unchanged, and the next
        ``stage`` works.

        Args:
            values: One value for each slot, in any order.

        Raises:
            WeightMismatchError: A value has another dtype or shape than its slot, or slots are
                missing, unknown or given twice. It lists all of them.
            Exception: Any exception of ``SlotValue.load``. Do not catch it: refitkit reports the
                strategy that created the value.
        """


class StagedRefit(Protocol, metaclass=Ability):
    """New values of one engine that are staged and not live yet.

    refitkit calls either ``discard``, or ``commit`` and then, if anything fails later,
    ``rollback``. If ``rollback`` raises, the module is lost: it refuses all further calls.
    """

    def commit(self) -> None:
        """Make the new values live.

        Called at most once, behind the closed gate, after ``OpenedModule.synchronize``. If it
        raises, refitkit calls ``rollback``.
        """

    def rollback(self) -> None:
        """Make the old values live again, bit for bit.

        Called behind the closed gate: after a failed or interrupted ``commit`` of this engine, or
        if another engine, the verifier or a hook fails later. Ctrl-C can interrupt it at any line,
        or just after it has finished. refitkit then calls it again, so repeated calls must be safe.
        """

    def discard(self) -> None:
        """Drop the new values, which never became live. The live values stay.

        Called instead of ``commit``, while calls of the module run. Its errors are ignored.
        """

    def changed(self) -> bool | None:
        """Return whether any bit of the new values differs from the live values.

        Called before ``commit``, for ``RefitReport.changed``. Not called if measured samples
        differ already.

        Returns:
            None if the engine does not know.
        """


# -- what some engines can do -----------------------------------------------------------------


@runtime_checkable
class SupportsReadback(Protocol, metaclass=Ability):
    """An engine that can read its live weights. Its slots have ``Slot.readable`` set.

    Asked by: the verifier ``weights``, ``diff``, ``compiled.read``, checks of finite values, undo.
    Gain: the module can be verified without inputs, compared and read; the report says how far
        slots move.
    """

    def read(self, slot: str) -> torch.Tensor:
        """Return the live value of a slot.

        Called before and after staging, by verifiers behind the closed gate, and to copy the old
        weights for an undo. The caller does not write to the tensor, and copies it to keep it.

        Args:
            slot: Name of the slot.

        Returns:
            An alias of the live memory, valid until the next commit, or a copy: the dtype of the
            slot, and its shape if the engine knows the shape. A copy, made between two calls, of
            a slot that calls change.
        """


@runtime_checkable
class RemembersWeights(Protocol, metaclass=Ability):
    """An engine that cannot read its live weights, but keeps the values of the last refit.

    refitkit checks that new values are finite only for engines that it can read. An engine of this
    kind checks them in ``stage`` if ``Tools.check_finite`` is set, and raises WeightMismatchError;
    see :class:`ChecksFinite`.

    Asked by: checks of finite values, undo, the report's ``changes``.
    Gain: undo and ``changes`` after the first refit, although the engine cannot be read.
    """

    def remembered(self, slot: str) -> torch.Tensor | None:
        """Return the live value of a slot, if the engine knows it.

        Called before the commit, to measure how far slots move and to copy the old weights for an
        undo. The caller does not write to the tensor, and copies it to keep it.

        Args:
            slot: Name of the slot.

        Returns:
            An alias of the kept value, valid until the next refit: the dtype of the slot, and its
            shape if the engine knows the shape. None if the values are unknown, as they are before
            the first refit. An engine knows those of all slots or of none.
        """


@runtime_checkable
class ChecksFinite(Protocol, metaclass=Ability):
    """An engine that remembers its weights, and compares new values with them in ``stage``.

    Asked by: the check of new values, before each ``stage``.
    Gain: the weights are read once: the check of finite values needs no read of its own.
    """

    @property
    def checks_finite(self) -> bool:
        """Whether the next ``stage`` refuses elements that are not finite where present ones are.

        Read before each ``stage``. If True, the engine knows the present values of all slots, and
        refitkit does not look for such elements in weights that are the value of a slot.
        """


@runtime_checkable
class SupportsPartial(Protocol, metaclass=Ability):
    """An engine that can write some slots and keep the others.

    It is needed for ``partial=True``, for ``delta=True``, and to keep state that calls write.

    Asked by: ``partial=True``, ``delta=True``, and refits of modules whose calls write slots.
    Gain: a refit writes some slots, and the others keep their values.
    """

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Stage like ``Engine.stage``, for some slots. All other slots keep their live values.

        Called instead of ``Engine.stage``, before the commit, while calls of the module run.

        Args:
            values: At most one value for each slot; at least one.

        Raises:
            WeightMismatchError: A value has another dtype or shape than its slot, or slots are
                unknown or given twice. It lists all of them.
            NotRefittableError: The engine cannot keep the values of the other slots. A refit with
                ``delta=True`` then stages all slots.
        """


@runtime_checkable
class StagesGradually(Protocol, metaclass=Ability):
    """An engine that can stage values as they arrive, while calls of the module go on.

    Asked by: ``WeightReceiver``.
    Gain: the memory of each bucket of an update is free again at once. For other engines all
        buckets are kept until the last one has arrived.
    """

    def begin_staging(self, slots: Collection[str]) -> Filling:
        """Prepare to stage values for some slots, in any order.

        Called instead of ``Engine.stage``. What was staged before is committed or discarded by
        then. If it raises, the live weights are unchanged.

        Args:
            slots: Names of the slots that will get a value, each once. All other slots keep their
                live values, as in ``SupportsPartial.stage_partial``.

        Raises:
            NotRefittableError: The engine cannot keep the values of the other slots.
        """


class Filling(Protocol, metaclass=Ability):
    """Values of one engine that are being staged.

    refitkit calls ``add`` until all slots have a value, and then ``finish``; or ``discard`` at any
    time. All calls come from one thread.
    """

    def add(self, values: Sequence[SlotValue]) -> None:
        """Load and copy values, like ``Engine.stage``: the caller frees them afterwards.

        Args:
            values: Values of slots that have none yet.

        Raises:
            WeightMismatchError: A value has another dtype or shape than its slot. It lists all.
            Exception: Any exception of ``SlotValue.load``.
        """

    def finish(self) -> StagedRefit:
        """Return the staged refit, which shows its values (``ShowsStaged``). All slots have one."""

    def discard(self) -> None:
        """Drop all values. The live values stay. Its errors are ignored."""


@runtime_checkable
class SupportsOverwrite(Protocol, metaclass=Ability):
    """An engine that can write over its live weights, without memory for a second set.

    refitkit uses it for ``rollback=False``.

    Asked by: ``rollback=False``.
    Gain: a refit needs no memory for a second set of weights.
    """

    def stage_over(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Prepare to write over the live values, and copy nothing yet.

        Called instead of ``stage`` and ``stage_partial`` before the commit, while calls run. It
        checks names now and frees a second set of weights. ``commit`` then loads the values behind
        the closed gate and writes them over the live ones. After that, ``rollback`` raises
        ``EngineError``. ``refitkit.recipe.Overwriting`` implements this.

        Args:
            values: Values for all slots, or for some, like ``stage_partial``.

        Raises:
            WeightMismatchError: Slots are unknown or given twice. It lists all of them.
            NotRefittableError: The engine cannot keep the values of the slots that are left out.
        """


@runtime_checkable
class SupportsSpareBuffer(Protocol, metaclass=Ability):
    """An engine with a second set of weights in memory, which serves staging and rollback.

    Asked by: ``compiled.free_spare()``.
    Gain: users can free the second set of weights between refits.
    """

    def free_spare(self) -> int:
        """Free the second set of weights. The next refit allocates it again.

        ``compiled.free_spare()`` calls this; no refit runs meanwhile, but calls may.

        Returns:
            Number of bytes that were freed; 0 if there is no second set now.
        """


@runtime_checkable
class HoldsPrevious(Protocol, metaclass=Ability):
    """An engine that keeps the values from before the last commit until something is staged.

    refitkit then undoes the last refit without copies of its own.

    Asked by: undo, and the list of earlier weights.
    Gain: the last refit is undone without copies in host memory.
    """

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the values that slots had before the last commit.

        Called between refits, to list and to undo the last refit. An undo passes the values to
        ``stage`` or ``stage_partial``: they must stay valid until that call returns. The caller
        does not write to them.

        Returns:
            Values by slot name, each as ``Engine.stage`` takes it, for at least the slots that the
            last commit changed. Empty if there was no commit, if it was rolled back, or if the
            values were overwritten or freed since.
        """


@runtime_checkable
class TellsRoute(Protocol, metaclass=Ability):
    """An engine that takes new weights in one of several ways.

    Asked by: the report (``RefitReport.routes``) and ``refitkit inspect``.
    Gain: users see which way the weights took, and why it was not the fastest one.
    """

    @property
    def route(self) -> tuple[str, str]:
        """Name of the way, and why it is not the fastest one; empty if it is.

        Read after a commit, for ``RefitReport.routes``, and by ``inspect``.
        """


@runtime_checkable
class SupportsWarming(Protocol, metaclass=Ability):
    """An engine whose first refit is slow unless it was prepared.

    Asked by: ``compiled.warm()`` and ``refitkit.load(warm=True)``.
    Gain: the first refit is as fast as later ones.
    """

    def warm(self, progress: Callable[[str], None]) -> None:
        """Do the work that would make the first refit slow. Weights and outputs do not change.

        ``compiled.warm()`` and ``refitkit.load(warm=True)`` call this behind the closed gate.

        Args:
            progress: Reports one line of text for each step.

        Raises:
            ModuleLostError: It failed, and the weights are no longer certain. After any other
                error the engine must work as before.
        """


# -- what some staged refits can show ---------------------------------------------------------


@runtime_checkable
class ShowsStaged(Protocol, metaclass=Ability):
    """A staged refit whose new values can be read before the commit.

    With it refitkit checks that new values are finite and measures how far slots move.

    Asked by: checks of finite values and the report's ``changes``.
    Gain: bad values are refused before the commit; with a readable engine the report says how far
        slots move.
    """

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot.

        Called between ``stage`` and ``commit``, only for slots that got a value. The caller does
        not write to the tensor.

        Args:
            slot: Name of the slot.

        Returns:
            An alias, valid until ``commit`` or ``discard``: the dtype of the slot, and its shape if
            the engine knows the shape.
        """
