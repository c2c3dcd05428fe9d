"""Publish new weights while calls go on: staged into a container that nobody calls yet.

Read ``PublishingEngine`` first. A ``WeightSet`` is one tensor for each slot, and a container serves
calls from it. A set that is live never changes, except for slots that calls write. So a refit makes
another set, and its commit is one assignment. Running calls end on the old set.

Where the memory of a new set comes from:

- A value that nobody else writes to (``SlotValue.keepable``) is taken as it is.
- Other values are copied into the memory of a set that no call uses any more, or into new memory.
- A slot that gets no value shares the memory of the live set.

Nothing here waits for a call. If a running call still uses the set before the live one, the next
refit allocates another one, and keeps both for later refits. At most as many calls run as a
container has models, so there are at most two sets more than that.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.aotinductor.engine import LibraryEngine, any_differs, checked, write
from refitkit.builtin.aotinductor.native import ALIGNMENT, Container, Turns
from refitkit.errors import ConfigError, EngineError, Problem
from refitkit.recipe import write_value

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from refitkit.builtin.aotinductor.native import Answer, Library
    from refitkit.protocols import SlotValue

_LENT = "_refitkit_lent"
"""Attribute of tensors that several engines use."""


class WeightSet(NamedTuple):
    """One tensor for each slot.

    Attributes:
        tensors: The tensors by slot.
        made: Slots whose memory this engine allocated.
        taken: Versions (``Tensor._version``) of tensors that were taken as they were, by slot.
    """

    tensors: Mapping[str, torch.Tensor]
    made: frozenset[str]
    taken: Mapping[str, int]

    def own(self, name: str) -> bool:
        """Return whether the engine may write to the memory of a slot: nobody else uses it."""
        return name in self.made and not hasattr(self.tensors[name], _LENT)

    def require_untouched(self, names: Collection[str]) -> None:
        """Check that nobody has written to tensors since they were taken.

        Writes past torch (``.data``, NumPy, other processes) do not move a tensor's version.

        Args:
            names: Slots to look at.

        Raises:
            EngineError: Somebody has; lists the slots.
        """
        problems = [
            Problem(name, "written to after it was donated")
            for name, version in self.taken.items()
            if name in names and _version_of(self.tensors[name]) != version
        ]
        if problems:
            raise EngineError(
                "Weights that were donated to the module were written to by their donor.",
                problems=problems,
                hint="Refit the module with all of its weights, and do not write to those tensors.",
            )


class Live(NamedTuple):
    """A set of weights, and the container that serves calls from it."""

    weights: WeightSet
    container: Container


class PublishingEngine(LibraryEngine):
    """An engine that gets new weights while it serves; see ``refitkit.protocols.Engine``."""

    def __init__(
        self,
        library: Library,
        weights: WeightSet,
        mutable: Collection[str],
        *,
        models: int = 1,
    ) -> None:
        """Serve from a set of weights.

        Args:
            library: The model's library.
            weights: Tensors as the library lays them out, each aligned to ``ALIGNMENT``.
            mutable: Slots that calls of the model change in place.
            models: How many calls are served side by side.

        Raises:
            NotRefittableError: A weight has an offset or gaps.
            EngineError: The library refused.
        """
        super().__init__(library, weights.tensors, mutable, models)
        # those that calls, readers or staged refits use, and the live one
        self._containers: weakref.WeakSet[Container] = weakref.WeakSet()
        self._current = self._filled(weights)
        self._spare: WeightSet | None = None  # the set before the live one
        self._has_previous = False  # whether its values are those from before the last commit
        self._older: list[WeightSet] = []  # sets before it, which calls used when they were needed

    @classmethod
    def owning(
        cls, library: Library, tensors: Mapping[str, torch.Tensor], mutable: Collection[str]
    ) -> PublishingEngine:
        """Return an engine on tensors that nobody else uses."""
        return cls(library, WeightSet(tensors, frozenset(tensors), {}), mutable)

    def _filled(self, weights: WeightSet) -> Live:
        container = Container(self._library, weights.tensors, self._models)
        self._containers.add(container)
        return Live(weights, container)

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """The tensors that calls read, by slot."""
        return self._current.weights.tensors

    @property
    def publishes(self) -> bool:
        """Whether calls can go on while new weights become live: none of them writes any."""
        return not self._mutable

    # -- calls --------------------------------------------------------------------------------

    def _call_now(self, tensors: Sequence[torch.Tensor]) -> Answer:
        # Taken in the turn, not before it: a call that waits begins on the newest weights.
        return self._current.container.run(tensors)

    def serve(self, models: int) -> None:
        """Serve several calls side by side from now on.

        Args:
            models: How many.

        Raises:
            ConfigError: Calls write to buffers, so only one of them may run.
        """
        if models > 1 and self._mutable:
            names = ", ".join(sorted(self._mutable)[:3])
            raise ConfigError(
                f"Calls of this model write to its buffers ({names}), so they run one by one.",
                hint="Leave num_models out, or export the model without those buffers.",
            )
        self._models = models
        self._current = self._filled(self._current.weights)
        self._turns = Turns(models)

    def _aliases(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See the base class. Their memory stays as it is while they exist."""
        return _aliases_of(self._current, names)

    def values(self) -> dict[str, torch.Tensor]:
        """Return the live values of all slots, of one set; see ``read``.

        Raises:
            EngineError: A donor has written to some.
        """
        live = self._current
        live.weights.require_untouched(self._slots)
        return {**_aliases_of(live, self._slots), **self.mutable_values()}

    def held(self) -> dict[str, torch.Tensor]:
        """Return what the container itself has as its weights, by slot."""
        return self._current.container.held()

    # -- other engines on the same library ----------------------------------------------------

    def sibling(self) -> PublishingEngine:
        """Return an engine of its own, which shares the weights that calls do not write.

        Raises:
            EngineError: A donor has written to some.
        """
        weights = self._current.weights
        weights.require_untouched(self._slots)
        state = self.mutable_values()
        # from now on two engines use the others, so none may write to them
        for name in weights.tensors.keys() - self._mutable:
            setattr(weights.tensors[name], _LENT, True)
        second = WeightSet({**weights.tensors, **state}, self._mutable, weights.taken)
        return PublishingEngine(self._library, second, self._declared, models=self._models)

    def staged_engine(self, staged: Live) -> PublishingEngine:
        """Return this engine as it would be with another set live, for a verifier."""
        engine = copy.copy(self)
        engine._current = staged  # noqa: SLF001 - a copy of this object
        engine._turns = Turns(1)  # noqa: SLF001
        return engine

    # -- staging ------------------------------------------------------------------------------

    def _stage(self, values: Sequence[SlotValue]) -> StagedSet:
        filling = self.begin_staging([value.slot.name for value in values])
        filling.add(values)
        return filling.finish()

    def begin_staging(self, slots: Collection[str]) -> FillingSet:
        """Prepare to stage some slots; see ``refitkit.protocols.StagesGradually``.

        Raises:
            EngineError: A donor has written to a slot that keeps its value.
        """
        live = self._current.weights
        kept = self._slots.keys() - set(slots)
        live.require_untouched(kept)
        filling = FillingSet(self, live, slots, self._reusable())
        # calls write them, so each set has its own; the commit copies their values
        with torch.no_grad():
            filling.copy_live(self._mutable & kept)
        return filling

    def seal(self, weights: WeightSet) -> Live:
        """Return a container for a new set, once all copies to it have ended."""
        # Copies to a GPU may be pending, and their sources belong to the caller.
        self.drain()
        return self._filled(weights)

    def placed(
        self, value: SlotValue, live: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, bool]:
        """Return a value where it will serve, and whether this engine made that memory.

        Args:
            value: The value.
            live: The live value of its slot.
            memory: Memory of that layout that can be written to; None if there is none.
        """
        name = value.slot.name
        if value.pieces is not None:
            memory = _into(memory, live)
            if write_value(memory, value):
                return memory, True
        found = checked(value.slot, value.load())
        for one in self.spares:
            if is_same(found, one.tensors[name]):  # an undo: the value is where it was
                return one.tensors[name], name in one.made
        is_owned = value.keepable is not None and value.keepable(found)
        if is_owned and name not in self._mutable and fits(found, live):
            return found.detach(), False
        return _into(memory, live).copy_(found), True

    def _reusable(self) -> dict[str, torch.Tensor]:
        """Return memory of an earlier set that this engine made and nothing uses."""
        self._library.reap()
        # in this order: a container that goes meanwhile is in one of the two
        sets = [*(one.tensors for one in list(self._containers)), *self._library.busy()]
        used = {id(tensor) for tensors in sets for tensor in tensors.values()}
        for one in self.spares:
            if any(one.tensors is tensors for tensors in sets):
                continue
            if one is self._spare:
                self._has_previous = False
            self._older = [other for other in self._older if other is not one]
            return {n: t for n, t in one.tensors.items() if one.own(n) and id(t) not in used}
        return {}

    def _is_used(self, weights: WeightSet) -> bool:
        """Return whether a call, a reader or a staged refit uses a set."""
        return any(one.tensors is weights.tensors for one in list(self._containers))

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the set before the last commit, unless its memory was written to since.

        Staging one of these values copies nothing: its memory serves again.
        """
        if self._spare is None or not self._has_previous:
            return {}
        weights = self._spare
        changed = {n for n, v in weights.taken.items() if _version_of(weights.tensors[n]) != v}
        return {name: t for name, t in weights.tensors.items() if name not in changed}

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        live = self._current.weights
        tensors, made, taken = dict(live.tensors), set(live.made), dict(live.taken)
        with torch.no_grad():
            for value in values:
                name = value.slot.name
                if not live.own(name):
                    tensors[name] = like(live.tensors[name])
                    made.add(name)
                    taken.pop(name, None)
                write(tensors[name], value)
        self.drain()
        if any(tensors[name] is not live.tensors[name] for name in tensors):
            self._current = self._filled(WeightSet(tensors, frozenset(made), taken))

    # -- for ``StagedSet`` --------------------------------------------------------------------

    @property
    def current(self) -> Live:
        """What calls use now."""
        return self._current

    def carry_mutable(self, staged: Live, written: Collection[str]) -> None:
        """Copy to a set what calls have written since it was staged. No call may run.

        Args:
            staged: A set that is not live.
            written: Slots that keep their new values.
        """
        with torch.no_grad():
            for name in self._mutable - set(written):
                staged.weights.tensors[name].copy_(self.live[name])

    def publish(self, new: Live) -> None:
        """Let calls that start from now on use another set, and keep the live one for an undo."""
        before, spare = self._current, self._spare
        # an interrupt may have come here before, and noted the live set as the spare one
        is_other = spare is not None and spare.tensors is not before.weights.tensors
        if spare is not None and is_other and self._is_used(spare):
            self._older = [*self._older, spare][-self._models :]
        self._spare, self._has_previous = before.weights, True
        self._current = new

    def go_back(self, before: Live) -> None:
        """Let calls use a set that was live before, if another one is. Nothing here can fail."""
        if self._current is not before:
            self._spare = self._current.weights
        self._has_previous = False
        self._current = before

    @property
    def spares(self) -> list[WeightSet]:
        """The sets before the live one."""
        return [*self._older, *([self._spare] if self._spare is not None else [])]

    def free_spare(self) -> int:
        """Free the sets before the live one; return their size in bytes."""
        freed = {id(t): t.nbytes for one in self.spares for t in one.tensors.values()}
        for tensor in self.live.values():
            freed.pop(id(tensor), None)
        self._spare, self._older, self._has_previous = None, [], False
        return sum(freed.values())


class FillingSet:
    """A set that gets its values one after another; see ``refitkit.protocols.Filling``."""

    def __init__(
        self,
        engine: PublishingEngine,
        live: WeightSet,
        slots: Collection[str],
        memory: Mapping[str, torch.Tensor],
    ) -> None:
        """Create the handle; ``PublishingEngine`` calls this.

        Args:
            engine: Engine that stages.
            live: The live set.
            slots: Slots that will get a value.
            memory: Memory that can be written to, by slot.
        """
        self._engine, self._live, self._memory = engine, live, memory
        self._slots = tuple(slots)
        self._tensors, self._made = dict(live.tensors), set(live.made)
        self._taken = {n: version for n, version in live.taken.items() if n not in slots}

    def copy_live(self, names: Collection[str]) -> None:
        """Copy live values, so that the set has memory of its own for these slots."""
        for name in names:
            own = _into(self._memory.get(name), self._live.tensors[name])
            self._tensors[name] = own.copy_(self._live.tensors[name])

    def add(self, values: Sequence[SlotValue]) -> None:
        """Place values where they will serve."""
        with torch.no_grad():
            for value in values:
                name = value.slot.name
                self._tensors[name], is_made = self._engine.placed(
                    value, self._live.tensors[name], self._memory.get(name)
                )
                (self._made.add if is_made else self._made.discard)(name)
                if not is_made:
                    self._taken[name] = _version_of(self._tensors[name])
        self._engine.drain()  # the caller's tensors are free now

    def finish(self) -> StagedSet:
        """Return the set in a container."""
        weights = WeightSet(self._tensors, frozenset(self._made), self._taken)
        return StagedSet(self._engine, self._engine.seal(weights), self._slots)

    def discard(self) -> None:
        """Do nothing: the memory goes with this object."""


class StagedSet:
    """New values in a container that nobody calls; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: PublishingEngine, new: Live, names: Sequence[str]) -> None:
        """Create the handle; ``PublishingEngine`` calls this.

        Args:
            engine: Engine that staged the set.
            new: The set.
            names: Slots with new values.
        """
        self._engine, self._new, self._names = engine, new, names
        self._before = engine.current
        # freed with this object: that takes milliseconds, and the commit may have closed the gate
        self._earlier = engine.spares

    def commit(self) -> None:
        """Publish the set: one assignment, independent of the size of the weights."""
        self._engine.carry_mutable(self._new, self._names)
        self._engine.publish(self._new)

    def rollback(self) -> None:
        """Serve calls from the earlier set, whether or not this one was published."""
        self._engine.go_back(self._before)

    @property
    def engine(self) -> PublishingEngine:
        """The engine as it will be after the commit: a verifier can read and call it."""
        return self._engine.staged_engine(self._new)

    def discard(self) -> None:
        """Do nothing: the memory goes with this object."""

    def changed(self) -> bool:
        """Return whether any bit differs from the live values."""
        new, old = self._new.weights.tensors, self._before.weights.tensors
        return any_differs(
            [(new[name], old[name]) for name in self._names if new[name] is not old[name]]
        )

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot: an alias."""
        return self._new.weights.tensors[slot]


def fits(found: torch.Tensor, live: torch.Tensor) -> bool:
    """Return whether a tensor can serve without a copy where another one serves now."""
    return (
        found.device == live.device
        and found.stride() == live.stride()
        and found.data_ptr() % ALIGNMENT == 0
        and not found.is_neg()
        and not found.is_conj()
        # a part of a large tensor would keep all of it in memory
        and found.untyped_storage().nbytes() <= found.nbytes + ALIGNMENT
    )


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one shape are the same memory in the same order."""
    return bool(a.data_ptr()) and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _into(memory: torch.Tensor | None, live: torch.Tensor) -> torch.Tensor:
    return like(live) if memory is None else memory


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Return new memory of the same layout. Torch aligns it to ``ALIGNMENT``."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _aliases_of(live: Live, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return aliases that keep their container, so that their memory is not reused."""
    found = {name: live.weights.tensors[name].detach() for name in names}
    for alias in found.values():
        alias._refitkit_container = live.container  # type: ignore[attr-defined]  # noqa: SLF001 - our own
    return found


def _version_of(tensor: torch.Tensor) -> int:
    """Return how often torch has written to a tensor; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - no public name
