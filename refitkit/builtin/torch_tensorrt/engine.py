"""A TensorRT engine as refitkit's engine: what both runtimes have in common.

In the Python runtime the live engine is refitted in place (``inplace.py``); the C++ runtime keeps
its engine to itself, so a second one is refitted, serialized and put in its place (``shadow.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import refitter as serialized
from refitkit.builtin.torch_tensorrt import weight_buffers
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter, current
from refitkit.builtin.torch_tensorrt.weight_buffers import Copies, Layout, Uploader, WeightSets
from refitkit.errors import (
    EngineError,
    ModuleLostError,
    NotRefittableError,
    Problem,
    WeightMismatchError,
)
from refitkit.model import EngineMemory, Slot
from refitkit.recipe import Overwriting
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from refitkit.builtin.torch_tensorrt.children import EngineHandle
    from refitkit.builtin.torch_tensorrt.refitter import WeightFact
    from refitkit.builtin.torch_tensorrt.weight_buffers import Keep
    from refitkit.protocols import SideBySide, SlotValue, StagedRefit


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is refitted.

    Attributes:
        device: Where the engine runs.
        known: What is known of its slots, by name; see ``PersistentRefitter.facts``.
        keep: Where the weights from before a refit are kept.
        check_finite: Whether new values must be finite where the live ones are known to be.
    """

    device: torch.device
    known: Mapping[str, Slot]
    keep: Keep = "device"
    check_finite: bool = True


