"""TensorRT engines as units of a refit, for both runtimes of Torch-TensorRT.

``RefitterEngine`` owns the refitter and the weight buffers of one engine. Its subclasses hide how
new weights become live:

- ``InPlaceEngine``, for the Python runtime: the commit refits the live engine. A rollback refits it
  to the snapshot, or replaces it with the engine bytes from before. Where it is proved that the
  engine's memory can be written, the commit is one copy (``direct``); else TensorRT refits.
- ``ShadowEngine``, for the C++ runtime, which gives no access to its engine: staging refits and
  serializes a second engine, and the commit swaps the result in.

``create_engine`` chooses between them. Reading order: ``create_engine``, ``RefitterEngine``, then
one subclass with its staged refit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.direct.arena import PlacedArena
from refitkit.builtin.torch_tensorrt.direct.route import OFF, DirectRoute
from refitkit.builtin.torch_tensorrt.filling import ArrivingValues, Filler
from refitkit.builtin.torch_tensorrt.refitter import (
    DeserializedEngine,
    PersistentRefitter,
    current_device,
    serialize_engine,
    wait_for_calls,
)
from refitkit.builtin.torch_tensorrt.weight_buffers import (
    Arena,
    Layout,
    LazyCopies,
    Uploader,
    WeightBuffers,
    copy_values,
)
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
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from refitkit.builtin.torch_tensorrt.children import EngineHandle
    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec
    from refitkit.builtin.torch_tensorrt.weight_buffers import ValueArena
    from refitkit.protocols import SlotValue, StagedRefit


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is refitted.

    Attributes:
        device: Device that the engine runs on.
        known: Slots by name, from a plan; see ``PersistentRefitter.specs``.
        check_finite: Whether staging refuses non-finite values where the live ones are finite.
        direct: Whether weights may be written past TensorRT's refitter.
        cache: Folder of what takes long to find out; None: none.
    """

    device: torch.device
    known: Mapping[str, Slot]
    check_finite: bool = True
    direct: bool = True
    cache: Path | None = None


def create_engine(handle: EngineHandle, trt: Any, options: EngineOptions) -> RefitterEngine:
    """An ``InPlaceEngine`` if the runtime gives access to its engine, else a ``ShadowEngine``.

    Args:
        handle: The engine in its target.
        trt: The package ``tensorrt``.
        options: How the engine is refitted.
    """
    kind = ShadowEngine if handle.cuda_engine() is None else InPlaceEngine
    return kind(handle, trt, options)


