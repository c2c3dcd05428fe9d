"""Probe of the memory that an engine's weights lie in: can values be written there directly?

TensorRT takes an allocator, which says where an engine's memory is. Every element of every weight
gets a number of its own by refits; where these numbers lie then is a map of the memory. What the
map predicts for other values is compared with what TensorRT's own refit to them leaves there.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from gpu_probe_engines import Two
from gpu_raw import ByHand, many, ready_values, seconds

from refitkit.builtin.torch_tensorrt import refitter, upstream
from refitkit.program.bits import same_bits

Found = dict[str, Any]
Values = dict[str, torch.Tensor]
Map = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""For pieces of memory, by the order in which they were asked for: places, and their elements."""


@dataclass(frozen=True)
class Code:
    """How elements are numbered: by digits, each the bits of a finite number.

    Attributes:
        word: Integers of an element's size.
        first: Bits that stand for the digit 0.
        base: So many digits.
    """

    word: torch.dtype
    first: int
    base: int


CODES = {
    torch.float32: Code(torch.int32, 0x3F800000, 1 << 29),
    torch.float16: Code(torch.int16, 0x1000, 1 << 14),
}


def engine_memory_resnet18() -> Found:
    """Convolutions, and normalizations that TensorRT folds."""
    return _probed("resnet18")


def engine_memory_mobilenet() -> Found:
    """Depthwise convolutions, many small weights."""
    return _probed("mobilenet_v3_small")


def engine_memory_vit() -> Found:
    """Attention, linear layers."""
    return _probed("vit_b_16")


def engine_memory_vit_half() -> Found:
    """The same in float16."""
    return _probed("vit_b_16", torch.float16)


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

    def __init__(self, address: int, size: int, word: torch.dtype) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size // word.itemsize,),
            "typestr": f"<i{word.itemsize}",
            "data": (address, False),
            "version": 3,
        }


class Known:
    """An engine whose memory is known, and a context of it."""

    def __init__(self, two: Two, data: bytes, word: torch.dtype) -> None:
        trt = upstream.tensorrt()
        self._two, self._child, self._word = two, two.child, word
        self._pieces = _Pieces()
        self._kept = trt.Logger(trt.Logger.ERROR), _allocator(trt, self._pieces)
        self._runtime = trt.Runtime(self._kept[0])
        self._runtime.gpu_allocator = self._kept[1]
        self.engine = self._runtime.deserialize_cuda_engine(data)
        self.context = self.engine.create_execution_context()

    def call(self, context: Any = None) -> torch.Tensor:
        """What the compiled module answers with this engine in it."""
        kept = self._child.engine, self._child.context
        self._child.engine, self._child.context = self.engine, context or self.context
        try:
            return self._two.call()
        finally:
            self._child.engine, self._child.context = kept

    def memory(self) -> list[torch.Tensor]:
        """Live memory, not a copy of it, in the order in which it was asked for."""
        return [
            torch.as_tensor(_Words(address, size, self._word), device="cuda")
            for address, size in self._pieces.sizes.items()
            if size >= self._word.itemsize
        ]

    def copied(self) -> list[torch.Tensor]:
        """A copy of it."""
        torch.cuda.synchronize()
        return [words.clone() for words in self.memory()]

    def write(self, places: Map, elements: torch.Tensor) -> None:
        """Write values to where the map says."""
        memory = self.memory()
        for piece, (where, element) in places.items():
            memory[piece].index_copy_(0, where, elements[element])