class RefitterEngine:
    """One TensorRT engine; see ``refitkit.protocols.Engine``. Subclasses know its runtime.

    Its live weights are what was last given to it: whoever refits the engine in another way has to
    open it again before refitting it in part.
    """

    def __init__(self, handle: EngineHandle, trt: Any, options: EngineOptions) -> None:
        """Touch nothing yet: the refitter is made when it is first needed.

        Args:
            handle: The engine in its target.
            trt: The package ``tensorrt``.
            options: How it is refitted.
        """
        self.handle = handle
        self._trt = trt
        self._options = options
        self._uploader = Uploader(options.device)
        self._refitter: PersistentRefitter | None = None
        self._facts: dict[str, WeightFact] | None = None
        self._slots: dict[str, Slot] | None = None
        self._sets: WeightSets | None = None

    # -- what it is -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the child that it is."""
        return self.handle.name

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._options.device

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights, by the names that TensorRT has for them."""
        facts = self.facts
        if self._slots is None:
            self._slots = {name: self._slot(fact) for name, fact in sorted(facts.items())}
        return self._slots

    def _slot(self, fact: WeightFact) -> Slot:
        return Slot(
            engine=self.name,
            name=fact.name,
            dtype=fact.dtype,
            shape=fact.shape,
            count=fact.count,
            device=str(self.device),
        )

    @property
    def facts(self) -> Mapping[str, WeightFact]:
        """What the engine asks of each weight."""
        refitter = self._ready_refitter()
        if self._facts is None:
            self._facts = refitter.facts(self._options.known)
        return self._facts

    @property
    def memory(self) -> EngineMemory:
        """The second set of weights; engine bytes where nobody knows the live weights."""
        if self._sets is None or not self._sets.known:
            size = len(self.handle.engine_bytes())
            return EngineMemory(engine=self.name, kind="engine-bytes", bytes=size)
        return EngineMemory(engine=self.name, kind=self._options.keep, bytes=self._sets.nbytes)

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The cached map of torch-tensorrt 2.11 and 2.12; see ``name_map.HasNameMap``."""
        found: Mapping[str, Any] | None = self.handle.weight_name_map
        return found

    @property
    def knows_live(self) -> bool:
        """Whether the live weights are known: from a refit, or from ``adopt``."""
        return self._sets is not None and self._sets.known

    def remembered(self, slot: str) -> torch.Tensor | None:
        """What was last given to a slot: an alias; None while nobody knows it."""
        return self._sets.known_value(slot) if self._sets is not None else None

    def staged(self, slot: str) -> torch.Tensor:
        """What the staging set holds for a slot: an alias."""
        return self.sets.staging.tensors[slot]

    def side_by_side(self) -> SideBySide | None:
        """Both sets as they lie in memory; None while nobody knows the live values."""
        return self.sets.side_by_side()

    def previous(self) -> Mapping[str, torch.Tensor]:
        """What was given before the last refit, copied when asked for: staging overwrites it."""
        values = self._sets.previous() if self._sets is not None else {}
        return Copies(values, lambda name: values[name].clone())

    # -- for subclasses ---------------------------------------------------------------------

    def _engine(self) -> Any:
        """The ``ICudaEngine`` to refit."""
        raise NotImplementedError

    def _staged(self) -> StagedRefit:
        """What becomes of the staging set, which is filled."""
        raise NotImplementedError

    def _rehearse(self) -> str:
        """Refit to what the engine holds anyway; why that is impossible, else nothing."""
        raise NotImplementedError

    # -- the refitter and its buffers -------------------------------------------------------

    def _ready_refitter(self) -> PersistentRefitter:
        """The one refitter; another one only where somebody has put another engine in place."""
        engine = self._engine()
        if self._refitter is None or self._refitter.engine is not engine:
            self.forget()
            self._refitter = PersistentRefitter(engine, self._trt, self.device)
        return self._refitter

    @property
    def sets(self) -> WeightSets:
        """The two sets of weights; the refitter is bound to the first."""
        refitter = self._ready_refitter()
        if self._sets is None:
            layout = Layout.of(self.facts.values())
            sets = WeightSets(layout, self.device, self._options.keep)
            refitter.bind(self.facts, sets.staging.views)
            self._sets = sets
        return self._sets

    def forget(self) -> None:
        """Let the refitter and all buffers go, and with them what the live weights are."""
        self._refitter = self._facts = self._slots = self._sets = None

    def refit(self, *, idle: bool = False) -> None:
        """Give the engine what the staging set holds.

        Args:
            idle: Whether no call of the engine can be pending.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture.
        """
        if self._refitter is None or self._sets is None:
            raise EngineError(f"The engine {self.name!r} has lost its refitter.")
        self._refitter.refit(idle=idle)

    # -- staging ----------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for all slots into the staging set."""
        return self._stage(values, partial=False)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for some slots into the staging set; the others keep theirs.

        Raises:
            NotRefittableError: Nobody knows what the others hold.
        """
        self._ready_refitter()
        if not self.knows_live:
            raise self._unknown()
        return self._stage(values, partial=True)

    def _stage(self, values: Sequence[SlotValue], *, partial: bool) -> StagedRefit:
        require_values(self.facts, values, partial=partial)
        sets = self.sets
        sets.begin(partial=partial)
        self._fill(values)
        if self._options.check_finite:
            self._check_finite(sets)
        return self._staged()

    def _fill(self, values: Sequence[SlotValue]) -> None:
        """Copy values into the staging set."""
        weight_buffers.fill(self.sets.staging, self.facts, values, self._uploader)

    def _unknown(self) -> NotRefittableError:
        return NotRefittableError(
            f"Nobody knows the present weights of the engine {self.name!r}: TensorRT cannot be "
            "asked for them.",
            hint="Refit it fully once; after that it can be refitted in part.",
        )

    def _check_finite(self, sets: WeightSets) -> None:
        problems = [
            Problem(
                name,
                "non-finite",
                f"{count} elements",
                "finite, as the present ones are",
                "to allow it: check_finite=False in the config",
            )
            for name, count in sets.spoilt()
        ]
        if problems:
            raise WeightMismatchError("New weights are not finite.", problems=problems)

    def adopt(self, values: Sequence[SlotValue]) -> None:
        """Take over what the engine is known to hold, because it was built from it.

        Args:
            values: The live value of every slot.

        Raises:
            WeightMismatchError: They are not values of this engine.
        """
        require_values(self.facts, values)
        sets = self.sets
        sets.live = None
        self._fill(values)
        sets.live = "staging"

    # -- warming and freeing ----------------------------------------------------------------

    def warm(self, progress: Callable[[str], None]) -> None:
        """Make the refitter and its buffers, and have it compile what it needs.

        Args:
            progress: Called with one line of text for each step.

        Raises:
            EngineError: TensorRT failed; the engine is as before.
        """
        sets = self.sets
        progress(f"{self.name}: {len(self.facts)} weights, {sets.nbytes} bytes")
        why_not = self._rehearse()
        progress(f"{self.name}: {why_not or 'the refitter is warm'}")

    def free_spare(self) -> int:
        """Free the second set; the first one stays, as only it knows the live weights."""
        return self._sets.free_base() if self._sets is not None else 0


# MERGED inplace: Engines of the Python runtime: the live engine is refitted in place.

_UNKNOWN = "its weights are not known, so its first refit still compiles for seconds"


class InPlaceEngine(RefitterEngine):
    """A live ``ICudaEngine`` with its refitter."""

    _stale = False  # whether the stored bytes hold other weights than the live engine
    _mixed = False  # whether the live engine may hold a mixture of weights

    def _engine(self) -> Any:
        return self.handle.cuda_engine()

    def _staged(self) -> StagedInPlace:
        before = None if self.knows_live else self.handle.engine_bytes()
        return StagedInPlace(self, before)

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Free the base set; the commit fills the staging set and refits the live engine."""
        self._ready_refitter()
        partial = len(values) < len(self.facts)
        if partial and not self.knows_live:
            raise self._unknown()
        require_values(self.facts, values, partial=partial)
        self.sets.free_base()
        return Overwriting(lambda: self._write_over(values))

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        self.sets.live = None
        self._fill(values)
        self.write(idle=True)

    def _rehearse(self) -> str:
        if not self.knows_live:
            return _UNKNOWN
        self.sets.begin(partial=True)
        staged = StagedInPlace(self, None)
        try:
            self.write(idle=False)
        except BaseException as exc:
            _take_back(staged, exc)
            raise
        return ""

    def write(self, *, idle: bool) -> None:
        """Refit the live engine to the staging set.

        Args:
            idle: Whether no call of it can be pending.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture.
        """
        self._mixed = True
        self.handle.on_stale(self._flush)
        self.handle.drop_captured()
        self.refit(idle=idle)
        self.sets.settle()
        self._stale, self._mixed = True, False

    def write_back(self, before: bytes | None, *, stale: bool) -> None:
        """Have the live engine hold what it held before.

        Args:
            before: Engine bytes from before; None: the base set has the weights.
            stale: Whether the stored bytes were stale before.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture.
        """
        self._mixed = True
        self.handle.drop_captured()
        if before is None:
            self.sets.restore()
            self.refit()
            self.sets.live = "staging"
        else:
            self.forget()
            self.handle.on_stale(None)  # the stored bytes are those from before, and stay
            self.handle.replace(before)
            stale = False
        self.handle.on_stale(self._flush if stale else None)
        self._stale, self._mixed = stale, False

    @property
    def stale(self) -> bool:
        """Whether the stored bytes hold other weights than the live engine."""
        return self._stale

    def forget(self) -> None:
        """Let all go; the engine that is in place now is the one that is stored."""
        super().forget()
        self._stale = False

    def _flush(self) -> bytes:
        if self._mixed:
            raise EngineError(
                f"The engine {self.name!r} may hold a mixture of weights: it cannot be stored.",
                hint="Load or compile it again.",
            )
        data = serialized.bytes_of(self.handle.cuda_engine(), self._trt)
        self._stale = False
        return data


