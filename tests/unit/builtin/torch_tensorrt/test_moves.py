"""Moves of values to the places where an engine keeps them, by torch and by the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refitkit.builtin.torch_tensorrt.direct import arena, moves
from refitkit.builtin.torch_tensorrt.direct.folds import Fold, FoldsAtOnce
from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout, Parts
from refitkit.builtin.torch_tensorrt.direct.moves import (
    Mover,
    dense_digits_of,
    digits_of,
    is_plain,
)
from refitkit.builtin.torch_tensorrt.direct.places import Place
from refitkit.builtin.torch_tensorrt.direct.screening import Screen
from refitkit.builtin.torch_tensorrt.filling import Filler
from refitkit.builtin.torch_tensorrt.refitter import spec_of_slot
from refitkit.builtin.torch_tensorrt.weight_buffers import Constant, Uploader
from refitkit.program.bits import same_bits
from refitkit.protocols import SlotValue
from tests.fakes import slot_for
from tests.unit.builtin.torch_tensorrt.fake_kernels import FakeKernels, NoKernels
from tests.unit.builtin.torch_tensorrt.scenes import CPU


def value_and_place(
    rng: Random, dtype: torch.dtype, start: int, sizes: list[int]
) -> tuple[torch.Tensor, Place, int]:
    """A value with some strides, where it lies with others, and the end of that."""
    dims = list(range(len(sizes)))
    inner = rng.sample(dims, len(dims))
    stored = torch.randn([sizes[d] for d in inner]).to(dtype)
    value = stored.permute([inner.index(d) for d in dims])
    strides, step = [0] * len(dims), rng.choice([1, 1, 2])
    for d in rng.sample(dims, len(dims)):
        strides[d] = step
        step = step * sizes[d] + rng.choice([0, 0, 1])
    digits = [(n, s) for n, s in zip(sizes[::-1], strides[::-1], strict=True) if n > 1]
    return value, Place(start, tuple(digits)), start + step


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12]), max_size=4)


@given(seed=st.integers(0, 10**6), sizes=SIZES)
@settings(deadline=None, max_examples=200)
def test_digits_name_the_same_element_on_both_sides(seed: int, sizes: list[int]) -> None:
    value, place, end = value_and_place(Random(seed), torch.float32, 5, sizes)  # noqa: S311
    digits = digits_of(tuple(value.shape), value.stride(), place)
    if digits is None:
        value, digits = value.contiguous().view(-1), dense_digits_of(place)
    memory = torch.zeros(end + 8)
    source = value.as_strided([d.size for d in digits], [d.source for d in digits])
    memory.as_strided([d.size for d in digits], [d.target for d in digits], place.start).copy_(
        source
    )
    assert same_bits(place.of_piece(memory).reshape(-1), value.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "strides", "digits", "plain"),
    [
        ((), (), (), True),
        ((6,), (1,), ((6, 1),), True),
        ((2, 3), (3, 1), ((6, 1),), True),
        ((2, 3), (1, 2), ((3, 2), (2, 1)), True),  # transposed on both sides
        ((2, 3), (3, 1), ((3, 2), (2, 1)), False),
        ((2, 3, 4), (12, 1, 3), ((4, 3), (3, 1), (2, 12)), True),
        ((6,), (2,), ((6, 1),), False),
        ((6,), (0,), ((6, 1),), False),
    ],
)
def test_moves_that_are_plain_copies(shape: Any, strides: Any, digits: Any, plain: bool) -> None:
    found = digits_of(shape, strides, Place(0, digits))
    assert found is not None
    assert is_plain(found) == plain


def test_digits_that_do_not_fit_one_another() -> None:
    place = Place(0, ((4, 1), (3, 10)))
    assert digits_of((4, 3), (1, 4), place) is None
    assert digits_of((12,), (1,), place) is not None


def test_values_are_divided_as_integers() -> None:
    """The kernel multiplies instead; see ``kernel._offsets``."""
    numbers = torch.randint(0, (1 << 31) - 1, (1000,))
    for divisor in (1, 2, 3, 7, 9, 10, 64, 641, 3072, 65535, (1 << 30) + 1):
        magic, shift = moves._divider(divisor)
        assert -(1 << 31) <= magic < 1 << 31
        high = numbers * (magic % (1 << 32)) >> 32
        assert torch.equal((high + numbers) >> shift, numbers // divisor)


KERNEL = """
import random, sys, torch
from refitkit.builtin.torch_tensorrt.direct import moves
from refitkit.builtin.torch_tensorrt.direct.folds import Fold, FoldsAtOnce
from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout, Parts
from refitkit.builtin.torch_tensorrt.direct.moves import Mover
from refitkit.builtin.torch_tensorrt.direct.places import Place, words_of
from refitkit.builtin.torch_tensorrt.direct.screening import Sample, Screen
from refitkit.program.bits import same_bits
from tests.unit.builtin.torch_tensorrt.test_moves import value_and_place
kinds = set()
for seed in range(25):
    rng = random.Random(seed)
    mover = Mover(torch.device("cpu"), kernel=True)
    found, wanted = (torch.zeros(1 << 18, dtype=torch.uint8) for _ in "ab")
    kept, start, dtype = [], 3, rng.choice([torch.float32, torch.float16])
    for _ in range(4):
        sizes = rng.choices([1, 2, 3, 5, 9, 65, 70], k=rng.randint(1, 2))
        sizes += rng.choices([1, 2, 3], k=rng.randint(0, 2))
        start += -start % rng.choice([1, 8])
        value, place, start = value_and_place(rng, dtype, start, sizes)
        if seed % 2:  # at an odd address
            memory = torch.zeros(value.numel() + 1, dtype=dtype)
            odd = memory.as_strided(value.shape, value.stride(), 1)
            value = odd.copy_(value)
        name = str(len(kept))
        way = mover.way(name, place, value)
        if way is None:
            value = value.contiguous().view(-1)
            way = mover.way(name, place, value)
        moves._copy(wanted, place, value)
        mover.add(found, way, value)
        kept.append(value)
    kinds |= set(mover._queue)
    mover.finish(found)
    assert mover.kernels and torch.equal(found, wanted), seed
    size = dtype.itemsize
    ranges = [(16, 48), (64, 64 + size), (20000, 60000 + 3 * size)]
    source, target = torch.arange(1 << 18).to(torch.uint8), torch.zeros(1 << 18, dtype=torch.uint8)
    padded = Place(100000 // size, ((3, 1), (5, 4), (7, 40)))
    parts = Parts(ranges, [(padded, dtype)])
    copy = moves.PieceCopy(parts, source, target, mover)
    copy()
    assert copy._launches
    for a, b in ranges:
        assert torch.equal(target[a:b], source[a:b])
        target[a:b] = 0
    found, wanted = (padded.of_piece(words_of(m, dtype)) for m in (target, source))
    assert same_bits(found, wanted)
    found.zero_()
    assert not target.any()
    values = [torch.randn(n).to(dtype) for n in (1, 70, 5000)]
    answer = torch.zeros(1, dtype=torch.int32)
    screen = Screen(values, answer, moves._kernels())
    screen.ask()
    assert not answer
    values[seed % 3][-1] = float("-inf")
    screen.ask()
    assert answer and screen._launches
    answer.zero_()
    place = Place(3, ((70, 80), (80, 1)) if seed % 3 else ((9, 1),))
    layout = EngineLayout(0, 1 << 18, {"w": place}, {"w": dtype})
    mine, other = source, source.clone()
    sample = Sample(layout, mine, answer, moves._kernels())
    end = 3 + place.count
    other[: 3 * size] += 1
    other[end * size :] += 1
    sample.ask(other)
    assert not answer
    other[rng.randrange(3 * size, end * size)] += 1
    sample.ask(other)
    assert answer and sample._launch._kernel
    folds = [Fold(*(f"{end}{n}" for end in "wbmve")) for n in range(2)]
    run, places, start = torch.rand(2200).add(0.01).to(dtype), {}, 0
    values = {}
    for n, count in enumerate((5, 400)):
        for end in "wbmv":
            values[f"{end}{n}"] = run[start : start + count]
            start += count
        values[f"e{n}"] = run[start : start + 1]
        start += 1
        places[f"w{n}"] = Place(900 * n, ((count, 2),))
        places[f"b{n}"] = Place(900 * n + 1, ((count, 2),))
    found, wanted = torch.zeros(2000, dtype=dtype), torch.zeros(2000, dtype=dtype)
    folding = FoldsAtOnce(folds, places, values, {dtype: run}, moves._kernels())
    folding.write({dtype: found})
    assert folding._launches[dtype]._kernel
    FoldsAtOnce(folds, places, values, {dtype: run}).write({dtype: wanted})
    assert same_bits(found, wanted) and wanted.count_nonzero() == 4 * 405 // 2
print(len(kinds))
"""


def test_the_kernel_moves_what_torch_moves() -> None:
    """Triton's interpreter runs it without a GPU, if that is asked for before it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 12  # kinds of launches


def test_a_kernel_that_cannot_be_compiled_is_not_needed() -> None:
    mover = Mover(CPU, kernel=True)
    mover._kernels = NoKernels
    value, place = torch.arange(6.0).view(2, 3), Place(0, ((3, 2), (2, 1)))
    piece = torch.zeros(24, dtype=torch.uint8)
    way = mover.way("w", place, value)
    assert way is not None
    mover.add(piece, way, value)
    assert not piece.any()
    mover.finish(piece)
    assert piece.view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]
    assert not mover.kernels