class Engine(Known):
    """One that a refitter refits, and two sets of values for its weights."""

    def __init__(self, two: Two) -> None:
        ((name, engine),) = two.compiled.engines.items()
        self.code, self.data = CODES[two.dtype], engine.handle.engine_bytes()
        super().__init__(two, self.data, self.code.word)
        self.values = [ready_values(two.compiled, model.state_dict())[name] for model in two.models]
        self.coded = [one for one, v in self.values[0].items() if v.dtype == two.dtype]
        self.counts = [self.values[0][one].numel() for one in self.coded]
        self.total = sum(self.counts)
        self.hand = ByHand(self.engine, self.values[0])
        self.hand.refit()
        self.call()

    def refit(self, values: Values) -> None:
        """TensorRT's refit."""
        self.hand.point(values)
        self.hand.refit()
        torch.cuda.synchronize()

    def digits(self, numbers: torch.Tensor, place: int) -> Values:
        """Values whose bits are one digit of numbers, which each element has one of."""
        code = self.code
        bits = (code.first + numbers // code.base**place % code.base).to(code.word)
        found = dict(self.values[0])
        for name, part in zip(self.coded, bits.split(self.counts), strict=True):
            like = self.values[0][name]
            found[name] = part.view(like.dtype).view(like.shape).clone()
        return found

    def flat(self, values: Values) -> torch.Tensor:
        """All coded elements, in the order of their numbers, as words."""
        return torch.cat([values[n].reshape(-1) for n in self.coded]).view(self.code.word)

    def read(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Refit to numbers, and read them where they lie: -1 where there can be none."""
        code, found = self.code, list[torch.Tensor]()
        rounds = 1 if self.total <= code.base else 2
        for place in range(rounds):
            self.refit(self.digits(numbers, place))
            for piece, words in enumerate(self.copied()):
                digit = words.long() - code.first
                digit[(digit < 0) | (digit >= code.base)] = -1
                if place == 0:
                    found.append(digit)
                else:
                    lost = (digit < 0) | (found[piece] < 0)
                    found[piece] = (found[piece] + digit * code.base).masked_fill_(lost, -1)
        return found


def _map(engine: Engine) -> tuple[Map, Found]:
    """Where each element lies, and what was found."""
    total = engine.total
    numbers = torch.arange(total, device="cuda")
    up = engine.read(numbers)
    down = engine.read(total - 1 - numbers)
    places: Map = {}
    seen = torch.zeros(total, dtype=torch.int32, device="cuda")
    for piece, (one, other) in enumerate(zip(up, down, strict=True)):
        where = ((one >= 0) & (one + other == total - 1)).nonzero().flatten()
        if len(where):
            places[piece] = where, one[where]
            seen.index_add_(0, one[where], torch.ones_like(where, dtype=torch.int32))
    parts = seen.split(engine.counts)
    lost = {n: int((p == 0).sum()) for n, p in zip(engine.coded, parts, strict=True)}
    return places, {
        "elements": total,
        "found": int((seen > 0).sum()),
        "found more than once": int((seen > 1).sum()),
        "weights": len(lost),
        "weights with none lost": sum(not count for count in lost.values()),
        "lost, for example": dict([(n, c) for n, c in lost.items() if c][:4]),
        "bytes of pieces": [len(words) * engine.code.word.itemsize for words in up],
        "pieces with weights": list(places),
        "pairs of neighbours in order": sum(int((e.diff() == 1).sum()) for _, e in places.values()),
        "weights in one piece": _whole(engine, places),
    }


def _whole(engine: Engine, places: Map) -> Found:
    """How many weights, and how many bytes of all, lie in order and without gaps."""
    at = torch.full((engine.total,), -1, device="cuda")
    for where, element in places.values():
        at[element] = where
    whole = [
        bool((part.diff() == 1).all()) and bool((part >= 0).all())
        for part in at.split(engine.counts)
    ]
    elements = sum(n for n, one in zip(engine.counts, whole, strict=True) if one)
    return {"weights": sum(whole), "share of elements": elements / engine.total}


def _others(engine: Engine, two: Two, places: Map, outputs: tuple[torch.Tensor, ...]) -> Found:
    """What else answers after a direct write: later contexts, saved bytes, other engines."""
    a, b = engine.values
    out_a, out_b = outputs
    engine.refit(a)
    after_a = engine.copied()
    engine.write(places, engine.flat(b))
    found: Found = {
        "a context made later answers B": same_bits(
            engine.call(engine.engine.create_execution_context()), out_b
        )
    }
    saved = Known(
        two, refitter.serialize_engine(engine.engine, upstream.tensorrt()), engine.code.word
    )
    answer = saved.call()
    found["bytes that are saved then answer"] = (
        "B" if same_bits(answer, out_b) else "A" if same_bits(answer, out_a) else "neither"
    )
    del saved
    fresh = Known(two, engine.data, engine.code.word)
    answer = fresh.call()
    found["a new engine of the first bytes answers A"] = same_bits(answer, out_a)
    memory = fresh.copied()
    found["its pieces are as large"] = [len(one) for one in memory] == [len(one) for one in after_a]
    if found["its pieces are as large"]:
        found["words of weights that differ there, with A"] = sum(
            int((memory[piece][where] != after_a[piece][where]).sum())
            for piece, (where, _) in places.items()
        )
        fresh.write(places, engine.flat(b))
        found["B written there, never refitted, bit-equal"] = same_bits(fresh.call(), out_b)
        fresh.write(places, engine.flat(a))
        found["and A again"] = same_bits(fresh.call(), out_a)
    return found


def _folded(engine: Engine, after: list[torch.Tensor], values: Values) -> Found:
    """Of normalizations: whether scales and shifts lie there as float32 arithmetic gives them."""
    words = torch.cat(after)
    found: Found = {"scales": 0, "shifts": 0, "shifts, fused": 0, "normalizations": 0}
    ends = ("weight", "bias", "running_mean", "running_var", "eps")
    stems = {n.rsplit("_weight", 1)[0] for n in engine.coded if "norm" in n and "_weight" in n}
    for stem in sorted(stems):
        by_end = {
            e: next((v for n, v in values.items() if n.startswith(f"{stem}_{e}")), None)
            for e in ends
        }
        if any(one is None for one in by_end.values()):
            continue
        w, b, mean, var, eps = (one.reshape(-1) for one in by_end.values() if one is not None)
        scale = w / (var + eps).sqrt()
        shift = b - mean * scale
        fused = (b.double() - mean.double() * scale.double()).float()
        found["normalizations"] += w.numel()
        for name, made in (("scales", scale), ("shifts", shift), ("shifts, fused", fused)):
            found[name] += int(torch.isin(made.view(torch.int32), words).sum())
    return found


def _probed(model: str, dtype: torch.dtype = torch.float32) -> Found:
    torch.cuda.init()
    two = Two(model, dtype)
    engine = Engine(two)
    a, b = engine.values
    places, found = _map(engine)
    engine.refit(a)
    before, out_a = engine.copied(), engine.call()
    engine.refit(b)
    after, out_b = engine.copied(), engine.call()
    found["words that TensorRT's refit changes"] = _differing(before, after, places)
    engine.refit(a)
    found["A by TensorRT, again bit-equal"] = same_bits(engine.call(), out_a)
    engine.refit(a)
    engine.write(places, engine.flat(b))
    found["words that differ from it after a direct write"] = _differing(
        engine.copied(), after, places
    )
    found["B written directly, bit-equal"] = same_bits(engine.call(), out_b)
    engine.write(places, engine.flat(a))
    found["A written directly, bit-equal"] = same_bits(engine.call(), out_a)
    found["A is not B"] = not same_bits(out_a, out_b)
    found["error of B"] = two.error(out_b, 1)
    if dtype is torch.float32:
        found["folded"] = _folded(engine, after, b)
    found["others"] = _others(engine, two, places, (out_a, out_b))
    found["ms"] = _times(engine, places)
    return found


def _differing(one: list[torch.Tensor], other: list[torch.Tensor], places: Map) -> int:
    return sum(int((one[piece] != other[piece]).sum()) for piece in places)


def _times(engine: Engine, places: Map) -> Found:
    a, b = engine.values
    flat = engine.flat(a), engine.flat(b)
    spare = torch.empty_like(flat[0])
    timed = {
        "copy": lambda n: spare.copy_(flat[n % 2]),
        "direct, by places": lambda n: engine.write(places, flat[n % 2]),
        "refit": lambda n: engine.refit((a, b)[n % 2]),
    }
    found = {name: statistics.median(many(call, 10, 2.0)) * 1e3 for name, call in timed.items()}
    return {**found, "wait": seconds(lambda: None) * 1e3}
