"""Engines of the Python runtime: the live engine is refitted in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import serialized
from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
from refitkit.errors import EngineError, ModuleLostError
from refitkit.recipe import Overwriting
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from refitkit.protocols import SideBySide, SlotValue

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
