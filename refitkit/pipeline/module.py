"""The handle that users hold: an opened module with its plan, its program and its gate.

A handle and the results of its refits refer to the pipeline that made them by the protocol
``Verbs`` alone, so that nothing here depends on how a refit is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from refitkit.errors import (
    ConfigError,
    EngineError,
    ModuleLostError,
    raise_if_resource,
    raised_as,
)
from refitkit.pipeline.gate import Gate
from refitkit.pipeline.history import WeightState
from refitkit.pipeline.mapping import combined_with_weights
from refitkit.program.ambient import require_data, untraced, verb
from refitkit.protocols import (
    OrdersCalls,
    SharesWeights,
    SupportsReadback,
    SupportsSpareBuffer,
    SupportsWarming,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

    from refitkit.model import KeptWeights, RefitReport, Slot
    from refitkit.pipeline.history import LoadOrigin
    from refitkit.pipeline.repeats import LastMapping
    from refitkit.pipeline.report import ReportDraft
    from refitkit.program import KeptProgram
    from refitkit.protocols import Engine, OpenedModule, SharedMemory
    from refitkit.recipe import RefitPlan

T = TypeVar("T")


class Verbs(Protocol):
    """The verbs of the pipeline that a handle and its results call."""

    def save(self, compiled: CompiledModule, path: str | Path) -> None:
        """Write the module to a path."""

    def with_weights(
        self, compiled: CompiledModule, weights: object, **options: Any
    ) -> CompiledModule:
        """A second module with other weights."""

    def restore(
        self,
        compiled: CompiledModule,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Restore earlier weights of one module."""

    def restore_all(self, modules: Iterable[tuple[CompiledModule, int]]) -> RefitResults:
        """Restore earlier weights of several modules in one transaction."""

    def get_ready(self) -> None:
        """Import what a refit needs."""


