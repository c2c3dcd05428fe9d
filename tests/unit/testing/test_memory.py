"""Counting of allocated memory, and random values."""

from __future__ import annotations

import pytest
import torch

from refitkit.model import Slot
from refitkit.testing import oracles
from refitkit.testing.fakes import slot_for
from refitkit.testing.oracles import NewMemory, Storage

OLD = torch.zeros(100)


def test_only_new_memory_that_is_held_counts() -> None:
    with NewMemory() as memory:
        kept = [torch.ones(10), OLD[3:], OLD.view(10, 10), OLD.add_(1)]
        torch.ones(1000).mul(2)
        view = torch.zeros(20)[5:6]
    assert memory.kept() == 10 * 4 + 20 * 4
    del kept
    assert memory.kept() == 20 * 4
    assert len(view)
    del view
    assert memory.kept() == 0


def test_memory_that_is_watched_is_not_kept() -> None:
    tensor = torch.ones(5)
    storage = Storage(tensor)
    assert (storage.nbytes, storage.expired()) == (20, False)
    alias = tensor.numpy()
    del tensor
    assert not storage.expired()
    del alias
    assert storage.expired()


DTYPES = ["bool", "int8", "uint64", "float16", "bfloat16", "float8_e5m2", "float64", "complex64"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e8m0fnu"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2), None])
def test_values_fit_and_differ_by_seed(dtype: str, shape: tuple[int, ...] | None) -> None:
    count = torch.Size(shape).numel() if shape is not None else 4
    slot = Slot(engine="e", name="s", dtype=dtype, shape=shape, count=count)
    sets = [oracles.random_values([slot], seed)["s"] for seed in (1, 2, 3)]
    for value in sets:
        assert slot_for("s", value).dtype == dtype
        assert tuple(value.shape) == (shape if shape is not None else (4,))
    again = oracles.random_values([slot], 1)["s"]
    assert oracles.bits(again) == oracles.bits(sets[0])
    for one, other in ((0, 1), (1, 2)):
        assert (oracles.bits(sets[one]) != oracles.bits(sets[other])) is (count > 0)


def test_values_have_zeros_of_either_sign() -> None:
    """Code that compares values instead of bits fails with them."""
    slot = slot_for("s", torch.zeros(3))
    zeros = [oracles.random_values([slot], seed)["s"][0] for seed in (1, 2)]
    assert [(float(zero), bool(zero.signbit())) for zero in zeros] == [(0, True), (0, False)]


def test_bits_are_of_elements_in_their_order() -> None:
    value = torch.tensor([[0.0, -0.0], [float("nan"), 2.0]])
    assert oracles.bits(value.mT.contiguous().mT) == oracles.bits(value)
    assert oracles.bits(value) != oracles.bits(value.abs())
    assert oracles.bits(value) != oracles.bits(value.double())
    turned = torch.tensor([1 + 2j]).conj()
    assert oracles.bits(turned) == oracles.bits(torch.tensor([1 - 2j]))
    assert oracles.differing({"a": ("f", b""), "b": ("f", b"")}, {"a": ("f", b"")}) == ["b"]
