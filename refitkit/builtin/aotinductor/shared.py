"""Serve many processes from one set of weights, in memory that they share; Linux only.

``SharedEngine`` serves calls of one process. The memory is ``SharedWeights``.
"""

from __future__ import annotations

import copy
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.aotinductor.engine import AOTInductorEngine, LibraryEngine, any_differs, write
from refitkit.builtin.aotinductor.native import Container, Turns
from refitkit.builtin.aotinductor.publishing import PublishingEngine, like
from refitkit.builtin.aotinductor.shared_memory import SETS, SharedWeights, layout_of
from refitkit.errors import ConfigError, Problem, WeightMismatchError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from refitkit.builtin.aotinductor.native import Answer, Library
    from refitkit.builtin.aotinductor.shared_memory import Description
    from refitkit.protocols import SlotValue


def sharing(engine: AOTInductorEngine, version: int) -> SharedEngine:
    """Return an engine that serves the same weights from new shared memory.

    Args:
        engine: The engine of a module that no refit changes meanwhile.
        version: Version of its weights.

    Raises:
        ConfigError: The engine cannot share its weights; says why.
        ResourceError: The system refused the memory.
    """
    able = _shareable(engine)
    return SharedEngine(able.library, SharedWeights.holding(able.values(), version), able.models)


def serving_from(engine: AOTInductorEngine, shared: object) -> SharedEngine:
    """Return an engine of the same library that serves from memory of another process.

    Args:
        engine: The engine of a module that was just loaded.
        shared: A ``SharedWeights``.

    Raises:
        ConfigError: The engine cannot share weights, or ``shared`` is something else.
        WeightMismatchError: The memory has other slots; lists all differences.
    """
    able = _shareable(engine)
    if not isinstance(shared, SharedWeights):
        raise ConfigError(
            f"shared= must be shared weights, and is a {type(shared).__name__}.",
            hint="Pass the result of compiled.share() in another process.",
        )
    mine = layout_of(able.live)
    problems = [
        Problem(name, "layout", _text(shared.layout.get(name)), _text(mine.get(name)))
        for name in sorted(mine.keys() | shared.layout)
        if mine.get(name) != shared.layout.get(name)
    ]
    if problems:
        raise WeightMismatchError(
            "The shared weights belong to another module.",
            problems=problems,
            hint="Load the file whose module shares them.",
        )
    return SharedEngine(able.library, shared, able.models)


def _text(layout: Sequence[Any] | None) -> str:
    if layout is None:
        return "no such slot"
    dtype, shape, strides = layout
    return f"{dtype} {tuple(shape)}, strides {tuple(strides)}"


def _shareable(engine: AOTInductorEngine) -> PublishingEngine:
    """Return the engine if several processes can serve from its weights."""
    why = ""
    if not isinstance(engine, PublishingEngine):
        why = engine.binding or "its weights are shared already"
    elif not engine.publishes:
        why = "calls of this model write to its buffers"
    elif any(slot.device != "cpu" for slot in engine.slots.values()):
        why = "they are not on the CPU"
    if why or not isinstance(engine, PublishingEngine):
        raise ConfigError(
            f"Processes cannot share these weights: {why}.", hint="Load it in each process."
        )
    return engine


