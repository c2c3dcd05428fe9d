"""``made_of``: what converters declare of constants that no recording can follow."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch

import refitkit
from tests.unit.recipe.recorder import agree, like, record, truth

_address_of = torch.Tensor.data_ptr
Tensors = dict[str, torch.Tensor]


def leaves() -> Tensors:
    return {"w": torch.linspace(0.5, 3, 6), "b": torch.full((6,), 0.25)}


def read(tensor: torch.Tensor) -> list[float]:
    """The elements, read by the address: other numbers have an unknown origin after that."""
    raw = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return list(struct.unpack(f"{tensor.numel()}f", raw))


def halved(w: torch.Tensor) -> torch.Tensor:
    return torch.tensor([number / 2 for number in read(w)])


def halves(w: torch.Tensor) -> torch.Tensor:
    return w * 0.5


def test_a_formula_is_the_recipe() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return refitkit.made_of(halved(w), w, formula=halves)

    recording = record(function, leaves())
    assert (recording.state, recording.rows["y"].sources) == ("recipe", ("w",))
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_without_a_declaration_it_is_unmapped() -> None:
    assert record(lambda w, b: halved(w), leaves()).state == "unmapped"


def test_a_second_constant_has_numbers_in_its_formula_too() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            refitkit.made_of(halved(w), w, formula=halves),
            refitkit.made_of(halved(b), b, formula=halves),
        )

    recording = record(function, leaves())
    assert set(recording.states.values()) == {"recipe"}
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_numbers_outside_of_a_formula_stay_suspect() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        refitkit.made_of(halved(w), w, formula=halves)
        return w * 0.5

    assert record(function, leaves()).state == "unmapped"


def test_several_weights_and_another_shape() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        numbers = [one + two for one, two in zip(read(w), read(b), strict=True)]
        return refitkit.made_of(torch.tensor(numbers).view(2, 3), w, b, formula=torch.add).t()

    recording = record(function, leaves())
    assert recording.rows["y"].sources == ("w", "b")
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_the_weight_itself_is_a_formula() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return refitkit.made_of(torch.tensor(read(w)), w, formula=lambda w: w)

    recording = record(function, leaves())
    assert (recording.state, recording.ops) == ("recipe", [])


def test_an_array_can_be_declared() -> None:
    """TensorRT gets its memory, and a tensor on it only after it was declared."""

    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raw = ctypes.string_at(_address_of(w), w.nbytes)
        array = np.array(struct.unpack("6f", raw), dtype=np.float32) / np.float32(2)
        return torch.from_numpy(refitkit.made_of(array, w, formula=halves))

    recording = record(function, leaves())
    assert recording.state == "recipe"
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


@pytest.mark.parametrize("declared", ["name", "tensor", "computed"])
def test_without_a_formula_the_slot_is_unmapped_and_names_the_weight(declared: str) -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        of: Any = {"name": "w", "tensor": w, "computed": w.t().exp()}[declared]
        raw = ctypes.string_at(_address_of(w), w.nbytes)
        numbers = [math.tanh(number) for number in struct.unpack("6f", raw)]
        return refitkit.made_of(torch.tensor(numbers), of)

    recording = record(function, leaves())
    assert recording.state == "unmapped"
    reason = recording.rows["y"].reason
    assert reason.startswith("its converter declares that it is made of 'w' and gives no formula")


def test_what_follows_from_it_is_unmapped_too() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return refitkit.made_of(torch.tensor([1.0, 2.0]), "w").neg()

    assert "made of 'w'" in record(function, leaves()).rows["y"].reason


def test_literals_of_the_graph_are_no_weights() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = torch.arange(6.0)
        raw = ctypes.string_at(_address_of(table), table.nbytes)
        made = [torch.frombuffer(bytearray(raw), dtype=torch.float32) for _ in range(2)]
        return (
            refitkit.made_of(made[0], table, formula=lambda t: t + 0),
            refitkit.made_of(made[1], table),
        )

    recording = record(function, leaves())
    assert set(recording.states.values()) == {"frozen"}
    assert not any(row.unseen for row in recording.rows.values())


WRONG: dict[str, tuple[Any, Any]] = {
    "another formula": (lambda w, c: refitkit.made_of(c, w, formula=torch.exp), "other bits"),
    "one sign": (
        lambda w, c: refitkit.made_of(torch.tensor([-0.0]), w, formula=lambda w: w[:1] * 0),
        "other bits",
    ),
    "another dtype": (
        lambda w, c: refitkit.made_of(c, w, formula=lambda w: halves(w).double()),
        "dtype or size",
    ),
    "another size": (
        lambda w, c: refitkit.made_of(c, w, formula=lambda w: halves(w)[1:]),
        "dtype or size",
    ),
    "no tensor": (lambda w, c: refitkit.made_of(c, w, formula=lambda w: 1.0), "not a tensor"),
    "no weight": (lambda w, c: refitkit.made_of(c, "v"), "no weight of the program"),
    "no weights": (lambda w, c: refitkit.made_of(c), "names no weight"),
    "a formula of names": (lambda w, c: refitkit.made_of(c, "w", formula=halves), "a name"),
    "a number": (lambda w, c: refitkit.made_of(c, 1.0), "not a tensor"),  # type: ignore[arg-type]
    "no origin": (
        lambda w, c: refitkit.made_of(c, torch.frombuffer(bytearray(4), dtype=torch.float32)),
        "unknown origin",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_broken_declaration_is_an_error(name: str) -> None:
    function, kind = WRONG[name]
    with pytest.raises(refitkit.CompileError, match="A converter declares") as info:
        record(lambda w, b: function(w, halved(w)), leaves())
    (problem,) = info.value.problems
    assert kind in problem.kind


def test_all_wrong_names_are_listed() -> None:
    with pytest.raises(refitkit.CompileError) as info:
        record(lambda w, b: refitkit.made_of(w.clone(), "w1", "w", "x"), leaves())
    assert [problem.subject for problem in info.value.problems] == ["'w1'", "'x'"]
    assert info.value.problems[0].hint == "did you mean 'w'?"


def test_a_formula_that_fails_is_an_error() -> None:
    with pytest.raises(refitkit.CompileError, match="made of 'w' fails: ZeroDivisionError"):
        record(lambda w, b: refitkit.made_of(w.clone(), w, formula=lambda w: w * (1 / 0)), leaves())


def test_a_constant_that_changes_afterwards_has_no_recipe() -> None:
    def function(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = refitkit.made_of(halved(w), w, formula=halves)
        ctypes.memset(_address_of(made), 0, 4)
        return made

    recording = record(function, leaves())
    assert recording.state == "unmapped"
    assert "changed without an op" in recording.rows["y"].reason


def test_outside_of_a_recording_it_returns_the_constant() -> None:
    constant, array = torch.ones(2), np.ones(2)
    assert refitkit.made_of(constant, "x", formula=torch.exp) is constant
    assert refitkit.made_of(array) is array