class RefitterEngine:
    """One TensorRT engine; see ``refitkit.protocols.Engine``.

    It takes the values that it was last given for the live weights. So if other code refits the
    engine, the target has to be opened again before the next refit.

    Attributes:
        handle: The engine in its target.
    """

    def __init__(self, handle: EngineHandle, trt: Any, options: EngineOptions) -> None:
        """Touch nothing yet: the refitter is created on first use.

        Args:
            handle: The engine in its target.
            trt: The package ``tensorrt``.
            options: How the engine is refitted.
        """
        self.handle = handle
        self._trt = trt
        self._options = options
        self._filler = Filler(Uploader(options.device))
        self._refitter: PersistentRefitter | None = None
        self._specs: dict[str, WeightSpec] | None = None
        self._slots: dict[str, Slot] | None = None
        self._buffers: WeightBuffers | None = None

    # -- description ------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the child module that holds the engine."""
        return self.handle.name

    @property
    def device(self) -> torch.device:
        """Device that the engine runs on."""
        return self._options.device

    @property
    def slots(self) -> Mapping[str, Slot]:
        """One slot per weight, by TensorRT's name of the weight.

        Raises:
            NotRefittableError: The engine cannot be refitted, or its dtypes are unknown.
        """
        specs = self.specs
        # kept, because the pipeline asks for the slots once per row of a plan
        if self._slots is None:
            self._slots = {name: self._slot(spec) for name, spec in sorted(specs.items())}
        return self._slots

    def _slot(self, spec: WeightSpec) -> Slot:
        return Slot(
            engine=self.name,
            name=spec.name,
            dtype=spec.dtype,
            shape=spec.shape,
            count=spec.count,
            device=str(self.device),
        )

    @property
    def specs(self) -> Mapping[str, WeightSpec]:
        """Dtype and count that the engine requires of each weight, by name."""
        refitter = self._ready_refitter()
        if self._specs is None:
            self._specs = refitter.specs(self._options.known)
        return self._specs

    @property
    def memory(self) -> EngineMemory:
        """Memory of a rollback: the snapshot, or engine bytes while the weights are unknown."""
        if self._buffers is None or not self._buffers.known:
            size = len(self.handle.engine_bytes())
            return EngineMemory(engine=self.name, kind="engine-bytes", bytes=size)
        return EngineMemory(engine=self.name, kind="device", bytes=self._buffers.nbytes)

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The cached name map of torch_tensorrt 2.11 and 2.12; see ``name_map.HasNameMap``."""
        found: Mapping[str, Any] | None = self.handle.weight_name_map
        return found

    # -- values -----------------------------------------------------------------------------

    @property
    def knows_live(self) -> bool:
        """Whether the live weights are known, from a refit or from ``adopt``."""
        return self._buffers is not None and self._buffers.known

    def remembered(self, slot: str) -> torch.Tensor | None:
        """The live value of a slot, as ``ValueArena.value``; None if it is unknown."""
        return self._buffers.live_value(slot) if self._buffers is not None else None

    @property
    def checks_finite(self) -> bool:
        """See ``refitkit.protocols.ChecksFinite``."""
        return self._options.check_finite and self.knows_live

    def staged(self, slot: str) -> torch.Tensor:
        """The staged value of a slot, as ``ValueArena.value``."""
        return self.buffers.staging.value(slot)

    def previous(self) -> Mapping[str, torch.Tensor]:
        """The values from before the last refit. Each look-up copies: staging overwrites them."""
        buffers = self._buffers
        if buffers is None or not buffers.has_previous:
            return {}
        return LazyCopies(self.specs, lambda name: buffers.previous(name).clone())

    # -- implemented by subclasses ----------------------------------------------------------

    def _engine(self) -> Any:
        """The ``ICudaEngine`` to refit."""
        raise NotImplementedError

    def _staged(self) -> StagedRefit:
        """The staged refit, once the staging arena is filled."""
        raise NotImplementedError

    def _warm_refitter(self) -> str:
        """Run a first refit that changes no weights. Return why it was skipped, or nothing."""
        raise NotImplementedError

    # -- the refitter and its buffers -------------------------------------------------------

    def _ready_refitter(self) -> PersistentRefitter:
        engine = self._engine()
        # The user may have replaced the engine in the module since the last refit. Then nothing
        # that is known about the old one holds for the new one.
        if self._refitter is None or self._refitter.engine is not engine:
            self.reset()
            self._refitter = PersistentRefitter(engine, self._trt, self.device)
        return self._refitter

    @property
    def buffers(self) -> WeightBuffers:
        """The weight buffers. The refitter reads their staging arena."""
        refitter = self._ready_refitter()
        if self._buffers is None:
            buffers = WeightBuffers(self._new_arena)
            refitter.bind(self.specs, _views(buffers.staging))
            self._buffers = buffers
        return self._buffers

    def _new_arena(self) -> Arena:
        return Arena(Layout.of(self.specs.values()), self.device)

    def reset(self) -> None:
        """Free the refitter and all buffers. The live weights are unknown from then on."""
        self._refitter = self._specs = self._slots = self._buffers = None
        self._filler.forget()

    def refit(self, *, idle: bool = False) -> None:
        """Write the staging arena into the engine.

        Args:
            idle: Whether no call of the engine can be pending.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture of old and new weights.
        """
        if self._refitter is None or self._buffers is None:
            raise EngineError(f"The engine {self.name!r} has lost its refitter.")
        self._refitter.refit(idle=idle)

    # -- staging ----------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Copy new values for all slots into the staging arena.

        Raises:
            WeightMismatchError: Names, dtypes or shapes are wrong, or values are not finite.
        """
        return self._stage(values, partial=False)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Copy new values for some slots into the staging arena. The other slots keep theirs.

        Raises:
            NotRefittableError: The values of the other slots are unknown.
            WeightMismatchError: Names, dtypes or shapes are wrong, or values are not finite.
        """
        self._ready_refitter()
        if not self.knows_live:
            raise self._unknown_weights_error()
        return self._stage(values, partial=True)

    def _stage(self, values: Sequence[SlotValue], *, partial: bool) -> StagedRefit:
        specs = self.specs  # first: if the engine was replaced, no values are known any more
        if partial or not self._filler.knows(values):
            require_values(specs, values, partial=partial)
        self.buffers.begin_staging(partial=partial)
        self._fill(values)
        return self._checked_staged()

    def begin_staging(self, slots: Collection[str]) -> ArrivingValues:
        """Stage values for some slots as they arrive; see ``refitkit.protocols.StagesGradually``.

        Raises:
            NotRefittableError: The values of the other slots are unknown.
        """
        self._ready_refitter()
        partial = len(slots) < len(self.specs)
        if partial and not self.knows_live:
            raise self._unknown_weights_error()
        self._filler.forget()
        self.buffers.begin_staging(partial=partial)
        return ArrivingValues(self._fill, self._checked_staged)

    def _checked_staged(self) -> StagedRefit:
        """What the staging arena holds, as a staged refit.

        Raises:
            WeightMismatchError: New values are not finite where the present ones are.
        """
        if self._options.check_finite:
            self._check_finite(self.buffers)
        return self._staged()

    def _fill(self, values: Sequence[SlotValue]) -> None:
        """Copy values into the staging arena."""
        buffers = self.buffers
        self._filler.fill(buffers.staging, self.specs, values, buffers.before)

    def _unknown_weights_error(self) -> NotRefittableError:
        return NotRefittableError(
            f"The present weights of the engine {self.name!r} are unknown: TensorRT cannot read "
            "them back.",
            hint="Refit it fully once; after that it can be refitted in part.",
        )

    def _check_finite(self, buffers: WeightBuffers) -> None:
        problems = [
            Problem(
                name,
                "non-finite",
                f"{count} elements",
                "finite, as the present ones are",
                "to allow it: check_finite=False in the config",
            )
            for name, count in buffers.newly_non_finite(self.specs)
        ]
        if problems:
            raise WeightMismatchError("New weights are not finite.", problems=problems)

    def adopt(self, values: Sequence[SlotValue]) -> None:
        """Record the live weights of an engine that was built from known values.

        Args:
            values: Live value of every slot.

        Raises:
            WeightMismatchError: The values do not fit this engine. The live weights are unknown
                then.
        """
        require_values(self.specs, values)
        buffers = self.buffers
        buffers.live = None  # stays so if a copy fails: staging is then a mixture
        self._fill(values)
        buffers.live = "staging"

    # -- warming and freeing ----------------------------------------------------------------

    def warm(self, progress: Callable[[str], None]) -> None:
        """Create the refitter and its buffers, and have the refitter compile its kernels.

        Args:
            progress: Called with one line of text for each step.

        Raises:
            EngineError: TensorRT failed; the engine is unchanged.
            ModuleLostError: TensorRT failed, and so did the rollback.
        """
        buffers = self.buffers
        progress(f"{self.name}: {len(self.specs)} weights, {buffers.nbytes} bytes")
        skipped = self._warm_refitter()
        progress(f"{self.name}: {skipped or 'the refitter is warm'}")

    def free_spare(self) -> int:
        """Free the snapshot and return its size in bytes.

        The staging arena stays: it is the only copy of the live weights outside the engine.
        """
        return self._buffers.free_snapshot() if self._buffers is not None else 0


def _views(arena: ValueArena) -> Mapping[str, torch.Tensor]:
    """The buffers that a refitter reads."""
    if not isinstance(arena, Arena):
        raise TypeError("a refitter cannot read weights that lie as in the engine")
    return arena.views


# -- Python runtime: refit the live engine ------------------------------------------------------

_NO_ROUTE = ("refitter", "no refit has been made yet")
_RECALLED = "it is known where its weights lie, so its first refit compiles nothing"
_NOT_WARMED = "its weights are not known, so its first refit still compiles for seconds"


class InPlaceEngine(RefitterEngine):
    """A live ``ICudaEngine`` that is refitted in place.

    A refit leaves the serialized engine that the target stores stale. ``_serialize`` renews it when
    other code reads it; see the module ``stale``.
    """

    _stale = False  # whether the stored bytes hold other weights than the live engine
    _mixed = False  # whether the live engine may hold a mixture of weights

    _direct: DirectRoute | None = None
    _route = _NO_ROUTE  # of the last refit
    _plain: Arena | None = None  # for the refitter, while weights lie as in the engine

    def _engine(self) -> Any:
        return self.handle.cuda_engine()

    # -- past the refitter --------------------------------------------------------------------

    @property
    def route(self) -> tuple[str, str]:
        """See ``refitkit.protocols.TellsRoute``."""
        return self._route if self._options.direct else ("refitter", OFF)

    def _writable(self) -> PlacedArena | None:
        """The staging arena, if it is known that it can be written; else None."""
        # not `self.buffers`: new ones would hold zeros
        if self._direct is None or self._direct.writer is None or self._buffers is None:
            return None
        arena = self._buffers.staging
        if not isinstance(arena, PlacedArena) or not self._direct.writer.takes(arena):
            return None
        return arena

    def _ready_route(self) -> DirectRoute | None:
        if self._options.direct and self._direct is None:
            self._direct = DirectRoute(self.handle, self._trt, self.device, self._options.cache)
        return self._direct

    def _find_writer(self) -> None:
        """Find out whether the engine can be written directly; the staging arena is filled."""
        direct, old = self._ready_route(), self.buffers
        if direct is None or isinstance(old.staging, PlacedArena):
            return
        # while values are staged, the snapshot has what the engine holds
        direct.find(self.specs, _views(old.staging), self.remembered)
        writer = direct.writer
        if writer is None:
            return
        try:
            buffers = WeightBuffers.moved(old, writer.arena, self.specs)
        except Exception as exc:  # noqa: BLE001 - nothing was touched, and the refitter can do it
            direct.give_up(f"there is no way to stage for it: {exc}")
            return
        self._buffers = buffers
        self._ready_refitter().unbind()

    def refit(self, *, idle: bool = False) -> None:
        """Write the staging arena into the engine: by one copy, or through the refitter.

        Args:
            idle: Whether no call of the engine can be pending, or the current stream waits for all
                calls. Then a copy is launched on it, and not waited for.
        """
        self._ready_refitter()  # forgets the writer if the user has replaced the engine
        direct, arena = self._direct, self._writable()
        if direct is None or arena is None or not direct.in_place:
            self._refit_by_tensorrt(idle=idle)
            return
        arena.fold()
        if not idle:
            wait_for_calls(self.device, idle=False)
        arena.commit()
        if not idle:
            wait_for_calls(self.device, idle=True)  # only for the copy
        self._route = ("direct", "")

    def _refit_by_tensorrt(self, *, idle: bool) -> None:
        direct, buffers = self._direct, self._buffers
        if direct is None or buffers is None:
            super().refit(idle=idle)
            self._route = ("refitter", "it is not known yet whether it can be written")
            return
        direct.refitting()
        arena = buffers.staging
        plain = self._plain_copy(arena) if isinstance(arena, PlacedArena) else None
        if plain is None:
            super().refit(idle=idle)
        else:
            with self._ready_refitter().bound(self.specs, plain.views):
                super().refit(idle=idle)
        arenas = [one for one in buffers.arenas if isinstance(one, PlacedArena)]
        try:
            direct.refitted(_views(plain or arena), arenas)
        except Exception as exc:  # noqa: BLE001 - the engine is refitted, and the refitter goes on
            direct.give_up(f"what a refit left could not be compared: {exc}")
        self._route = ("refitter", direct.reason)

    def _plain_copy(self, arena: PlacedArena) -> Arena:
        """All values as the refitter reads them."""
        if self._plain is None:
            self._plain = self._new_arena()
        copy_values(arena, self._plain, self.specs)
        return self._plain

    def _install(self) -> None:
        """Put the engine that can be written in place of the one that Torch-TensorRT opened."""
        self._ready_refitter()  # forgets that engine if the user has replaced the other one
        if self._direct is not None and self._writable() is not None:
            self._direct.install()

    def _ready_refitter(self) -> PersistentRefitter:
        # that of the engine which was put in place, also if an interrupt came right after that
        found = self._direct.refitter if self._direct is not None else None
        if found is not None and found.engine is self._engine():
            self._refitter = found
        return super()._ready_refitter()

    # -- staging and commits ------------------------------------------------------------------

    def _staged(self) -> StagedInPlace:
        self._find_writer()
        arena, direct = self._writable(), self._direct
        if arena is not None:
            arena.fold()
        is_direct = arena is not None and direct is not None and direct.in_place
        # a rollback must not run out of memory, so what it may need is allocated now
        is_plain = isinstance(self.buffers.staging, Arena)
        self._plain = None if is_direct or is_plain else self._plain or self._new_arena()
        # Without known weights there is no snapshot, so a rollback needs the engine bytes.
        before = None if self.knows_live else self.handle.engine_bytes()
        return StagedInPlace(self, before)

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Free the snapshot. The commit fills the staging arena and refits the live engine.

        Raises:
            WeightMismatchError: There are no such slots, or some are given twice.
            NotRefittableError: Some slots have no new value, and their values are unknown.
        """
        self._ready_refitter()
        partial = len(values) < len(self.specs)
        if partial and not self.knows_live:
            raise self._unknown_weights_error()
        require_values(self.specs, values, partial=partial)
        self.buffers.free_snapshot()
        return Overwriting(lambda: self._overwrite(values))

    def _overwrite(self, values: Sequence[SlotValue]) -> None:
        # until the refit is done, neither the engine nor the staging arena is known
        self.buffers.live = None
        self._fill(values)
        self.write(idle=True)

    def _warm_refitter(self) -> str:
        if not self.knows_live:
            return self._recalled()
        # `partial`, because the staging arena has to hold exactly the live values
        self.buffers.begin_staging(partial=True)
        self._find_writer()
        staged = StagedInPlace(self, None)
        try:
            self.write(idle=False)
        except BaseException as exc:
            _rollback_warming(staged, exc)
            raise
        return ""

    def _recalled(self) -> str:
        """Prepare for a first refit of unknown weights, if it is known where they lie."""
        direct = self._ready_route()
        if direct is not None:
            direct.recall(self.specs)
        if direct is None or direct.writer is None:
            return _NOT_WARMED
        if not isinstance(self.buffers.staging, PlacedArena):
            self._buffers = WeightBuffers(direct.writer.arena, swaps=True)
            self._ready_refitter().unbind()
        staging = self.buffers.staging
        if isinstance(staging, PlacedArena):  # it holds no weights yet
            staging.rehearse(Uploader(self.device))
        wait_for_calls(self.device, idle=False)
        direct.install()
        return _RECALLED

    def write(self, *, idle: bool) -> None:
        """Refit the live engine to the staging arena.

        Args:
            idle: Whether no call of the engine can be pending.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture of old and new weights.
        """
        # `_mixed` comes first: bytes that are read while the refit runs must be refused.
        self._mixed = True
        self._install()
        self.handle.on_stale(self._serialize)
        # a captured CUDA graph could go on computing with the old weights
        self.handle.drop_captured()
        self.refit(idle=idle)
        self.buffers.mark_committed()
        self._stale, self._mixed = True, False

    def restore(self, before: bytes | None, *, stale: bool) -> None:
        """Have the live engine hold the weights from before the refit.

        Args:
            before: Engine bytes from before the refit; None if the snapshot has the weights.
            stale: Whether the stored bytes were stale before the refit.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture of old and new weights.
        """
        self._mixed = True
        self.handle.drop_captured()
        if before is None:
            self._ready_refitter()
            if not self.knows_live:
                raise EngineError(f"The engine {self.name!r} was replaced since the refit.")
            self.buffers.restore()
            self.refit()  # not idle: a verifier may have called the engine since the commit
            self.buffers.live = "staging"
            stale = stale or (self._direct is not None and self._direct.outdated)
        else:
            self.reset()
            self.handle.on_stale(None)  # the stored bytes are those from before, and stay
            self.handle.replace(before)
            stale = False
        self.handle.on_stale(self._serialize if stale else None)
        self._stale, self._mixed = stale, False

    @property
    def stale(self) -> bool:
        """Whether the stored bytes hold other weights than the live engine."""
        return self._stale

    def reset(self) -> None:
        """Free the refitter and all buffers. The present engine is the one that is stored."""
        super().reset()
        self._stale, self._direct, self._plain = False, None, None
        self._route = _NO_ROUTE

    def _serialize(self) -> bytes:
        """Bytes of the live engine, which the handle stores when other code reads its bytes."""
        if self._mixed:
            raise EngineError(
                f"The engine {self.name!r} may hold a mixture of weights: it cannot be stored.",
                hint="Load or compile it again.",
            )
        data = serialize_engine(self.handle.cuda_engine(), self._trt)
        if self._direct is not None:
            self._direct.note(data)
        self._stale = False
        return data