class CompiledModule:
    """A compiled model: callable like the model, and refittable.

    Attributes:
        name: Label for events and metrics. It can be set; by default it is the name of the file
            that the module was loaded from, or that of the backend.
        plan: How its slots follow from the model's parameters and buffers; None if it has no plan.
        program: The program that was compiled, without its weights; None if it was not kept.
        base: Weights for ``restore`` to read, in any form that ``refit`` takes. If it is set,
            no copies of the first weights are kept. The user guarantees that they are the weights
            that the module was compiled or loaded with.
        origin: The file or folder that it was loaded from, which ``restore`` can open again. None
            if it was compiled or copied.
        target: The object that it was loaded from; None if it was loaded from a file, or compiled.
        gate: Decides who may use the weights.
        last_mapping: How the last refit gave each slot its value, for the next one like it.
    """

    def __init__(
        self,
        opened: OpenedModule,
        plan: RefitPlan | None,
        program: KeptProgram | None,
        verbs: Verbs,
    ) -> None:
        """Called by ``refitkit.compile`` and ``refitkit.load``, not by users."""
        self.name = opened.backend
        self.plan = plan
        self.program = program
        self.base: object = None
        self.origin: LoadOrigin | None = None
        self.target: object = None
        self.gate = Gate()
        self.last_mapping: LastMapping | None = None
        self._state = WeightState()
        self._opened = opened
        self._verbs = verbs

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs. Calls wait from a commit to its verdict.

        Raises:
            InputMismatchError: The inputs are not those that the model was compiled for.
            ModuleLostError: A rollback failed earlier.
        """
        # under FakeTensorMode the outputs would have no data
        require_data("The module")
        try:
            return self.gate.call(lambda: self._opened.run(args, kwargs))
        except MemoryError as exc:
            raise_if_resource(exc, "The module cannot be called")
            raise

    @untraced
    def run_as_call(self, do: Callable[[], T]) -> T:
        """The result of a function that uses the weights as a call of the module does.

        Replay a CUDA graph that has captured a call so: ``compiled.run_as_call(graph.replay)``. No
        refit commits while the function runs, or while what it launched on the current stream does.

        Raises:
            ModuleLostError: A rollback failed earlier.
        """
        opened = self._opened
        if isinstance(opened, OrdersCalls):
            return self.gate.call(lambda: opened.ordered(do))
        return self.gate.call(do)

    def __repr__(self) -> str:
        slots = sum(len(engine.slots) for engine in self.engines.values())
        return f"<CompiledModule {self.backend}, {slots} slots, weights version {self.version}>"

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse pickling and the module ``copy``: a handle holds machine code and engines.

        Raises:
            TypeError: Always; says what to do instead.
        """
        raise TypeError(
            "A CompiledModule can be neither pickled nor copied with the module copy. To keep it: "
            "compiled.save(path), and refitkit.load(path). For a second one with other weights: "
            "refitkit.refit(compiled, weights, copy=True)."
        )

    @property
    def opened(self) -> OpenedModule:
        """The opened module of the backend."""
        return self._opened

    @property
    def state(self) -> WeightState:
        """The facts about the weights that it holds, and the ways back to earlier ones."""
        shared = self.shared
        if shared is None or shared.version == self._state.version:
            return self._state
        overridden = frozenset() if self.plan is None else combined_with_weights(self.plan)
        slots = (slot.key for slot in self.slots)
        return self._state.elsewhere(shared.version, slots, overridden)

    @state.setter
    def state(self, state: WeightState) -> None:
        self._state = state

    @property
    def shared(self) -> SharedMemory | None:
        """The memory that the module shares with other processes; None if its weights are its own.

        Pass it to another process through ``multiprocessing``, and there to ``refitkit.load``.
        """
        return self._opened.shared if isinstance(self._opened, SharesWeights) else None

    @verb("The weights cannot be shared")
    def share(self) -> SharedMemory:
        """Move the weights to memory that this process shares with others, and return that.

        Processes that are forked from now on serve from it, and so do those that load the module
        with ``refitkit.load(path, shared=...)``. A refit in one of them is a refit in all. Others
        use the new weights from their next call on, and ``version`` says so. Hooks are called in
        the process of the refit only, and only that process can undo it.

        Raises:
            ConfigError: Processes cannot share these weights; says why.
            ResourceError: The system refused the memory.
        """
        opened = self._opened
        if not isinstance(opened, SharesWeights):
            raise ConfigError(f"Modules of {self.backend!r} cannot share their weights.")
        return self.gate.refit(lambda: opened.share(self.version))

    @property
    def version(self) -> int:
        """Version of the weights: 0 as compiled or loaded, one more with every committed refit."""
        shared = self.shared
        return self._state.version if shared is None else shared.version

    @property
    def pipeline(self) -> Verbs:
        """The pipeline that opened the module."""
        return self._verbs

    @property
    def label(self) -> str:
        """The caller's name of the weights that are live; empty if they have none.

        A receiver of updates gives it, saved modules keep it, and ``undo`` and ``restore`` bring
        the label of then back. Other refits clear it.
        """
        return self.state.label

    @property
    def kept(self) -> tuple[KeptWeights, ...]:
        """Earlier weights that ``restore`` can restore, and the bytes that keeping them costs."""
        origin = self.origin if self._is_read_from_origin else None
        return self.state.history.restorable(
            origin, self._opened, has_named_base=self.base is not None
        )

    @property
    def _is_read_from_origin(self) -> bool:
        """Whether the file is unchanged, and its engines can be read for the written slots."""
        if self.origin is None or not self.origin.is_unchanged():
            return False
        # a slot that no refit wrote still holds its first value, so nobody reads it
        written = {name for name, _ in self.state.history.written}
        return all(isinstance(self.engines[name], SupportsReadback) for name in written)

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self._opened.backend

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by name."""
        return self._opened.engines

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots of all engines."""
        return tuple(slot for engine in self.engines.values() for slot in engine.slots.values())

    @verb("The slot cannot be read")
    def read(self, slot: str, engine: str | None = None) -> torch.Tensor:
        """A copy of the value that a slot holds now.

        Args:
            slot: Name of the slot.
            engine: Name of the engine; not needed if there is only one.

        Raises:
            KeyError: There is no such slot, or its engine cannot be read.
        """
        for name, one in self.engines.items():
            if engine in {None, name} and slot in one.slots and isinstance(one, SupportsReadback):
                # copied inside the gate: after it, a refit may write to the engine's memory
                return self.gate.call(partial(_copy_of, one, slot))
        raise KeyError(slot)

    @verb("The module cannot be saved")
    def save(self, path: str | Path) -> None:
        """Write the module with its present weights, plan and program.

        It is written beside ``path`` and then renamed, so a file there is replaced whole.

        Raises:
            ModuleLostError: A rollback failed earlier, so its weights are unknown.
            RefitError: The path cannot be written; says why.
        """
        self._verbs.save(self, path)

    def restore(
        self,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Restore earlier weights: those that it was compiled or loaded with, or later ones.

        See :meth:`refitkit.Pipeline.restore`.
        """
        return self._verbs.restore(self, version, inputs=inputs, reference=reference, verify=verify)

    def with_weights(self, weights: object, **options: Any) -> CompiledModule:
        """A second module with other weights. It shares the compiled code.

        With ``partial=True``, weights that are not given are shared, too, if the engine can. The
        modules are refitted, saved and freed on their own.

        Args:
            weights: The weights, as for :meth:`refitkit.Pipeline.refit`.
            **options: Arguments of :meth:`refitkit.Pipeline.refit`, such as ``donate``.

        Raises:
            RefitError: As :meth:`refitkit.Pipeline.refit` raises it.
        """
        return self._verbs.with_weights(self, weights, **options)

    @verb("The kept weights cannot be freed")
    def forget(self) -> int:
        """Free the copies of earlier weights, and return the number of freed bytes.

        Afterwards ``restore`` reads ``base`` or the file that the module was loaded from.
        """
        # as a refit: the end of a running refit would replace the new state by its own
        return self.gate.refit(self._forget)

    def _forget(self) -> int:
        before = self.state.history
        # if no slot was ever written, there are no copies to lose
        lost = before.base_lost or ("forget() freed them" if before.written else "")
        history = replace(before, records=(), base={}, base_lost=lost)
        self.state = replace(self.state, history=history)
        return before.nbytes

    @verb("The module cannot be warmed up")
    def warm(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Do the work now that would make the first refit slow. Weights and outputs do not change.

        Args:
            progress: Called with one line of text for each step. An engine can take seconds.

        Raises:
            EngineError: An engine failed; the module answers as before.
            ModuleLostError: An engine failed and could not recover; the module refuses calls.
        """
        self._verbs.get_ready()
        # calls wait, too: some engines warm up by a refit of the live weights
        self.gate.refit(lambda: self.gate.exclusive(lambda: self._warm_all(progress)))

    def _warm_all(self, progress: Callable[[str], None]) -> None:
        for name, engine in self.engines.items():
            if isinstance(engine, SupportsWarming):
                self._warm(name, engine, progress)

    def _warm(self, name: str, engine: SupportsWarming, progress: Callable[[str], None]) -> None:
        try:
            with raised_as(EngineError, f"The engine {name!r} failed to warm up"):
                engine.warm(progress)
        except ModuleLostError as exc:
            self.gate.poison(exc)
            raise

    @verb("The second sets of weights cannot be freed")
    def free_spare(self) -> int:
        """Free the engines' second sets of weights, and return the number of freed bytes.

        The next refit allocates them again. The last refit cannot be undone from them any more.
        """
        # as a refit: a running refit stages its values in that memory
        return self.gate.refit(self._free_spare)

    def _free_spare(self) -> int:
        engines = self.engines.values()
        return sum(e.free_spare() for e in engines if isinstance(e, SupportsSpareBuffer))


def alone(modules: Iterable[CompiledModule]) -> list[Callable[[Callable[[], T]], T]]:
    """How modules that processes share are entered, so that no other process refits them."""
    found = {one.shared.key: one.shared.refit for one in modules if one.shared is not None}
    # one order everywhere, so that two processes never wait for one another
    return [found[key] for key in sorted(found)]


def _copy_of(engine: SupportsReadback, slot: str) -> torch.Tensor:
    return engine.read(slot).clone()


@dataclass(frozen=True)
class RefitResult:
    """The result of one refit.

    Attributes:
        module: The refitted module: the given one, or a second one with ``copy=True``.
        draft: The facts for the report.
        pipeline: The pipeline that did the refit and can undo it.
    """

    module: CompiledModule
    draft: ReportDraft = field(repr=False)
    pipeline: Verbs = field(repr=False, compare=False)

    @property
    def report(self) -> RefitReport:
        """The report of the refit, made when it is first asked for."""
        return self.draft.committed

    def undo(self, **options: Any) -> RefitResult:
        """Restore the weights from before this refit, if they are still held.

        Later refits are undone with it.

        Args:
            **options: ``inputs``, ``reference`` and ``verify``, as for
                :meth:`refitkit.Pipeline.restore`.

        Raises:
            RefitError: As :meth:`refitkit.Pipeline.restore` raises it.
        """
        return self.pipeline.restore(self.module, self.draft.before, **options)


class RefitResults(tuple[RefitResult, ...]):
    """The results of refitting several modules in one transaction, in their order."""

    __slots__ = ()

    def undo(self) -> RefitResults:
        """Restore the weights from before the refit in all modules, or in none.

        Raises:
            RefitError: As :meth:`refitkit.Pipeline.restore` raises it.
        """
        earlier = [(result.module, result.draft.before) for result in self]
        # a transaction of no modules has no results, and so no pipeline
        return self[0].pipeline.restore_all(earlier) if self else self
