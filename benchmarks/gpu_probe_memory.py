"""Probe of the memory that an engine's weights lie in: can values be written there directly?

TensorRT takes an allocator, which says where an engine's memory is. Every element of every weight
gets a number of its own by a refit; where these numbers lie then is a map of the memory. What the
map predicts for other values is compared with what TensorRT's own refit to them leaves there.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from gpu_probe_engines import Two
from gpu_raw import ByHand, many, ready_values, seconds

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.program.bits import same_bits

Found = dict[str, Any]
FIRST = 0x3F800000
"""Bits of 1.0: element n is the float with the bits FIRST + n, a finite number for each."""


def engine_memory_resnet18() -> Found:
    """Convolutions."""
    return _probed("resnet18")


def engine_memory_mobilenet() -> Found:
    """Depthwise convolutions, many small weights."""
    return _probed("mobilenet_v3_small")


def engine_memory_vit() -> Found:
    """Attention, linear layers."""
    return _probed("vit_b_16")


def engine_memory_llama() -> Found:
    """A decoder with a large embedding."""
    return _probed("llama")


class _Pieces:
    """Memory that was allocated, by address."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Some; None for no bytes."""
        if not size:
            return None
        address: int = torch.cuda.caching_allocator_alloc(size)
        self.sizes[address] = size
        return address

    def leave(self, address: int) -> bool:
        """Give it back."""
        if address:
            del self.sizes[address]
            torch.cuda.caching_allocator_delete(address)
        return True