@pytest.mark.parametrize("kernel", [True, False])
def test_ranges_are_copied_without_a_kernel(kernel: bool) -> None:
    target = torch.zeros(9, dtype=torch.uint8)
    parts = Parts([(1, 3), (5, 8)], [])  # no words of 2 bytes
    mover = Mover(CPU, kernel=kernel)
    moves.PieceCopy(parts, torch.arange(9).to(torch.uint8), target, mover)()
    assert target.tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 0]


# -- values beside the engine ---------------------------------------------------------------------

NORM = Fold("w", "b", "m", "v", "e")


def layout_and_values() -> tuple[EngineLayout, dict[str, torch.Tensor], torch.Tensor]:
    """A weight that lies transposed, a folded norm, an integer; and memory with other bytes."""
    places = {
        "a": Place(2, ((3, 4), (4, 1))),
        "w": Place(20, ((5, 1),)),
        "b": Place(30, ((5, 2),)),
    }
    dtypes = dict.fromkeys(places, torch.float32)
    g = torch.Generator().manual_seed(0)
    values = {
        "a": torch.randn(4, 3, generator=g),
        **{name: torch.rand(5, generator=g) + 0.5 for name in "wbmv"},
        "e": torch.tensor([1e-3]),
        "i": torch.tensor([1, 2], dtype=torch.int32),
    }
    layout = EngineLayout(0, 200, places, dtypes, (NORM,), frozenset("i"))
    return layout, values, torch.arange(200, dtype=torch.uint8)


