"""The handle that users hold: an opened module, its plan, its program, and its gate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from refitkit.errors import EngineError, ModuleLostError, raise_if_resource, raised_as
from refitkit.pipeline.gate import Gate
from refitkit.pipeline.held import WeightState
from refitkit.program.ambient import plain, require_data, untraced, verb
from refitkit.protocols import SupportsReadback, SupportsSpareBuffer, SupportsWarming

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from refitkit.model import KeptWeights, Slot
    from refitkit.pipeline.origin import LoadOrigin
    from refitkit.pipeline.result import RefitResult
    from refitkit.program import KeptProgram
    from refitkit.protocols import Engine, OpenedModule
    from refitkit.recipe import RefitPlan


class Verbs(Protocol):
    """What a module asks of the pipeline that made it."""

    def save(self, compiled: CompiledModule, path: str | Path) -> None:
        """Write it."""

    def restore(
        self,
        compiled: CompiledModule,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Go back to earlier weights."""


class CompiledModule:
    """A compiled model: callable like the model, and refittable.

    Attributes:
        plan: How its slots follow from the model's state; None where nobody made one.
        program: The program that was compiled, without its weights; None where it was not kept.
        base: Weights to go back to, as ``refit`` takes them: a path, say. Where it is set,
            ``restore`` reads it, and no copies of the first weights are kept. It is for the user to
            know that they are those that the module was compiled or loaded with.
        origin: The file or folder that it was loaded from: ``restore`` opens that again. None: it
            was compiled, or copied.
        target: The object that it was loaded from; None: it was loaded otherwise, or compiled.
        held: What is known of the weights that it holds, and held before.
    """

    def __init__(
        self,
        opened: OpenedModule,
        plan: RefitPlan | None,
        program: KeptProgram | None,
        verbs: Verbs,
    ) -> None:
        """Made by ``refitkit.compile`` and ``refitkit.load``."""
        self.plan = plan
        self.program = program
        self.base: object = None
        self.origin: LoadOrigin | None = None
        self.target: object = None
        self.held = WeightState()
        self.gate = Gate()
        self._opened = opened
        self._verbs = verbs

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer like the model; from a commit to its verdict, calls wait.

        Raises:
            InputMismatchError: The inputs are not those that the model was compiled for.
            ModuleLostError: A rollback failed earlier.
        """
        require_data("The module")
        try:
            return self.gate.call(lambda: self._opened.run(args, kwargs))
        except MemoryError as exc:
            raise_if_resource(exc, "The module cannot be called")
            raise

    def __repr__(self) -> str:
        slots = sum(len(engine.slots) for engine in self.engines.values())
        return f"<CompiledModule {self.backend}, {slots} slots, weights version {self.version}>"

    def __reduce_ex__(self, protocol: object) -> Any:
        """Neither pickled nor copied by ``copy``: it holds machine code, and engines in memory.

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
        """What the backend handed over."""
        return self._opened

    @property
    def version(self) -> int:
        """Number of the weights that it holds: 0 as compiled or loaded, then always counting up."""
        return self.held.version

    @property
    def kept(self) -> tuple[KeptWeights, ...]:
        """Earlier weights that ``restore`` can bring back, and what keeping them costs."""
        origin = self.origin if self._is_read_from_origin else None
        named = self.base is not None
        return self.held.history.shown(origin, self._opened, named=named)

    @property
    def _is_read_from_origin(self) -> bool:
        """Whether what it was loaded from is as it was, and tells what was written over."""
        if self.origin is None or not self.origin.is_unchanged():
            return False
        written = {name for name, _ in self.held.history.written}
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
        """A copy of what a slot holds now.

        Args:
            slot: Name of the slot.
            engine: Name of the engine; not needed where there is one.

        Raises:
            KeyError: There is no such slot, or its engine cannot be read.
        """
        for name, one in self.engines.items():
            if engine in {None, name} and slot in one.slots and isinstance(one, SupportsReadback):
                return self.gate.call(partial(_copy_of, one, slot))
        raise KeyError(slot)

    @verb("The module cannot be saved")
    def save(self, path: str | Path) -> None:
        """Write it with its present weights, plan and program: beside ``path``, then renamed.

        Raises:
            ModuleLostError: A rollback failed earlier: nobody knows its weights.
            RefitError: It cannot be written there; says why.
        """
        self.gate.call(lambda: self._verbs.save(self, path))

    def restore(
        self,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Go back to earlier weights: those that it was compiled or loaded with, or later ones.

        See :meth:`refitkit.Pipeline.restore`.
        """
        return self._verbs.restore(self, version, inputs=inputs, reference=reference, verify=verify)

    @plain
    def forget(self) -> int:
        """Free the copies that are kept of earlier weights; returns their bytes.

        ``restore`` reads ``base``, or the file it was loaded from, afterwards, or refuses.
        """
        return self.gate.refit(self._forget)

    def _forget(self) -> int:
        before = self.held.history
        lost = before.base_lost or ("forget() freed them" if before.written else "")
        history = replace(before, records=(), base={}, base_lost=lost)
        self.held = replace(self.held, history=history)
        return before.nbytes

    @plain
    def warm(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Do now what would make the first refit slow. Weights and answers do not change.

        Args:
            progress: Called with one line of text for each step. An engine can take seconds.

        Raises:
            EngineError: An engine failed; it answers as before.
            ModuleLostError: An engine failed and could not go back; the module refuses calls.
        """
        self.gate.refit(lambda: self.gate.alone(lambda: self._warm_all(progress)))

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

    @plain
    def free_spare(self) -> int:
        """Free what engines keep of the weights before the last refit; returns its bytes.

        The next refit allocates it again.
        """
        return self.gate.refit(self._free_spare)

    def _free_spare(self) -> int:
        engines = self.engines.values()
        return sum(e.free_spare() for e in engines if isinstance(e, SupportsSpareBuffer))


def _copy_of(engine: SupportsReadback, slot: str) -> torch.Tensor:
    return engine.read(slot).clone()