def _allocator(trt: Any, pieces: _Pieces) -> Any:
    """TensorRT's way to ask for memory."""

    class Allocator(trt.IGpuAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IGpuAllocator.__init__(self)

        def allocate(self, size: int, _alignment: int, _flags: int) -> int | None:
            return pieces.take(size)

        def deallocate(self, address: int) -> bool:
            return pieces.leave(address)

        def reallocate(self, _address: int, _alignment: int, _size: int) -> None:
            return None

        def allocate_async(self, size: int, _alignment: int, _flags: int, _: int) -> int | None:
            return pieces.take(size)

        def deallocate_async(self, address: int, _stream: int) -> bool:
            return pieces.leave(address)

    return Allocator()


class _Words:
    """Memory of the device as a tensor of words."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size // 4,),
            "typestr": "<i4",
            "data": (address, False),
            "version": 3,
        }


class Engine:
    """An engine whose memory is known, a refitter for it, and values for its weights."""

    def __init__(self, two: Two) -> None:
        trt = upstream.tensorrt()
        ((name, engine),) = two.compiled.engines.items()
        self._two, self._child = two, two.child
        self._pieces = _Pieces()
        self._kept = trt.Logger(trt.Logger.ERROR), _allocator(trt, self._pieces)
        self._runtime = trt.Runtime(self._kept[0])
        self._runtime.gpu_allocator = self._kept[1]
        self.engine = self._runtime.deserialize_cuda_engine(engine.handle.engine_bytes())
        self.values = [ready_values(two.compiled, model.state_dict())[name] for model in two.models]
        self.coded = [one for one, v in self.values[0].items() if v.dtype == torch.float32]
        self.context = self.engine.create_execution_context()
        self.hand = ByHand(self.engine, self.values[0])
        self.hand.refit()
        self.call()

    def call(self) -> torch.Tensor:
        """What the compiled module answers with this engine in it."""
        kept = self._child.engine, self._child.context
        self._child.engine, self._child.context = self.engine, self.context
        try:
            return self._two.call()
        finally:
            self._child.engine, self._child.context = kept

    def refit(self, values: dict[str, torch.Tensor]) -> None:
        """TensorRT's refit."""
        self.hand.point(values)
        self.hand.refit()
        torch.cuda.synchronize()

    def memory(self) -> dict[int, torch.Tensor]:
        """Live memory, not a copy of it."""
        return {
            address: torch.as_tensor(_Words(address, size), device="cuda")
            for address, size in sorted(self._pieces.sizes.items())
            if size >= 4
        }

    def numbered(self, step: int) -> dict[str, torch.Tensor]:
        """Values whose bits count elements, from the first or (-1) from the last."""
        total = sum(self.values[0][name].numel() for name in self.coded)
        numbers = torch.arange(total, dtype=torch.int32, device="cuda")
        numbers = FIRST + (numbers if step > 0 else total - 1 - numbers)
        parts = numbers.split([self.values[0][name].numel() for name in self.coded])
        coded = {
            name: part.view(torch.float32).view(self.values[0][name].shape).clone()
            for name, part in zip(self.coded, parts, strict=True)
        }
        return {**self.values[0], **coded}

    def flat(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """All coded elements, in the order of their numbers, as words."""
        return torch.cat([values[name].reshape(-1) for name in self.coded]).view(torch.int32)


def _copy(memory: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {address: words.clone() for address, words in memory.items()}


def _map(engine: Engine) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], Found]:
    """For each piece of memory: places, and which element lies there; and what was found."""
    total = engine.flat(engine.values[0]).numel()
    engine.refit(engine.numbered(1))
    up = _copy(engine.memory())
    engine.refit(engine.numbered(-1))
    down = _copy(engine.memory())
    places, unknown = {}, 0
    seen = torch.zeros(total, dtype=torch.int32, device="cuda")
    for address in up.keys() & down.keys():
        one, other = up[address], down[address]
        element = one - FIRST
        known = (element >= 0) & (element < total) & (other == FIRST + total - 1 - element)
        unknown += int(((one != other) & ~known).sum())
        where = known.nonzero().flatten()
        if len(where):
            places[address] = where, element[where].long()
            seen.index_add_(0, places[address][1], torch.ones_like(where, dtype=torch.int32))
    parts = seen.split([engine.values[0][name].numel() for name in engine.coded])
    lost = {n: int((p == 0).sum()) for n, p in zip(engine.coded, parts, strict=True)}
    return places, {
        "elements": total,
        "found": int((seen > 0).sum()),
        "found more than once": int((seen > 1).sum()),
        "weights with none lost": sum(not count for count in lost.values()),
        "weights": len(lost),
        "lost, for example": dict([(n, c) for n, c in lost.items() if c][:8]),
        "words that change otherwise": unknown,
        "pieces of memory": len(up),
        "bytes of all pieces": sum(len(words) * 4 for words in up.values()),
        "pieces with weights": len(places),
        "in order": sum(
            int((element.diff() == 1).sum() + 1) for _, element in places.values() if len(element)
        ),
    }


def _write(
    engine: Engine, places: dict[int, tuple[torch.Tensor, torch.Tensor]], values: torch.Tensor
) -> None:
    memory = engine.memory()
    for address, (where, element) in places.items():
        memory[address].index_copy_(0, where, values[element])


def _probed(model: str) -> Found:
    torch.cuda.init()
    two = Two(model)
    engine = Engine(two)
    a, b = engine.values
    places, found = _map(engine)
    engine.refit(a)
    before, out_a = _copy(engine.memory()), engine.call()
    engine.refit(b)
    after, out_b = _copy(engine.memory()), engine.call()
    engine.refit(a)
    found["A by TensorRT, again bit-equal"] = same_bits(engine.call(), out_a)
    flat_a, flat_b = engine.flat(a), engine.flat(b)
    _write(engine, places, flat_b)
    torch.cuda.synchronize()
    written = engine.memory()
    found["words that differ from TensorRT's refit"] = sum(
        int((written[address] != words).sum())
        for address, words in after.items()
        if address in places and address in written
    )
    found["of them changed by it"] = sum(
        int((before[address] != words).sum())
        for address, words in after.items()
        if address in before
    )
    found["B written directly, bit-equal"] = same_bits(engine.call(), out_b)
    _write(engine, places, flat_a)
    found["A written directly, bit-equal"] = same_bits(engine.call(), out_a)
    found["A is not B"] = not same_bits(out_a, out_b)
    found["error of B"] = two.error(out_b, 1)
    spare = torch.empty_like(flat_a)
    timed = {
        "copy": lambda n: spare.copy_((flat_a, flat_b)[n % 2]),
        "direct, by places": lambda n: _write(engine, places, (flat_a, flat_b)[n % 2]),
        "refit": lambda n: engine.refit((a, b)[n % 2]),
    }
    engine.refit(a)
    found["ms"] = {
        name: statistics.median(many(call, 10, 2.0)) * 1e3 for name, call in timed.items()
    }
    found["wait_ms"] = seconds(lambda: None) * 1e3
    return found
