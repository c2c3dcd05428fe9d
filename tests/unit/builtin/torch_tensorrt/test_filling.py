"""Filling arenas again and again with values that are alike."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.direct.moves import Mover
from refitkit.builtin.torch_tensorrt.direct.places import Place
from refitkit.builtin.torch_tensorrt.filling import Filler
from refitkit.builtin.torch_tensorrt.refitter import spec_of_slot
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena, Layout, Uploader
from refitkit.errors import WeightMismatchError
from refitkit.program.bits import same_bits
from refitkit.protocols import SlotValue, SteadyValues
from tests.fakes import slot_for
from tests.interrupting import Interrupt, Points
from tests.unit.builtin.torch_tensorrt.fake_kernels import FakeKernels
from tests.unit.builtin.torch_tensorrt.scenes import CPU
from tests.unit.builtin.torch_tensorrt.test_moves import arena_of, layout_and_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Filling:
    """Two arenas of one kind, one filler, and steady values of tensors that are exchanged.

    Attributes:
        now: The tensors that the values load.
        copied: Names of values that were copied one by one.
    """

    def __init__(
        self, kind: str, *, pinned: str = "", computed: str = "", given: Any = None
    ) -> None:
        layout, values, piece = given or layout_and_values()
        self.specs = {n: spec_of_slot(slot_for(n, v, "e")) for n, v in values.items()}
        if kind == "placed":
            self.arenas: list[Any] = [arena_of(layout, values, piece) for _ in "ab"]
            mover = Mover(CPU, kernel=True)
            mover._kernels = FakeKernels
            for one in self.arenas:
                one._mover = mover
        else:
            self.arenas = [Arena(Layout.of(self.specs.values()), CPU) for _ in "ab"]
        self.now: dict[str, torch.Tensor] = values
        self.filler = Filler(Uploader(CPU))
        self.values = SteadyValues(
            SlotValue(
                slot_for(name, value, "e"),
                "test",
                (),
                lambda name=name: self.now[name],
                identity=name != computed,
                pinned=name == pinned,
            )
            for name, value in values.items()
        )
        self.copied: list[str] = []
        for arena in self.arenas:
            real = arena.copy
            arena.copy = lambda name, *rest, real=real: (
                self.copied.append(name),
                real(name, *rest),
            )

    def _counted(self, real: Callable[..., None]) -> Callable[..., None]:
        def copy(name: str, *rest: Any) -> None:
            self.copied.append(name)
            real(name, *rest)

        return copy

    def fill(self, number: int, values: Mapping[str, torch.Tensor] | None = None) -> Any:
        self.now = {**self.now, **(values or {})}
        arena = self.arenas[number % 2]
        self.copied.clear()
        self.filler.fill(arena, self.specs, self.values, self.arenas[1 - number % 2])
        for name, value in self.now.items():
            assert same_bits(arena.value(name), value), name
        return arena

    def others(self, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {
            name: (torch.rand(value.shape, generator=g) * 9 + 1).to(value.dtype)
            for name, value in self.now.items()
        }


@pytest.fixture(params=["placed", "plain"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_the_same_values_again_are_copied_as_before(kind: str) -> None:
    filling = Filling(kind)
    for number in range(6):
        filling.fill(number, filling.others(number))
    if kind == "placed":  # two fillings of each arena find out how
        assert len(filling.copied) < len(filling.values)


def test_an_engine_is_asked_once_whether_names_fit(kind: str) -> None:
    filling = Filling(kind)
    assert not filling.filler.knows(filling.values)
    filling.fill(0)
    assert filling.filler.knows(filling.values)
    assert not filling.filler.knows(SteadyValues(filling.values))
    assert not filling.filler.knows(list(filling.values))
    filling.filler.forget()
    assert not filling.filler.knows(filling.values)


def test_other_values_in_between(kind: str) -> None:
    filling = Filling(kind)
    for number in range(4):
        filling.fill(number, filling.others(number))
    name = next(iter(filling.now))
    single = [one for one in filling.values if one.slot.name == name]
    filling.now = {**filling.now, **filling.others(9)}
    filling.filler.fill(filling.arenas[0], filling.specs, single)
    assert same_bits(filling.arenas[0].value(name), filling.now[name])
    for number in range(4):
        filling.fill(number, filling.others(20 + number))


def test_constants_of_the_plan_are_copied_when_they_change(kind: str) -> None:
    filling = Filling(kind, pinned="a")
    for number in range(4):
        others = filling.others(number)
        del others["a"]
        filling.fill(number, others)
    assert "a" not in filling.copied
    filling.now["a"].add_(1)
    filling.fill(0)
    assert "a" in filling.copied
    filling.fill(1)
    filling.fill(2)
    assert "a" not in filling.copied


def test_a_constant_that_lies_where_a_weight_goes_is_forgotten(kind: str) -> None:
    filling = Filling(kind)
    for number in range(4):
        filling.fill(number, filling.others(number))
    held = filling.now["a"].clone()
    pinned = SlotValue(filling.values[0].slot, "test", (), lambda: held, pinned=True)
    assert pinned.slot.name == "a"
    Filler(Uploader(CPU)).fill(filling.arenas[0], filling.specs, [pinned])
    assert "a" in filling.arenas[0].constants
    filling.fill(0, filling.others(7))
    assert "a" not in filling.arenas[0].constants


def test_values_that_did_not_fit_are_checked_again(kind: str) -> None:
    filling = Filling(kind)
    good, bad = filling.others(1), filling.others(2)
    bad["a"] = bad["a"].double()
    for _ in range(3):
        with pytest.raises(WeightMismatchError, match="do not fit") as info:
            filling.fill(0, bad)
        assert [problem.subject for problem in info.value.problems] == ["a"]
        assert not filling.filler.knows(filling.values)
    filling.fill(0, good)


@pytest.mark.parametrize("pinned", ["", "w"])
@pytest.mark.parametrize("before", [0, 2, 3], ids=lambda n: f"after {n}")
def test_a_filling_after_an_interrupted_one_is_right(kind: str, pinned: str, before: int) -> None:
    """Interrupt each line of one filling, and look at the two after it."""

    def others(filling: Filling, seed: int) -> dict[str, torch.Tensor]:
        return {n: v for n, v in filling.others(seed).items() if n != pinned}

    at, interrupted = 0, True
    while interrupted:
        filling = Filling(kind, pinned=pinned)
        for number in range(before):
            filling.fill(number, others(filling, number))
        filling.now = {**filling.now, **others(filling, 7)}
        interrupted = False
        try:
            with Points(
                at, lambda name: "/torch_tensorrt/" in name and "/tests/" not in name, lines=True
            ):
                filling.filler.fill(filling.arenas[before % 2], filling.specs, filling.values)
        except Interrupt:
            interrupted = True
            torch.set_grad_enabled(True)  # it may have come before the end of ``no_grad``
        for number in (before, before + 1):
            filling.fill(number, others(filling, 20 + number))
        at += 2


# -- all values together --------------------------------------------------------------------------


def settled() -> Filling:
    """A filling of which both arenas have noted how values are copied."""
    filling = Filling("placed")
    for number in range(4):
        filling.fill(number, filling.others(number))
    return filling


def folded(arena: Any) -> torch.Tensor:
    """What a commit would copy."""
    found: torch.Tensor = arena.memory.clone()
    arena._layout.write(found, {name: arena.value(name) for name in arena._specs})
    return found


def test_alike_values_are_moved_and_folded_together() -> None:
    filling = settled()
    for number in range(4):
        arena = filling.fill(number, filling.others(30 + number))
        assert filling.copied == ["e"]  # a single element
        assert arena._is_folded
        assert torch.equal(arena.memory, folded(arena))


@pytest.mark.parametrize("name", ["a", "m", "w", "e"])
def test_values_that_are_not_finite_are_seen_at_once(name: str) -> None:
    filling = settled()
    good = filling.others(40)
    assert filling.fill(0, good).is_finite()
    bad = {**good, name: torch.full_like(good[name], float("nan"))}
    assert not filling.fill(1, bad).is_finite()
    assert filling.fill(0, good).is_finite()


@pytest.mark.parametrize("name", ["a", "b", "v", "i"])
def test_the_same_values_are_told_from_others(name: str) -> None:
    filling = settled()
    values = filling.others(50)
    first = filling.fill(0, values)
    second = filling.fill(1, {n: v.clone() for n, v in values.items()})
    assert second.same(first)
    assert first.same(second)
    third = filling.fill(0, {name: values[name] + 1})
    assert not third.same(second)


def test_values_are_compared_as_the_engine_would_hold_them() -> None:
    layout, values, piece = layout_and_values()
    places = {"w": layout.places["w"], **layout.places}  # a norm that is folded comes first
    filling = Filling("placed", given=(replace(layout, places=places), values, piece))
    for number in range(4):
        filling.fill(number, filling.others(number))
    others = filling.others(5)
    filling.now = {**filling.now, **others}
    filling.filler.fill(filling.arenas[1], filling.specs, filling.values)  # folds no norm
    assert not filling.arenas[1]._is_folded
    again = filling.fill(0, {name: value.clone() for name, value in others.items()})
    assert again.same(filling.arenas[1])


def test_a_weight_that_stays_fixed_is_compared_again_once_it_was_moved() -> None:
    filling = settled()
    arena = filling.fill(0, filling.others(60))
    arena.accepted = arena.fixed.memory  # as a writer does that has compared it
    assert filling.fill(0, filling.others(61)).accepted is None


def test_answers_are_those_of_the_present_values() -> None:
    filling = settled()
    first, second = filling.fill(0, filling.others(1)), filling.fill(1, filling.others(2))
    assert not second.same(first)
    second.copy_from(first)
    assert second.same(first)
    second = filling.fill(1, filling.others(3))
    assert second.is_finite()
    uploader = Uploader(CPU)
    second.copy("m", torch.full((5,), float("inf")), uploader)
    second.finish(uploader)
    assert not second.is_finite()


def test_kernels_that_fail_are_not_needed() -> None:
    filling = settled()
    for arena in filling.arenas:
        arena._mover._kernels = None
        for table in arena._alike.moves._tables:
            table._launch._kernel = None
    for number in range(6):
        filling.fill(number, filling.others(80 + number))
    assert filling.arenas[0]._alike.rest == list(range(7))


def test_values_are_compared_with_the_arena_that_holds_the_live_values() -> None:
    filling = settled()
    first = filling.arenas[0]
    filling.arenas[1] = new = Filling("placed").arenas[1]
    new._mover = first._mover
    values = filling.others(90)
    filling.fill(1, values)
    assert filling.fill(0, {n: v.clone() for n, v in values.items()}).same(new)
    assert not filling.fill(0, filling.others(91)).same(new)


def test_an_arena_keeps_no_other_one_alive() -> None:
    filling = Filling("placed")
    for number in range(6):
        filling.fill(number, filling.others(number))
    alive = weakref.ref(filling.arenas.pop())
    gc.collect()
    assert alive() is None


def test_values_at_odd_addresses_are_copied_one_by_one() -> None:
    layout, values, piece = layout_and_values()
    places = {**layout.places, "a": Place(2, ((12, 1),))}  # copied in words of 8 bytes
    filling = Filling("placed", given=(replace(layout, places=places), values, piece))
    for number in range(8):
        memory = torch.rand(13, generator=torch.Generator().manual_seed(number))
        at = int(number > 5)  # 4 bytes behind such a word
        assert bool(memory[at:].data_ptr() % 8) == bool(at)
        filling.fill(number, {**filling.others(number), "a": memory[at : at + 12].view(4, 3)})
        assert ("a" in filling.copied) == (number < 3 or at == 1)


def test_computed_values_come_before_all_others() -> None:
    filling = Filling("placed", computed="m")
    for number in range(8):
        arena = filling.fill(number, filling.others(number))
        arena.fold()
        assert torch.equal(arena.memory, folded(arena))
        assert "m" in filling.copied
    bad = torch.full((5,), float("nan"))
    assert not filling.fill(0, {"m": bad}).is_finite()


def test_a_computed_value_that_does_not_fit_is_named() -> None:
    filling = Filling("placed", computed="m")
    for number in range(6):
        filling.fill(number, filling.others(number))
    with pytest.raises(WeightMismatchError, match="do not fit") as info:
        filling.fill(0, {"m": torch.zeros(4)})
    assert [problem.subject for problem in info.value.problems] == ["m"]
    filling.fill(1, {"m": torch.rand(5)})