def arena_of(
    layout: EngineLayout, values: dict[str, torch.Tensor], piece: torch.Tensor
) -> arena.PlacedArena:
    specs = {name: spec_of_slot(slot_for(name, value, "e")) for name, value in values.items()}
    parts = layout.parts(CPU)
    found = arena.PlacedArena(
        layout, {n: s for n, s in specs.items() if s is not None}, piece, parts, Mover(CPU)
    )
    uploader = Uploader(CPU)
    for name, value in values.items():
        found.copy(name, value, uploader)
    found.finish(uploader)
    return found


def test_an_arena_is_laid_out_as_the_engine() -> None:
    layout, values, piece = layout_and_values()
    found = arena_of(layout, values, piece)
    for name, value in values.items():
        assert same_bits(found.value(name), value), name
    found.fold()
    wanted = piece.clone()
    layout.write(wanted, values)
    assert torch.equal(found.memory, wanted)
    other = arena_of(layout, {**values, "m": values["m"] + 1}, piece)
    assert not found.same(other)
    other.copy_from(found)
    assert found.same(other)
    assert same_bits(other.value("m"), values["m"])


def test_values_of_other_strides_go_their_own_way() -> None:
    layout, values, piece = layout_and_values()
    found = arena_of(layout, values, piece)
    uploader = Uploader(CPU)
    for seed in range(3):
        new = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).T
        for value in (new, new.contiguous(), new[:, :1].expand(4, 3), torch._neg_view(new)):
            found.begin(uploader)
            found.copy("a", value, uploader)
            found.finish(uploader)
            assert same_bits(found.value("a"), value.contiguous())
    assert len([key for key in found._mover.ways if key[0] == "a"]) == 3


