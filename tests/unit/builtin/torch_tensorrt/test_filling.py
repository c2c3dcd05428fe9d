"""Filling arenas again and again with values that are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.direct.moves import Mover
from refitkit.builtin.torch_tensorrt.filling import Filler
from refitkit.builtin.torch_tensorrt.refitter import spec_of_slot
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena, Layout, Uploader
from refitkit.errors import WeightMismatchError
from refitkit.program.bits import same_bits
from refitkit.protocols import SlotValue, SteadyValues
from tests.fakes import slot_for
from tests.interrupting import Interrupt, Points
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

    def __init__(self, kind: str, *, pinned: str = "") -> None:
        layout, values, piece = layout_and_values()
        self.specs = {n: spec_of_slot(slot_for(n, v, "e")) for n, v in values.items()}
        if kind == "placed":
            self.arenas: list[Any] = [arena_of(layout, values, piece) for _ in "ab"]
            mover = Mover(CPU, kernel=True)
            mover._kernels = object()  # queues, and then moves by torch
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
        self.filler.fill(arena, self.specs, self.values)
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