class StagedInPlace:
    """Values in the staging arena of an ``InPlaceEngine``; see ``protocols.StagedRefit``."""

    def __init__(self, engine: InPlaceEngine, before: bytes | None) -> None:
        """Record how to roll back. Only ``InPlaceEngine`` creates one.

        Args:
            engine: The engine.
            before: Engine bytes for a rollback; None if the snapshot has the live weights.
        """
        self._engine = engine
        self._before = before
        self._stale = engine.stale

    def commit(self) -> None:
        """Refit the engine to the values in the staging arena."""
        self._engine.write(idle=True)  # the transaction has waited for pending calls

    def rollback(self) -> None:
        """Refit to the snapshot, or replace the engine with its bytes from before the commit."""
        self._engine.restore(self._before, stale=self._stale)

    def discard(self) -> None:
        """Do nothing: the snapshot has the live values, and the next refit overwrites staging."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None if the live values are unknown."""
        return self._engine.buffers.changed()

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias, valid until the next refit is staged."""
        return self._engine.staged(slot)


def _rollback_warming(staged: StagedInPlace, cause: BaseException) -> None:
    try:
        staged.rollback()
    except BaseException as exc:
        lost = ModuleLostError(
            f"Warming failed half-way, and so did its rollback: {exc}",
            hint="Load or compile the module again.",
        )
        lost.add_note(f"Warming failed because of: {type(cause).__name__}: {cause}")
        raise lost from exc


# -- C++ runtime: refit a second engine and swap it in ------------------------------------------


class ShadowEngine(RefitterEngine):
    """An engine of the C++ runtime, which gives no access to its ``ICudaEngine``.

    Staging refits a second engine, the shadow, which was deserialized from the same bytes. It
    serializes the shadow, and the runtime creates a third engine from these bytes. The live engine
    serves calls meanwhile. The commit puts the third engine in place, and a rollback the old one.

    The shadow keeps its refitter, so later refits pay only for serializing and deserializing. Its
    weights between two refits do not matter: every refit sets all of them.
    """

    _shadow: DeserializedEngine | None = None
    _size = 0  # of the bytes of the last staged engine

    @property
    def memory(self) -> EngineMemory:
        """Memory of a rollback: the old engine, which stays on the device until the verdict."""
        size = self._size or len(self.handle.engine_bytes())
        return EngineMemory(engine=self.name, kind="device", bytes=size)

    def _engine(self) -> Any:
        if self._shadow is None:
            with current_device(self.device):
                self._shadow = DeserializedEngine(self.handle.engine_bytes(), self._trt)
        return self._shadow.engine

    def _staged(self) -> StagedShadow:
        self.refit(idle=True)  # calls use the live engine, never the shadow
        after = serialize_engine(self._engine(), self._trt)
        self._size = len(after)
        return StagedShadow(self, self.handle.present(), self.handle.prepare(after))

    def _warm_refitter(self) -> str:
        self.refit(idle=True)  # any weights will do: calls never use the shadow
        return ""


class StagedShadow:
    """A refitted engine of the C++ runtime, ready to be put in place; see ``StagedRefit``."""

    def __init__(self, engine: ShadowEngine, before: Any, after: Any) -> None:
        """Record both engines. Only ``ShadowEngine`` creates one.

        Args:
            engine: The engine.
            before: The engine in place, as ``EngineHandle.present`` returns it.
            after: The refitted engine, as ``EngineHandle.prepare`` returns it.
        """
        self._engine, self._before, self._after = engine, before, after
        self._live_before = engine.buffers.live

    def commit(self) -> None:
        """Put the refitted engine in place."""
        _swap(self._engine.handle, self._after)
        self._engine.buffers.mark_committed()

    def rollback(self) -> None:
        """Put the old engine back."""
        _swap(self._engine.handle, self._before)
        self._engine.buffers.live = self._live_before

    def discard(self) -> None:
        """Do nothing: no call used the staged engine."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None if the live values are unknown."""
        return self._engine.buffers.changed()

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias, valid until the next refit is staged."""
        return self._engine.staged(slot)


def _swap(handle: EngineHandle, engine: Any) -> None:
    handle.drop_captured()
    handle.put(engine)