@pytest.mark.parametrize("name", ["a", "m", "w"])
def test_what_is_not_finite_is_seen(name: str) -> None:
    layout, values, piece = layout_and_values()
    assert arena_of(layout, values, piece).is_finite()
    values[name] = torch.full_like(values[name], float("inf"))
    assert not arena_of(layout, values, piece).is_finite()


def test_bytes_between_the_weights_that_are_no_numbers_mean_nothing() -> None:
    layout, values, piece = layout_and_values()
    piece[16 * 4 : 17 * 4] = 255  # a NaN
    assert arena_of(layout, values, piece).is_finite()
    values["b"][3] = float("nan")  # lies with gaps
    assert not arena_of(layout, values, piece).is_finite()


def test_a_fixed_weight_that_the_engine_holds_may_be_infinite() -> None:
    layout, values, piece = layout_and_values()
    values["i"] = torch.tensor([1.0, -float("inf")])  # as a mask has it
    found = arena_of(layout, values, piece)
    assert not found.is_finite()
    found.accepted = found.fixed.memory
    assert found.is_finite()


def asked(screen: Screen, answer: torch.Tensor) -> bool:
    answer.zero_()
    screen.ask()
    return bool(answer)


WORDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("kernels", [None, FakeKernels])
@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_a_screen_finds_what_is_not_finite(dtype: torch.dtype, kernels: Any) -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=g).to(dtype) for n in (1, 7, 5000)]
    values += [torch.ones(4, 6, dtype=dtype)[:, ::2], torch.arange(9)]
    answer = torch.zeros(1, dtype=torch.int32)
    screen = Screen(values, answer, kernels)
    assert not asked(screen, answer)
    for value in values[:-1]:
        for bad in (float("nan"), float("inf"), -float("inf")):
            at = value.view(-1)[-1:] if value.is_contiguous() else value[-1, -1:]
            kept = at.clone()
            at.fill_(bad)
            assert asked(screen, answer)
            at.copy_(kept)
    values[2].fill_(torch.finfo(dtype).max)
    assert asked(screen, answer) == (kernels is None and dtype != torch.float16)


def test_a_screen_finds_nothing_out_about_bytes() -> None:
    answer = torch.zeros(1, dtype=torch.int32)
    assert asked(Screen([torch.ones(3).to(torch.float8_e4m3fn)], answer, FakeKernels), answer)


def test_a_screen_goes_on_without_kernels() -> None:
    values = [torch.ones(3), torch.ones(3)]
    answer = torch.zeros(1, dtype=torch.int32)
    screen = Screen(values, answer, NoKernels)
    assert not asked(screen, answer)
    values[0][1] = float("nan")
    assert asked(screen, answer)


# -- what a commit copies -------------------------------------------------------------------------


def padded_layout(count: int) -> tuple[EngineLayout, int]:
    """Rows of three elements in four; two weights that fill each other's gaps; a plain one."""
    places = {
        "padded": Place(8, ((3, 1), (count, 4))),
        "even": Place(8 + 4 * count, ((2 * count, 2),)),
        "odd": Place(9 + 4 * count, ((2 * count, 2),)),
        "plain": Place(8 + 8 * count, ((999, 1),)),
    }
    layout = EngineLayout(0, 2 * (9000 + 8 * count), places, dict.fromkeys(places, torch.float16))
    return layout, count


