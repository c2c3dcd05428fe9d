"""The verifier ``weights``: every slot read back, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.builtin.verify.weights import WeightsVerifier
from refitkit.errors import NotRefittableError
from refitkit.model import VerificationResult
from refitkit.protocols import SlotValue, VerifyRequest
from refitkit.recipe import TensorMap
from tests.fakes import FakeEngine, FakeModule, OpenEngine, make_plan, recipe_row, slot_for

NAN = float("nan")


def judged(live: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> VerificationResult:
    """The verdict on an engine that holds ``live`` and should hold ``wanted``."""
    module = FakeModule([OpenEngine("model", live)])
    return WeightsVerifier().prepare(request(module, wanted))(module)


def request(module: FakeModule, wanted: dict[str, torch.Tensor]) -> VerifyRequest:
    slots = {name: slot_for(name, value) for name, value in wanted.items()}
    values = {
        slot.key: SlotValue(slot, "recipe", (name,), lambda name=name: wanted[name])  # type: ignore[misc]
        for name, slot in slots.items()
    }
    plan = make_plan([recipe_row(slot) for slot in slots.values()])
    return VerifyRequest(plan, module, TensorMap(wanted), values, None, None, None, {})


def one(live: Any, wanted: Any) -> bool:
    return judged({"w": torch.as_tensor(live)}, {"w": torch.as_tensor(wanted)}).ok


def test_all_slots_are_compared() -> None:
    live = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}
    result = judged(live, {"a": torch.ones(2), "b": torch.tensor([0.0, 0.5, -2.0])})
    assert (result.verifier, result.ok) == ("weights", False)
    assert [(m.name, m.ok) for m in result.measures] == [("a", True), ("b", False)]
    assert result.measures[1].max_abs_error == result.max_abs_error == 2.0
    assert result.note == "2 slots read back, 1 differ"


@pytest.mark.parametrize(
    ("live", "wanted", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([0.0], [-0.0], False),
        ([NAN], [NAN], True),
        ([1.0], [1.0000001], False),
        (5, 5, True),
        (5, 6, False),
        (1.0, 1.0, True),
        ([True], [False], False),
    ],
)
def test_bits_decide(live: Any, wanted: Any, same: bool) -> None:
    assert one(live, wanted) == same


def test_two_nans_of_other_bits_differ() -> None:
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert other.isnan().all()
    assert not one(torch.tensor([NAN]), other)


def test_layout_does_not_matter() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    assert one(a, a.t().contiguous().t())
    assert one(torch.arange(1.0, 9.0), torch.arange(9.0)[1:])
    assert one(torch.ones(4), torch.ones(1).expand(4))
    assert one(torch.ones(0, 3), torch.ones(0, 3))


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_dtype_and_size(dtype: torch.dtype, size: int) -> None:
    value = torch.ones(size).to(dtype)
    other = value.clone()
    other[-1] = 0
    assert one(value, value.clone())
    assert not one(value, other)


@pytest.mark.parametrize(
    "wanted", [torch.ones(4), torch.ones(2, 2).half(), torch.ones(2, 3), torch.ones(4, 1)]
)
def test_another_shape_or_dtype_differs(wanted: torch.Tensor) -> None:
    result = judged({"w": torch.ones(2, 2)}, {"w": wanted})
    assert not result.ok
    assert result.measures[0].note


def test_the_same_bytes_in_another_dtype_differ() -> None:
    value = torch.tensor([1.0, 2.0])
    assert not one(value, value.view(torch.int32))


def test_a_verdict_with_a_nan_survives_json() -> None:
    result = judged({"w": torch.tensor([1.0])}, {"w": torch.tensor([NAN])})
    text = result.model_dump_json()
    again = VerificationResult.model_validate_json(text)
    assert again.model_dump_json() == text
    assert not again.ok


def test_engines_that_cannot_be_read_are_refused_before_anything_is_written() -> None:
    value = {"w": torch.ones(1)}
    module = FakeModule([OpenEngine("open", value), FakeEngine("mute", value)])
    with pytest.raises(NotRefittableError) as info:
        WeightsVerifier().prepare(request(module, {}))
    assert [p.subject for p in info.value.problems] == ["mute"]
    assert "outputs" in info.value.hint


def test_it_has_its_name() -> None:
    assert WeightsVerifier().name == "weights"


def test_complex_values_are_measured_whole() -> None:
    result = judged({"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([1 - 2j])})
    assert result.max_abs_error == 4.0


def test_values_are_read_when_it_judges() -> None:
    module = FakeModule([OpenEngine("model", {"w": torch.zeros(2)})])
    judge = WeightsVerifier().prepare(request(module, {"w": torch.ones(2)}))
    module.engines["model"].live["w"].fill_(1.0)
    assert judge(module).ok
