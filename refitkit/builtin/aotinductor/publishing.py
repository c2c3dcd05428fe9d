"""Publish new weights while calls go on: staged into a container that nobody calls yet.

Read ``PublishingEngine`` first. A *set* of weights is one tensor for each slot, and a container
that serves calls from it. A set that is live never changes, except for slots that calls write. So
a refit makes another set, and its commit is one assignment. Running calls end on the old set.

Where its memory comes from:

- A value that nobody else writes to (``SlotValue.keepable``) is taken as it is.
- Other values are copied into the memory of a set that no call uses any more, or into new memory.
- A slot that gets no value shares the memory of the live set.

Nothing here waits for a call. At most as many calls run as a container has models, so there are
never more sets in use than that, the live one and the one before it.
"""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from refitkit.builtin.aotinductor.engine import ENGINE, AOTInductorEngine, checked, write
from refitkit.builtin.aotinductor.native import ALIGNMENT, Container, Turns
from refitkit.errors import ConfigError
from refitkit.model import EngineMemory
from refitkit.program.bits import same_bits
from refitkit.recipe.sources import fill, pieces_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from refitkit.builtin.aotinductor.native import Answer, Library
    from refitkit.protocols import SlotValue

_PREFIX = 1024  # elements compared first when looking for a change


class Spare(NamedTuple):
    """The set before the live one.

    Attributes:
        tensors: The tensors by slot.
        made: Slots whose memory this engine allocated, and no other engine uses.
    """

    tensors: Mapping[str, torch.Tensor]
    made: frozenset[str]