@pytest.mark.parametrize(("count", "scattered"), [(100, False), (3000, True)])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_commit_copies_the_weights_and_nothing_else(
    count: int, scattered: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "_kernels", lambda: FakeKernels)
    layout, _ = padded_layout(count)
    parts = layout.parts(CPU)
    assert parts.scattered == ([(layout.places["padded"], torch.float16)] if scattered else [])
    assert len(parts.ranges) == (1 if scattered else count + 1)
    g = torch.Generator().manual_seed(0)
    source, target = (
        torch.randint(0, 256, (layout.nbytes,), generator=g).to(torch.uint8) for _ in "ab"
    )
    wanted = target.clone()
    views, kept = layout.views(wanted), layout.views(source)
    for name, view in views.items():
        view.view(torch.int16).copy_(kept[name].view(torch.int16))
    copy = moves.PieceCopy(parts, source, target, Mover(CPU, kernel=kernel))
    copy()
    assert torch.equal(target, wanted)
    assert copy.is_fast
    assert bool(copy._launches) == kernel


@pytest.mark.parametrize("kernels", [None, FakeKernels, NoKernels])
def test_folds_at_once_are_those_one_by_one(kernels: Any) -> None:
    folds = [Fold(*(f"{end}{n}" for end in "wbmve")) for n in range(3)]
    g = torch.Generator().manual_seed(0)
    run = torch.rand(200, generator=g) + 0.1
    values, places, at = {}, {}, 7
    for number, fold in enumerate(folds):
        count = 4 + number
        for name in (fold.weight, fold.bias, fold.mean, fold.var):
            values[name], at = run[at : at + count], at + count
        values[fold.eps], at = run[at : at + (count if number else 1)], at + count
        places[fold.weight] = Place(20 * number, ((count, 2),))
        places[fold.bias] = Place(20 * number + 1, ((count, 2),))
    words = torch.zeros(60)
    folding = FoldsAtOnce(folds, places, values, {torch.float32: run}, kernels)
    folding.write({torch.float32: words})
    for fold in folds:
        assert same_bits(places[fold.weight].of_piece(words), fold.scale(values))
        assert same_bits(places[fold.bias].of_piece(words), fold.shift(values))


def test_moves_that_an_interrupt_has_left_are_never_made() -> None:
    layout, values, piece = layout_and_values()
    found = arena_of(layout, values, piece)
    found._mover = Mover(CPU, kernel=True)
    found._mover._kernels = NoKernels  # queues, and then moves by torch
    specs, uploader = found._specs, Uploader(CPU)
    left = torch.full((4, 3), 7.0)
    found.copy("a", left, uploader)
    found.copy("i", torch.tensor([8, 8], dtype=torch.int32), uploader)  # and no finish
    slot = slot_for("b", values["b"], "e")
    Filler(uploader).fill(found, specs, [SlotValue(slot, "test", (), lambda: torch.zeros(5))])
    assert found.value("b").tolist() == [0.0] * 5
    assert same_bits(found.value("a"), values["a"])
    assert same_bits(found.value("i"), values["i"])


def test_a_rehearsal_takes_the_usual_way_and_leaves_nothing() -> None:
    layout, values, piece = layout_and_values()
    found, other = (arena_of(layout, values, piece) for _ in "ab")
    found._mover = Mover(CPU)
    found.constants["i"] = Constant(values["i"], 0)
    found.rehearse(Uploader(CPU))
    assert not found.constants  # else a filling would believe that it is there
    assert found.value("a").count_nonzero() == 0
    assert ("a", (3, 1)) in found._mover.ways
    uploader = Uploader(CPU)
    for name, value in values.items():
        found.copy(name, value, uploader)
    found.finish(uploader)
    assert found.same(other)


def test_what_lies_between_the_weights_is_no_difference() -> None:
    layout, values, piece = layout_and_values()
    found, other = (arena_of(layout, values, piece) for _ in "ab")
    other.memory[16 * 4] += 1
    assert found.same(other)
    other.memory[2 * 4] += 1  # of a weight
    assert not found.same(other)