class SharedEngine(LibraryEngine):
    """An engine that serves from shared weights; see ``refitkit.protocols.Engine``.

    Attributes:
        shared: The weights.
    """

    def __init__(self, library: Library, shared: SharedWeights, models: int = 1) -> None:
        """Serve from the live set.

        Args:
            library: The model's library.
            shared: Weights with the slots and the layouts of the library.
            models: How many calls are served side by side.
        """
        self.shared = shared
        self._sets = [shared.tensors(index) for index in range(SETS)]
        self._fixed: int | None = None  # the set to serve from, if it is not the live one
        super().__init__(library, self._sets[0], (), models)
        self._containers: dict[int, Container] = {}
        self._descriptions: list[Description] = []  # those that no call uses now
        self._abandoned: list[Container] = []
        _engines.add(self)

    @property
    def _live(self) -> int:
        return self.shared.live if self._fixed is None else self._fixed

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """The tensors that calls read, by slot. Refits of other processes may replace them."""
        return self._sets[self._live]

    @property
    def publishes(self) -> bool:
        """Whether calls can go on while new weights become live: always."""
        return True

    @property
    def route(self) -> tuple[str, str]:
        """See the base class."""
        return "shared-memory", ""

    # -- calls --------------------------------------------------------------------------------

    def _call_now(self, tensors: Sequence[torch.Tensor]) -> Answer:
        if self._fixed is not None:
            return self._container(self._fixed).run(tensors)
        try:
            description = self._descriptions.pop()
        except IndexError:  # all are in use
            description = self.shared.description()
        try:
            return self._container(self.shared.enter(description)).run(tensors)
        finally:
            description.release()
            # After an interrupt before this line, the lock goes with the last reference to it.
            self._descriptions.append(description)

    def _container(self, index: int) -> Container:
        found = self._containers.get(index)
        if found is None:
            found = Container(self._library, self._sets[index], self._models)
            self._containers[index] = found
        return found

    def serve(self, models: int) -> None:
        """Serve several calls side by side from now on."""
        self._models, self._containers = models, {}
        self._turns = Turns(models)

    def forked(self) -> None:
        """Make new containers: calls of the parent's threads will never leave the old ones."""
        self._abandoned += self._containers.values()
        self._containers = {}

    # -- reading ------------------------------------------------------------------------------

    def _aliases(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See the base class. Their memory stays as it is while they exist."""
        if self._fixed is not None or self.shared.is_refitting:
            live = self.live
            return {name: live[name] for name in names}
        hold, found = self.shared.hold(), {}
        for name in names:
            alias = self._sets[hold.index][name].detach()
            alias._refitkit_hold = hold  # type: ignore[attr-defined]  # noqa: SLF001 - our own
            found[name] = alias
        return found

    def held(self) -> dict[str, torch.Tensor]:
        """Return what the container of the live set itself has as its weights, by slot."""
        return self._container(self._live).held()

    def sibling(self) -> PublishingEngine:
        """Return an engine of its own, with copies of the weights in memory of this process."""
        tensors = {name: like(t).copy_(t) for name, t in self.values().items()}
        engine = PublishingEngine.owning(self._library, tensors, ())
        engine.serve(self._models)
        return engine

    # -- staging ------------------------------------------------------------------------------

    def _stage(self, values: Sequence[SlotValue]) -> StagedShared:
        writer = self.shared.writer()
        index = self.shared.take(writer)
        tensors, live = self._sets[index], self.live
        names = [value.slot.name for value in values]
        with torch.no_grad():
            for value in values:
                write(tensors[value.slot.name], value)
            for name in self._slots.keys() - set(names):
                tensors[name].copy_(live[name])
        return StagedShared(self, writer, index, names)

    def stage_over(self, values: Sequence[SlotValue]) -> Any:
        """Stage like ``stage_partial``: live weights that other processes read are not changed."""
        return self.stage_partial(values)

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the set before the last commit of any process, unless it was written to since."""
        index = self.shared.previous()
        return {} if index is None else self._sets[index]

    def free_spare(self) -> int:
        """Free the sets that no process uses; return their size in bytes."""
        return self.shared.refit(self.shared.free_spare)

    def staged_engine(self, index: int) -> SharedEngine:
        """Return this engine as it would be with another set live, for a verifier."""
        engine = copy.copy(self)
        engine._fixed, engine._turns = index, Turns(1)  # noqa: SLF001 - a copy of this object
        return engine

    def tensors_of(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a set, by slot."""
        return self._sets[index]


_engines: weakref.WeakSet[SharedEngine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in tuple(_engines):
        engine.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


class StagedShared:
    """New values in a set that nobody serves from; see ``refitkit.protocols.StagedRefit``."""

    def __init__(
        self, engine: SharedEngine, writer: Description, index: int, names: Sequence[str]
    ) -> None:
        """Create the handle; ``SharedEngine`` calls this.

        Args:
            engine: Engine that staged the set.
            writer: Has the locks of the refit.
            index: Number of the set.
            names: Slots with new values.
        """
        self._engine, self._writer, self._index, self._names = engine, writer, index, names
        self._shared = engine.shared
        self._before, self._version = self._shared.live, self._shared.version

    def commit(self) -> None:
        """Publish the set: one store, independent of the size of the weights.

        Raises:
            EngineError: This process was forked off the one that staged the set.
        """
        self._writer.require_own()
        # from here on calls of all processes may lock it
        self._writer.lock(1 + self._index)
        self._shared.publish(self._index, self._version + 1)

    def rollback(self) -> None:
        """Serve calls from the earlier set, whether or not this one was published."""
        if self._writer.is_open:
            self._shared.drop(self._index)
            self._shared.publish(self._before, self._version)

    @property
    def engine(self) -> SharedEngine:
        """The engine as it will be after the commit: a verifier can read and call it."""
        return self._engine.staged_engine(self._index)

    def discard(self) -> None:
        """Do nothing: the set counts as empty, and its lock goes with the refit."""

    def changed(self) -> bool:
        """Return whether any bit differs from the live values."""
        new, old = self._engine.tensors_of(self._index), self._engine.tensors_of(self._before)
        return any_differs([(new[name], old[name]) for name in self._names])

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot: an alias."""
        return self._engine.tensors_of(self._index)[slot]
