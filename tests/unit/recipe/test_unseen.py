"""Values with numbers that were made outside of torch are marked, and ordinary literals are not."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.recipe.recorder import record

Function = Callable[..., Any]
_address_of = torch.Tensor.data_ptr


def packed(*numbers: float) -> np.ndarray:
    """An array whose numbers no NumPy function was given."""
    return np.frombuffer(bytearray(struct.pack(f"{len(numbers)}f", *numbers)), "f")


def halves(w: torch.Tensor) -> list[float]:
    """Half of each element, read by a method that no recording has patched."""
    raw = ctypes.string_at(_address_of(w), w.nbytes)
    return [number / 2 for number in struct.unpack(f"{w.numel()}f", raw)]


def leaves() -> dict[str, torch.Tensor]:
    return {"w": torch.linspace(0.5, 3, 6)}


FROZEN: dict[str, Function] = {
    "a tensor of numbers": lambda w: torch.tensor(halves(w)),
    "an array of numbers": lambda w: torch.from_numpy(np.array(halves(w), np.float32)),
    "an array of bytes": lambda w: torch.from_numpy(packed(*halves(w))),
    "a view of it": lambda w: torch.from_numpy(packed(*halves(w))).view(2, 3).t(),
    "computed from it": lambda w: torch.from_numpy(packed(*halves(w))).exp() + 1,
    "a part of it": lambda w: torch.zeros(8).index_copy(
        0, torch.arange(6), torch.from_numpy(packed(*halves(w)))
    ),
    "a table without weights": lambda w: torch.tensor([1.5, 2.5]),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_nobody_saw_is_marked(name: str) -> None:
    recording = record(FROZEN[name], leaves())
    assert recording.state == "frozen"
    assert recording.rows["y"].unseen
    assert "did not see of what" in recording.rows["y"].reason
    assert [name.rpartition("/")[2] for name in recording.plan.data.unseen] == ["y"]


def test_a_recipe_with_such_numbers_is_marked_too() -> None:
    recording = record(lambda w: w * torch.from_numpy(packed(*halves(w))), leaves())
    assert recording.state == "recipe"
    assert recording.rows["y"].unseen
    assert "its recipe has numbers" in recording.rows["y"].reason


ORDINARY: dict[str, Function] = {
    "an epsilon": lambda w: torch.tensor(1e-5),
    "one element": lambda w: torch.tensor([0.1]),
    "one distinct number": lambda w: torch.from_numpy(np.full(6, 0.5, np.float32)),
    "a mask": lambda w: torch.tensor([True, False]),
    "indices": lambda w: torch.from_numpy(np.array([3, 1, 2])),
    "shape": lambda w: torch.tensor(w.shape),
    "no elements": lambda w: torch.from_numpy(np.zeros(0, np.float32)),
    "a range": lambda w: torch.arange(6.0) * 0.1,
    "numbers of ops": lambda w: torch.ones(6).mul(0.5).add(torch.eye(6)[0], alpha=3),
    "random numbers": lambda w: torch.randn(6),
    "shapes of such numbers": lambda w: torch.zeros_like(torch.from_numpy(packed(*halves(w)))),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_literals_are_not(name: str) -> None:
    recording = record(ORDINARY[name], leaves())
    row = recording.rows["y"]
    assert (recording.state, row.unseen) == ("frozen", False)
    assert row.reason == "it depends on no parameter or buffer"


@pytest.mark.parametrize("name", ORDINARY)
def test_recipes_with_ordinary_literals_are_not(name: str) -> None:
    recording = record(lambda w: w.sum() + ORDINARY[name](w).double().sum(), leaves())
    assert (recording.state, recording.rows["y"].unseen) == ("recipe", False)


def test_the_values_of_a_weight_are_unmapped_in_a_view_too() -> None:
    def function(w: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(packed(*halves(w * 2))).view(3, 2)

    recording = record(function, leaves())
    assert recording.state == "unmapped"
    assert "contains the values of 'w'" in recording.rows["y"].reason


def test_the_mark_survives_a_file() -> None:
    recording = record(FROZEN["an array of bytes"], leaves())
    again = type(recording.plan).from_bytes(recording.plan.to_bytes())
    assert again.data.unseen == recording.plan.data.unseen
