"""Tensors as a source: what they say of themselves, and which cannot be weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from refitkit.errors import SourceError
from refitkit.protocols import SlotValue, WeightSource
from refitkit.recipe import TensorMap, describe_tensor, unusable_reason, write_value
from tests.fakes import CountingMapping, make_slot

if TYPE_CHECKING:
    from collections.abc import Iterator


class Labelled(torch.Tensor):
    """A subclass: nobody knows what its operators do."""


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(2)


def freed() -> torch.Tensor:
    """What sharding leaves behind: a shape, and no memory. Reading it would crash."""
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


def half_freed() -> torch.Tensor:
    tensor = torch.ones(8)[2:6]
    tensor.untyped_storage().resize_(5 * 4)
    return tensor


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what it calls experimental
def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


UNUSABLE: dict[str, tuple[Any, str]] = {
    "sparse": (lambda: torch.ones(2, 2).to_sparse(), "to_dense"),
    "csr": (lambda: torch.ones(2, 2).to_sparse_csr(), "to_dense"),
    "mkldnn": (lambda: torch.ones(2, 2).to_mkldnn(), "to_dense"),
    "meta": (lambda: torch.ones(2, device="meta"), "without data"),
    "quantized": (quantized, "dequantize"),
    "subclass": (lambda: torch.ones(2).as_subclass(Labelled), "Labelled"),
    "fake": (fake, "FakeTensor"),
    "freed": (freed, "freed"),
    "half freed": (half_freed, "freed"),
    "lazy": (lambda: torch.nn.LazyLinear(2).weight, "UninitializedParameter"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "plain"),
    "jagged": (
        lambda: torch.nested.nested_tensor(
            [torch.ones(1), torch.ones(2)], layout=torch.jagged
        ),
        "plain",
    ),
    "list": (lambda: [1.0], "list, not a tensor"),
    "none": (lambda: None, "NoneType, not a tensor"),
    "number": (lambda: 1.0, "float, not a tensor"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_a_weight_says_why(name: str) -> None:
    make, reason = UNUSABLE[name]
    value = make()
    assert reason in unusable_reason(value)
    info = describe_tensor(value)
    assert reason in info.unusable
    assert TensorMap({"w": value}).info("w") == info


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["list", "none", "number"])
def test_what_is_no_tensor_cannot_be_read(name: str) -> None:
    with pytest.raises(SourceError, match="'w'"):
        TensorMap({"w": UNUSABLE[name][0]()}).get("w")


USABLE: dict[str, torch.Tensor] = {
    "plain": torch.ones(2, 3),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "buffer": torch.nn.Buffer(torch.ones(2, 3)),
    "frozen parameter": torch.nn.Parameter(torch.ones(2, 3), requires_grad=False),
    "scalar": torch.tensor(1.0),
    "empty": torch.ones(0, 3),
    "transposed": torch.ones(3, 2).t(),
    "expanded": torch.ones(1).expand(4),
    "view with an offset": torch.ones(9)[3:],
    "strided": torch.ones(9)[::2],
    "part of a larger memory": torch.ones(9)[:3],
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "bool": torch.ones(2, dtype=torch.bool),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "requires grad": torch.ones(2, requires_grad=True),
    "result of an operation": torch.ones(2, requires_grad=True) * 2,
}


@pytest.mark.parametrize("name", USABLE)
def test_strided_tensors_with_data_are_usable(name: str) -> None:
    value = USABLE[name]
    info = describe_tensor(value)
    assert info.unusable == ""
    assert info.dtype == str(value.dtype).removeprefix("torch.")
    assert info.shape == tuple(value.shape)
    assert info.count == value.numel()
    assert info.persistent
    got = TensorMap({"w": value}).get("w")
    assert not got.requires_grad
    assert (got.data_ptr(), got.stride()) == (value.data_ptr(), value.stride())


def test_a_tensor_map_is_a_source() -> None:
    source = TensorMap({"a": torch.ones(1), "b": torch.ones(2)}, "my weights", not_persistent=["b"])
    assert isinstance(source, WeightSource)
    assert source.description == "my weights"
    assert set(source.names()) == {"a", "b"}
    assert (source.info("a").persistent, source.info("b").persistent) == (True, False)
    for ask in (source.info, source.get):
        with pytest.raises(KeyError):
            ask("c")


def test_nothing_is_read_before_it_is_asked_for() -> None:
    tensors = CountingMapping({"a": torch.ones(1), "b": torch.ones(2)})
    source = TensorMap(tensors)
    assert len(source.names()) == 2
    assert not tensors.reads
    source.get("b")
    assert dict(tensors.reads) == {"b": 1}


@pytest.mark.parametrize(
    ("name", "is_weight"),
    [
        ("_extra_state", False),
        ("a.b._extra_state", False),
        ("gate_extra_state", True),
        ("a.gate_extra_state", True),
        ("_extra_state.weight", True),
    ],
)
def test_extra_state_is_no_weight(name: str, is_weight: bool) -> None:
    assert list(TensorMap({name: torch.ones(1)}).names()) == [name] * is_weight


def test_names_follow_the_order_of_the_mapping() -> None:
    """Reports and problems come in an order that people know."""
    names = [f"layers.{n}.weight" for n in (3, 1, 2, 0, 10)]
    assert list(TensorMap(dict.fromkeys(names, torch.ones(1))).names()) == names


# -- values in pieces -------------------------------------------------------------------------


def in_pieces(whole: torch.Tensor, *, in_place: bool = False) -> tuple[SlotValue, list[Any]]:
    """A value that comes in pieces of 4 elements, and the memory that it is asked to read into."""
    asked: list[Any] = []

    def pieces(into: torch.Tensor | None) -> Iterator[torch.Tensor]:
        asked.append(into)
        flat = whole.reshape(-1)
        if in_place:
            assert into is not None
            flat = into.view(-1).copy_(flat)
        yield from flat.split(4)

    return SlotValue(make_slot("w", (2, 5)), "recipe", ("w",), lambda: whole, pieces=pieces), asked


@pytest.mark.parametrize("in_place", [True, False])
def test_a_value_in_pieces_is_written(in_place: bool) -> None:
    """Whether or not the source reads it into the given memory."""
    whole, into = torch.rand(2, 5), torch.zeros(2, 5)
    value, asked = in_pieces(whole, in_place=in_place)
    assert write_value(into, value)
    assert into.equal(whole)
    assert [one is into for one in asked] == [True]


def test_only_contiguous_memory_is_read_into() -> None:
    value, asked = in_pieces(torch.rand(2, 5))
    assert not write_value(torch.zeros(5, 2).t(), value)
    assert asked == []


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int32), "takes 10 of torch.float32"),
        (torch.zeros(11), "takes 10 of torch.float32"),
        (torch.zeros(9), "the source returned 9"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(whole: torch.Tensor, message: str) -> None:
    value, _ = in_pieces(whole)
    with pytest.raises(SourceError, match=message):
        write_value(torch.zeros(2, 5), value)
