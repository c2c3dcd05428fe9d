"""The way past the refitter for one engine: learn and prove once, then write directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.arena import PlacedArena, fixed_layout
from refitkit.builtin.torch_tensorrt.direct.engines import (
    KnownEngine,
    Pieces,
    ProbedEngine,
    allocating,
)
from refitkit.builtin.torch_tensorrt.direct.known import (
    Known,
    KnownLayouts,
    digest_of,
    digest_of_fixed,
    key_of,
)
from refitkit.builtin.torch_tensorrt.direct.learning import UnknownLayoutError, learn
from refitkit.builtin.torch_tensorrt.direct.moves import Mover
from refitkit.builtin.torch_tensorrt.direct.proving import prove
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter, wait_for_calls
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena
from refitkit.program.bits import all_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from refitkit.builtin.torch_tensorrt.children import EngineHandle
    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout
    from refitkit.builtin.torch_tensorrt.refitter import WeightSpec

OFF = "direct=False in the config"
_SETTINGS = {
    "enable_weight_streaming": "its weights are streamed",
    "sparse_weights": "its weights may be sparse",
}
"""Settings of engines for which nothing was proved yet."""
_MOVED = "its weights lie elsewhere after a change of what stays fixed"


class DirectRoute:
    """Whether an engine can be written directly, and the writer once that is known.

    Attributes:
        why: Why it cannot; empty if it can, or if that is not known yet.
        writer: Writes to the engine, once ``find`` has proved that it can.
        refitter: A refitter of the engine that ``install`` installs.
        outdated: Whether the bytes that ``install`` stores hold other weights than the engine.
    """

    def __init__(
        self, handle: EngineHandle, trt: Any, device: torch.device, folder: Path | None = None
    ) -> None:
        """Find out nothing yet.

        Args:
            handle: The engine in its target.
            trt: The package ``tensorrt``.
            device: Its device.
            folder: Where layouts are kept for other processes; None: nowhere.
        """
        self._handle, self._trt, self._device = handle, trt, device
        self._layouts = KnownLayouts(folder)
        self.why = next(
            (why for name, why in _SETTINGS.items() if getattr(handle.settings, name, False)), ""
        )
        self.writer: DirectWriter | None = None
        self.refitter: PersistentRefitter | None = None
        self.outdated = False
        self._engine: KnownEngine | None = None
        self._prepared: Any = None  # an engine that ``EngineHandle.put`` takes

    def find(
        self,
        specs: Mapping[str, WeightSpec],
        values: Mapping[str, torch.Tensor],
        held: Callable[[str], torch.Tensor | None],
    ) -> None:
        """Find out whether the engine can be written directly, if that is not known yet.

        It takes as long as a first refit through the refitter, some seconds. Calls go on.

        Args:
            specs: Dtype and number of elements of each weight, by name.
            values: Values of all weights, flat, to try it with.
            held: What the engine holds of a weight; None if nobody knows.
        """
        if self.writer is not None or self.why:
            return
        if not all(all_finite(value) for value in values.values() if value.is_floating_point()):
            return  # next time: answers that are not numbers would prove nothing
        try:
            self._find(specs, values, held)
        except UnknownLayoutError as exc:
            self.why = str(exc)
        except Exception as exc:  # noqa: BLE001 - nothing was touched, and the refitter can do it
            self.why = f"it could not be tried: {exc}"

    def _find(
        self,
        specs: Mapping[str, WeightSpec],
        values: Mapping[str, torch.Tensor],
        held: Callable[[str], torch.Tensor | None],
    ) -> None:
        data = self._handle.engine_bytes()
        known, prepared = self._opened(data)
        key = key_of(data, self._trt, self._device)
        found = self._layouts.get(key, known, specs)
        if found is None:
            _require_memory(len(data), values, self._device)
            probed = ProbedEngine(data, specs, self._trt, self._device)
            layout = learn(probed, values)
            fixed = _of(layout.fixed, held)
            found = Known(layout, digest_of(layout, known), digest_of_fixed(layout, fixed))
            prove(probed, known, layout, {**values, **fixed})
            self._layouts.put(key, found)
        refitter = PersistentRefitter(known.engine, self._trt, self._device)
        layout = found.layout
        writer = DirectWriter(layout, specs, known.pieces()[layout.piece])
        holds = digest_of_fixed(layout, _of(layout.fixed, held)) or found.fixed
        if holds == digest_of_fixed(layout, values):
            writer.hold(values)
        else:
            with refitter.bound(specs, values):
                refitter.refit(idle=True)  # nobody calls this engine yet
            if not writer.refitted(values, ()):
                raise UnknownLayoutError(_MOVED)
        self._engine, self._prepared, self.refitter = known, prepared, refitter
        self.writer = writer

    def _opened(self, data: bytes) -> tuple[KnownEngine, Any]:
        """An engine of some bytes whose memory is known, and what ``EngineHandle.put`` takes."""
        pieces = Pieces(self._device)
        with allocating(self._trt, pieces):
            prepared = self._handle.prepare(data)
        engine = self._handle.cuda_engine_of(prepared)
        if engine is None or not pieces.all():
            raise UnknownLayoutError("this runtime lets nobody see the memory of its engines")
        known = KnownEngine(engine, pieces, self._trt, self._device)
        known.require_static()
        return known, prepared

    def recall(self, specs: Mapping[str, WeightSpec]) -> None:
        """Look for the layout among those that were proved before. No values are needed.

        Args:
            specs: Dtype and number of elements of each weight, by name.
        """
        if self.writer is not None or self.why:
            return
        data = self._handle.engine_bytes()
        key = key_of(data, self._trt, self._device)
        if not self._layouts.has(key):
            return
        try:
            known, prepared = self._opened(data)
            found = self._layouts.get(key, known, specs)
            if found is None:
                return
            writer = DirectWriter(found.layout, specs, known.pieces()[found.layout.piece])
            writer.fixed_digest = found.fixed
            refitter = PersistentRefitter(known.engine, self._trt, self._device)
        except Exception:  # noqa: BLE001 - nothing was touched, and the first refit tries again
            return
        self._engine, self._prepared, self.refitter = known, prepared, refitter
        self.writer = writer

    @property
    def reason(self) -> str:
        """Why TensorRT had to do a refit."""
        if self.why:
            return self.why
        if self.writer is None:
            return "weights that are not finite prove nothing: it is tried again"
        return "weights changed that can only be refitted"

    @property
    def in_place(self) -> bool:
        """Whether the engine that can be written is in place: also if ``install`` was cut short."""
        return self._engine is not None and self._handle.cuda_engine() is self._engine.engine

    def refitting(self) -> None:
        """Note that TensorRT is about to refit the engine in place. It may fail half-way."""
        if self._prepared is not None:
            self.outdated = True
        if self.writer is not None and self.in_place:
            self.writer.refitting()

    def refitted(self, values: Mapping[str, torch.Tensor], arenas: Iterable[PlacedArena]) -> None:
        """Note that TensorRT has refitted the engine that is in place.

        Args:
            values: What it was refitted to, flat.
            arenas: Memory that ``DirectWriter.arena`` has allocated.
        """
        if self.writer is None or not self.in_place:
            return
        if not self.writer.refitted(values, arenas):
            self.writer, self.why = None, _MOVED

    def note(self, data: bytes) -> None:
        """Note that bytes are those of the engine as it is now, for engines made of them.

        Args:
            data: Engine bytes.
        """
        if self.writer is not None and self._engine is not None and self._prepared is None:
            layout, key = self.writer.layout, key_of(data, self._trt, self._device)
            known = Known(layout, digest_of(layout, self._engine), self.writer.fixed_digest)
            self._layouts.put(key, known)
        if self._prepared is None:
            self.outdated = False

    def install(self) -> None:
        """Put the engine that can be written in place, unless it is there.

        It holds other weights than the one before, until the next commit.
        """
        if self._prepared is not None:
            # calls of the engine that goes end first: the current stream waits for all of them
            wait_for_calls(self._device, idle=True)
            self._handle.put(self._prepared)
            self._prepared = None

    def give_up(self, why: str) -> None:
        """Leave the engine to the refitter from now on.

        Args:
            why: Why.
        """
        self.writer, self.why = None, why
        if not self.in_place:
            self._engine = self._prepared = self.refitter = None


_PER_ELEMENT = 64
"""Bytes that the search needs for each element: numbers of 8 bytes, some times."""


def _require_memory(nbytes: int, values: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Check that the search leaves half of the free memory to those who serve.

    Args:
        nbytes: Size of the engine's bytes; there will be two engines more, and their contexts.
        values: Values of all weights.
        device: Their device.

    Raises:
        UnknownLayoutError: It does not.
    """
    if device.type != "cuda":
        return
    needed = 4 * nbytes + _PER_ELEMENT * sum(value.numel() for value in values.values())
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free // 2:
        raise UnknownLayoutError(
            f"finding out takes about {needed >> 20} MB, more than half of the {free >> 20} MB of "
            "free memory"
        )