class PublishingEngine(AOTInductorEngine):
    """An engine that gets new weights while it serves; see ``refitkit.protocols.Engine``."""

    def __init__(
        self,
        library: Library,
        tensors: Mapping[str, torch.Tensor],
        mutable: Collection[str],
        *,
        made: Collection[str] = (),
        models: int = 1,
    ) -> None:
        """Serve from some tensors, as they are.

        Args:
            library: The model's library.
            tensors: One for each slot, as the library lays it out and aligned.
            mutable: Slots that calls of the model change in place.
            made: Slots whose tensors nobody else uses.
            models: How many calls are served side by side.

        Raises:
            NotRefittableError: A weight has an offset or gaps.
            EngineError: The library refused.
        """
        super().__init__(tensors, mutable)
        self._library, self._models = library, models
        self._turns = Turns(models)
        self._on_gpu = any(t.device.type == "cuda" for t in tensors.values())
        # those that calls, readers or staged refits use, and the live one
        self._containers: weakref.WeakSet[Container] = weakref.WeakSet()
        self._current = self._filled(tensors, made)
        self._spare: Spare | None = None  # the set before the live one
        self._has_previous = False  # whether its values are those from before the last commit

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """The tensors that calls read, by slot."""
        return self._current.tensors

    @property
    def publishes(self) -> bool:
        """Whether calls can go on while new weights become live: none of them writes any."""
        return not self._mutable

    @property
    def memory(self) -> EngineMemory:
        """Memory for the rollback: the set before the live one."""
        return EngineMemory(engine=ENGINE, kind="second-set", bytes=self.nbytes)

    @property
    def call_spec(self) -> tuple[str, str]:
        """See the base class."""
        return self._library.in_spec, self._library.out_spec

    # -- calls --------------------------------------------------------------------------------

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See the base class. Other threads run meanwhile."""
        outputs, failure = self._turns.take(partial(self._call_now, tensors))
        # Raised only here: a traceback would keep the frame that refers to the container.
        if failure:
            raise RuntimeError(failure)
        return outputs

    def _call_now(self, tensors: Sequence[torch.Tensor]) -> Answer:
        # Taken in the turn, not before it: a call that waits begins on the newest weights.
        container = self._current
        return container.run_on_gpu(tensors) if self._on_gpu else container.run(tensors)

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
        self._current = self._filled(self._current.tensors, self._current.made)
        self._turns = Turns(models)

    def _filled(self, tensors: Mapping[str, torch.Tensor], made: Collection[str]) -> Container:
        container = Container(self._library, tensors, made, self._models)
        self._containers.add(container)
        return container

    def read(self, slot: str) -> torch.Tensor:
        """Return the live value of a slot: an alias. Its memory stays as it is while it exists."""
        container = self._current
        return _holding(container, container.tensors[slot])

    def values(self) -> dict[str, torch.Tensor]:
        """Return the live values of all slots, of one set; see ``read``."""
        container = self._current
        return {name: _holding(container, t) for name, t in container.tensors.items()}

    def held(self) -> dict[str, torch.Tensor]:
        """Return what the container itself has as its weights, by slot."""
        return self._current.held()

    # -- other engines on the same library ----------------------------------------------------

    def sibling(self) -> PublishingEngine:
        """Return an engine of its own, which shares the weights that calls do not write."""
        live = self._current.tensors
        # in a turn, so that no call writes meanwhile: such a model has one turn only
        state = self._turns.take(self.mutable_values) if self._mutable else {}
        tensors = {**live, **state}
        # from now on two engines use these tensors, so none may write to them
        for container in list(self._containers):
            container.made -= self._shared(container.tensors)
        if self._spare is not None:
            made = self._spare.made - self._shared(self._spare.tensors)
            self._spare = self._spare._replace(made=made)
        return PublishingEngine(
            self._library, tensors, self._declared, made=self._mutable, models=self._models
        )

    def _shared(self, tensors: Mapping[str, torch.Tensor]) -> set[str]:
        """Return the slots whose tensors are those of the live set."""
        live = self._current.tensors
        return {n for n in live if tensors[n] is live[n]} - self._mutable

    def staged_engine(self, container: Container) -> PublishingEngine:
        """Return this engine as it would be with another container live, for a verifier."""
        engine = copy.copy(self)
        engine._current = container  # noqa: SLF001 - a copy of this object
        engine._turns = Turns(1)  # noqa: SLF001
        return engine

    # -- staging ------------------------------------------------------------------------------

    def _stage(self, values: Sequence[SlotValue]) -> StagedSet:
        live = self._current.tensors
        memory = self._reusable()
        self._has_previous = False
        tensors, made = dict(live), set(self._current.made)
        with torch.no_grad():
            for value in values:
                name = value.slot.name
                tensors[name], is_made = self._placed(value, live[name], memory.get(name))
                (made.add if is_made else made.discard)(name)
            # calls write them, so each set has its own; the commit copies their values
            for name in self._mutable - {value.slot.name for value in values}:
                tensors[name] = _into(memory.get(name), live[name]).copy_(live[name])
        # Copies to a GPU may be pending, and their sources belong to the caller.
        self.drain()
        container = self._filled(tensors, made)
        return StagedSet(self, container, [value.slot.name for value in values])

    def _placed(
        self, value: SlotValue, live: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, bool]:
        """Return a value where it will serve, and whether this engine made that memory.

        Args:
            value: The value.
            live: The live value of its slot.
            memory: Memory of that layout that can be written to; None if there is none.
        """
        name = value.slot.name
        pieces = pieces_for(live, value)
        if pieces is not None:
            memory = _into(memory, live)
            fill(memory, pieces, name)
            return memory, True
        found = checked(value.slot, value.load())
        spare = self._spare
        if spare is not None and is_same(found, spare.tensors[name]):
            # an undo: the value is where it was
            return spare.tensors[name], name in spare.made
        is_owned = value.keepable is not None and value.keepable(found)
        if is_owned and name not in self._mutable and fits(found, live):
            return found.detach(), False
        return _into(memory, live).copy_(found), True

    def _reusable(self) -> dict[str, torch.Tensor]:
        """Return memory of the spare set that this engine made and nothing uses."""
        spare = self._spare
        if spare is None:
            return {}
        self._library.reap()
        # in this order: a container that goes meanwhile is in one of the two
        sets = [container.tensors for container in list(self._containers)] + self._library.busy()
        used = {id(tensor) for tensors in sets for tensor in tensors.values()}
        return {n: spare.tensors[n] for n in spare.made if id(spare.tensors[n]) not in used}

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the set before the last commit, unless something was staged since.

        Staging one of these values copies nothing: its memory serves again.
        """
        return self._spare.tensors if self._spare is not None and self._has_previous else {}

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        live = self._current.tensors
        tensors, made = dict(live), set(self._current.made)
        with torch.no_grad():
            for value in values:
                name = value.slot.name
                # memory that others use, too, is not written to
                if name not in made:
                    tensors[name] = like(live[name])
                    made.add(name)
                write(tensors[name], value)
        self.drain()
        if any(tensors[name] is not live[name] for name in live):
            self._current = self._filled(tensors, made)

    # -- for ``StagedSet`` --------------------------------------------------------------------

    @property
    def current(self) -> Container:
        """The container that calls use now."""
        return self._current

    def carry_mutable(self, container: Container, written: Collection[str]) -> None:
        """Copy to a container what calls have written since it was filled. No call may run.

        Args:
            container: Container that is not live.
            written: Slots that keep their new values.
        """
        with torch.no_grad():
            for name in self._mutable - set(written):
                container.tensors[name].copy_(self._current.tensors[name])

    def publish(self, container: Container, *, previous: bool) -> None:
        """Let calls that start from now on use a container.

        Args:
            container: The container.
            previous: Whether the values that are live now are kept for an undo.
        """
        before = self._current
        if before is not container:
            self._spare = Spare(before.tensors, before.made)
        self._has_previous = previous
        self._current = container

    def free_spare(self) -> int:
        """Free the set before the live one; return its size in bytes."""
        if self._spare is None:
            return 0
        freed = {id(t): t.nbytes for t in self._spare.tensors.values()}
        for tensor in self._current.tensors.values():
            freed.pop(id(tensor), None)
        self._spare, self._has_previous = None, False
        return sum(freed.values())


