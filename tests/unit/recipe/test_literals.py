"""How literals are written."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refitkit.model import CallRef, Number, OpCall, PinnedRef, SourceRef, TorchName
from refitkit.model.slot import ITEM_BYTES
from refitkit.recipe.ops import decode_literal, encode_literal


def through_json(value: Any) -> Any:
    """A literal after it was written to a manifest and read again."""
    call = OpCall(op="aten.mul.Tensor", args=(encode_literal(value),), results=())
    text = call.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return decode_literal(OpCall.model_validate_json(text).args[0])


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.floats(allow_nan=False))
def test_floats_come_back_bit_for_bit(value: float) -> None:
    found = through_json(value)
    assert type(found) is float
    assert bits(found) == bits(value)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 1e-5, 5e-324, 1.7976931348623157e308, 0.1])
def test_floats_that_are_whole_or_extreme_stay_floats(value: float) -> None:
    found = through_json(value)
    assert (type(found), bits(found)) == (float, bits(value))


def test_nan() -> None:
    assert math.isnan(through_json(math.nan))


@given(st.complex_numbers(allow_nan=False))
def test_complex_numbers(value: complex) -> None:
    found = through_json(value)
    assert (bits(found.real), bits(found.imag)) == (bits(value.real), bits(value.imag))


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.text(), st.none()))
def test_the_other_literals(value: Any) -> None:
    found = through_json(value)
    assert (type(found), found) == (type(value), value)


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none(), st.floats())))
def test_lists(value: list[Any]) -> None:
    found = through_json(value)
    assert list(map(repr, found)) == list(map(repr, value))
    assert list(map(repr, through_json(tuple(value)))) == list(map(repr, value))


@pytest.mark.parametrize(
    "value",
    [
        *(getattr(torch, name) for name in ITEM_BYTES),
        *(torch.strided, torch.contiguous_format, torch.preserve_format),
        *(torch.channels_last, torch.channels_last_3d),
    ],
    ids=str,
)
def test_constants_of_torch(value: Any) -> None:
    assert through_json(value) is value


@pytest.mark.parametrize("value", [SourceRef(fqn="w"), PinnedRef(name="p"), CallRef(call=3)])
def test_references_stay_as_they_are(value: Any) -> None:
    assert encode_literal(value) is value
    assert through_json([value, None]) == [value, None]


@pytest.mark.parametrize(
    "value",
    [
        torch.device("cpu"), torch.ones(1), torch.sparse_coo, torch.qint8, object(), {}, b"x",
        [[1]], [torch.device("cpu")], torch.Generator(), range(3), {1},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_written(value: Any) -> None:
    with pytest.raises(TypeError, match="does not occur in recipes"):
        encode_literal(value)


def test_numbers_that_depend_on_inputs_cannot_be_written() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with pytest.raises(TypeError, match="SymInt"):
        encode_literal(ShapeEnv().create_unbacked_symint())


def test_numbers_of_a_subclass_cannot_be_written() -> None:
    """They may be more than their value."""

    class Odd(int):
        pass

    with pytest.raises(TypeError, match="Odd"):
        encode_literal(Odd(3))


@pytest.mark.parametrize("name", ["", "float", "os", "ops", "load", "__dict__", "qint8", "float23"])
def test_constants_that_a_recipe_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match="no constant"):
        decode_literal(TorchName(name=name))


@pytest.mark.parametrize("text", ["", "1", "1.5", "infinity", "-nan", "1e999", "x", "j1", "1+j)"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a number|malformed|could not convert"):
        decode_literal(Number(text=text))
