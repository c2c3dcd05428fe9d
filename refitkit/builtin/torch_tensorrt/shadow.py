"""Engines of the C++ runtime: a second engine is refitted, serialized, and put in place.

The C++ runtime lends its engine to nobody. So an engine of our own, made from the same bytes, is
refitted and serialized, and the runtime makes a third one of that, all while the live one goes on
serving. The transaction only puts that in place, and the one from before back. Our own keeps its
refitter, so that later refits pay for serializing and deserializing only. What it holds between two
refits does not matter: every refit sets all weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import serialized
from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
from refitkit.builtin.torch_tensorrt.refitter import current
from refitkit.model import EngineMemory

if TYPE_CHECKING:
    import torch

    from refitkit.builtin.torch_tensorrt.handles import EngineHandle
    from refitkit.protocols import SideBySide


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