class StagedSet:
    """New values in a container that nobody calls; see ``refitkit.protocols.StagedRefit``.

    Attributes:
        container: The container.
    """

    def __init__(
        self, engine: PublishingEngine, container: Container, names: Sequence[str]
    ) -> None:
        """Create the handle; ``PublishingEngine`` calls this.

        Args:
            engine: Engine that made the container.
            container: The container.
            names: Slots with new values.
        """
        self.container = container
        self._engine, self._names = engine, names
        self._before = engine.current

    @property
    def publishes(self) -> bool:
        """Whether calls can go on during the commit; see ``refitkit.protocols.StandsBeside``."""
        return self._engine.publishes

    def commit(self) -> None:
        """Publish the container: one assignment, independent of the size of the weights."""
        self._engine.carry_mutable(self.container, self._names)
        self._engine.publish(self.container, previous=True)

    def rollback(self) -> None:
        """Serve calls from the earlier container, whether or not this one was published."""
        self._engine.publish(self._before, previous=False)

    @property
    def engine(self) -> PublishingEngine:
        """The engine as it will be after the commit: a verifier can read and call it."""
        return self._engine.staged_engine(self.container)

    def discard(self) -> None:
        """Do nothing: the memory goes with this object."""

    def changed(self) -> bool:
        """Return whether any bit differs from the live values."""
        new, old = self.container.tensors, self._before.tensors
        pairs = [(new[name], old[name]) for name in self._names]
        pairs = [(a, b) for a, b in pairs if a is not b]
        # Nearly always a change shows in the first elements of a slot.
        return any(not same_bits(a, b, _PREFIX) for a, b in pairs) or any(
            not same_bits(a, b) for a, b in pairs
        )

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot: an alias."""
        return self.container.tensors[slot]


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


def _holding(container: Container, tensor: torch.Tensor) -> torch.Tensor:
    """Return an alias of a tensor that keeps its container, so that its memory is not reused."""
    alias = tensor.detach()
    alias._refitkit_container = container  # type: ignore[attr-defined]  # noqa: SLF001 - our own
    return alias