class StagedInPlace:
    """New values in the staging set, on their way into the live engine."""

    def __init__(self, engine: InPlaceEngine, before: bytes | None) -> None:
        """Made by ``InPlaceEngine``."""
        self._engine = engine
        self._before = before
        self._stale = engine.stale

    def commit(self) -> None:
        """Refit to the staging set; the pipeline has waited for all calls."""
        self._engine.write(idle=True)

    def rollback(self) -> None:
        """Refit to the base set, or put the engine from before back."""
        self._engine.write_back(self._before, stale=self._stale)

    def discard(self) -> None:
        """Leave the staging set as it is: the live values are aside."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None while those are not known."""
        return self._engine.sets.changed()

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias, valid until the next refit is staged."""
        return self._engine.staged(slot)

    def side_by_side(self) -> SideBySide | None:
        """Live and new values as they lie in memory; None while the live ones are not known."""
        return self._engine.side_by_side()


def _take_back(staged: StagedInPlace, cause: BaseException) -> None:
    try:
        staged.rollback()
    except BaseException as exc:
        lost = ModuleLostError(
            f"Warming up failed half-way, and so did the way back: {exc}",
            hint="Load or compile the module again.",
        )
        lost.add_note(f"It failed because of: {type(cause).__name__}: {cause}")
        raise lost from exc


# MERGED shadow: Engines of the C++ runtime: a second engine is refitted, serialized, and put in
# place.
#
# The C++ runtime lends its engine to nobody. So an engine of our own, made from the same bytes,
# is refitted and serialized, and the runtime makes a third one of that, all while the live one
# goes on serving. The transaction only puts that in place, and the one from before back. Our own
# keeps its refitter, so that later refits pay for serializing and deserializing only. What it
# holds between two refits does not matter: every refit sets all weights.


class ShadowEngine(RefitterEngine):
    """An engine that is refitted by way of its bytes."""

    _own: serialized.Deserialized | None = None
    _size = 0  # of the engine bytes that were in place when something was last staged

    @property
    def memory(self) -> EngineMemory:
        """The engine from before, which stays on the device until the verdict."""
        size = self._size or len(self.handle.engine_bytes())
        return EngineMemory(engine=self.name, kind="device", bytes=size)

    def _engine(self) -> Any:
        if self._own is None:
            with current(self.device):
                self._own = serialized.Deserialized(self.handle.engine_bytes(), self._trt)
        return self._own.engine

    def _staged(self) -> StagedEngine:
        self.refit(idle=True)  # nobody calls this engine
        after = serialized.bytes_of(self._engine(), self._trt)
        self._size = len(after)
        return StagedEngine(self, self.handle.present(), self.handle.prepare(after))

    def _rehearse(self) -> str:
        self.refit(idle=True)  # to whatever the buffers hold: nobody is served by this engine
        return ""


class StagedEngine:
    """A refitted engine of the runtime's, on its way into its place."""

    def __init__(self, engine: ShadowEngine, before: Any, after: Any) -> None:
        """Made by ``ShadowEngine.stage``."""
        self._engine, self._before, self._after = engine, before, after
        self._was = engine.sets.live

    def commit(self) -> None:
        """Put the refitted engine in place."""
        _put(self._engine.handle, self._after)
        self._engine.sets.settle()

    def rollback(self) -> None:
        """Put the engine from before back."""
        _put(self._engine.handle, self._before)
        self._engine.sets.live = self._was

    def discard(self) -> None:
        """Nothing to do: nobody was served by what was staged."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None while those are not known."""
        return self._engine.sets.changed()

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias, valid until the next refit is staged."""
        return self._engine.staged(slot)

    def side_by_side(self) -> SideBySide | None:
        """Live and new values as they lie in memory; None while the live ones are not known."""
        return self._engine.side_by_side()


def _put(handle: EngineHandle, engine: Any) -> None:
    handle.drop_captured()
    handle.put(engine)


# MERGED runtimes: Which kind of engine serves which runtime.


def engine_for(handle: EngineHandle, trt: Any, options: EngineOptions) -> RefitterEngine:
    """The engine behind a handle: refitted in place where the runtime lets it be."""
    kind = ShadowEngine if handle.cuda_engine() is None else InPlaceEngine
    return kind(handle, trt, options)