def _of(
    names: Iterable[str], held: Callable[[str], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Return what an engine holds of some weights, flat, as far as it is known."""
    found = {name: held(name) for name in names}
    return {name: value.reshape(-1) for name, value in found.items() if value is not None}


class DirectWriter:
    """Writes weights to the memory of an engine.

    Attributes:
        layout: The engine's layout.
        fixed_digest: Of the weights that stay fixed, as the engine holds them; empty: unknown.
    """

    def __init__(
        self, layout: EngineLayout, specs: Mapping[str, WeightSpec], piece: torch.Tensor
    ) -> None:
        """Write nothing yet.

        Args:
            layout: The engine's layout, proved.
            specs: Dtype and number of elements of each weight, by name.
            piece: The memory of its weights, as ``uint8``: an alias.
        """
        self.layout, self._specs, self._live = layout, specs, piece
        self._mover = Mover(piece.device)
        self._parts = layout.parts(piece.device)  # what lies between the weights stays as it is
        self._fixed: torch.Tensor | None = None  # bits of fixed weights that the engine holds
        self.fixed_digest = b""

    def arena(self) -> PlacedArena:
        """Allocate memory for values of all weights, as the engine keeps them."""
        found = PlacedArena(self.layout, self._specs, self._live, self._parts, self._mover)
        if not found.commits_fast:
            raise UnknownLayoutError("its weights lie in many parts, which only Triton copies fast")
        return found

    def refitting(self) -> None:
        """Note that TensorRT is about to refit the engine."""
        self._fixed, self.fixed_digest = None, b""

    def refitted(self, values: Mapping[str, torch.Tensor], arenas: Iterable[PlacedArena]) -> bool:
        """Note that TensorRT has refitted the engine.

        Args:
            values: What it was refitted to, flat.
            arenas: Memory that ``arena`` has allocated.

        Returns:
            Whether the layout still says where they are: it was proved only with the values of
            before of the weights that stay fixed.
        """
        if not torch.equal(self.layout.written(self._live, values), self._live):
            return False
        for arena in arenas:
            arena.take_between(self._live)
        self.hold(values)
        return True

    def hold(self, values: Mapping[str, torch.Tensor]) -> None:
        """Note what the engine holds of the weights that stay fixed.

        Args:
            values: These weights and perhaps others, flat.
        """
        fixed = Arena(fixed_layout(self.layout, self._specs), self._live.device)
        for name in self.layout.fixed:
            fixed.views[name].copy_(values[name])
        self._fixed, self.fixed_digest = fixed.memory, digest_of_fixed(self.layout, values)

    def takes(self, arena: PlacedArena) -> bool:
        """Return whether weights that cannot be written have the values that the engine holds."""
        if self._fixed is None and self.fixed_digest:
            values = {name: arena.value(name) for name in self.layout.fixed}
            if digest_of_fixed(self.layout, values) == self.fixed_digest:
                self.hold({name: value.reshape(-1) for name, value in values.items()})
        if self._fixed is None:
            return False
        # A comparison waits for the device, so it must not be made again behind the gate.
        if arena.accepted is not self._fixed and torch.equal(arena.fixed.memory, self._fixed):
            arena.accepted = self._fixed
        return arena.accepted is self._fixed
