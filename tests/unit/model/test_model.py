"""Values: frozen, closed, and the same after a trip through JSON."""

from __future__ import annotations

import inspect
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refitkit import model
from refitkit.model import (
    EngineMemory,
    Leaf,
    LeafKind,
    Metric,
    OutputMeasure,
    PlanData,
    RefitReport,
    ReportRow,
    Slot,
    SlotState,
    StageFinished,
    StageStarted,
    StageTime,
    Step,
    TensorInfo,
    VerificationResult,
    fingerprint_of_slots,
)
from tests.fakes import make_plan, make_slot, pinned_row, recipe_row

VALUES = [
    value
    for value in vars(model).values()
    if inspect.isclass(value) and issubclass(value, pydantic.BaseModel)
]


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_is_frozen_closed_and_documented(kind: Any) -> None:
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    documented = inspect.getdoc(kind) or ""
    assert documented
    for name in kind.model_fields:
        if name != "kind" and "Attributes:" in documented:
            assert f"{name}: " in documented


def test_a_slot_cannot_be_changed_or_extended() -> None:
    slot = make_slot("w")
    with pytest.raises(pydantic.ValidationError):
        slot.dtype = "float16"  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        Slot(engine="e", name="n", dtype="float32", shape=(2,), count=2, odd=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "wrong", [{"shape": (-1,)}, {"count": -1}, {"dtype": "float23"}, {"count": 2**62}, {"shape": 3}]
)
def test_a_slot_that_cannot_be(wrong: dict[str, Any]) -> None:
    fields = {"engine": "e", "name": "n", "dtype": "float32", "shape": (2,), "count": 2}
    with pytest.raises(pydantic.ValidationError):
        Slot(**{**fields, **wrong})


def test_what_a_slot_knows() -> None:
    slot = Slot(engine="e", name="n", dtype="bfloat16", shape=None, count=6)
    assert (slot.nbytes, slot.key) == (12, ("e", "n"))


def test_what_a_tensor_info_knows() -> None:
    assert TensorInfo(dtype="float32", shape=(2, 3)).count == 6
    assert TensorInfo(dtype="float32", shape=()).count == 1
    assert TensorInfo(dtype="float32", shape=(0, 3)).count == 0


@pytest.mark.parametrize(("kind", "persistent"), [
    (LeafKind.PARAMETER, True), (LeafKind.BUFFER, True),
    (LeafKind.NON_PERSISTENT_BUFFER, False), (LeafKind.CONSTANT, False),
])  # fmt: skip
def test_which_leaves_a_state_dict_holds(kind: LeafKind, persistent: bool) -> None:
    assert Leaf(fqn="w", kind=kind, dtype="float32", shape=()).persistent == persistent


def test_the_fingerprint_of_slots_is_that_of_a_set() -> None:
    slots = [make_slot(name, engine=engine) for name in "abc" for engine in ("x", "y")]
    expected = fingerprint_of_slots(slots)
    assert fingerprint_of_slots(slots[::-1]) == expected
    assert fingerprint_of_slots(slots[3:] + slots[:3]) == expected
    assert len(expected) == 64


@pytest.mark.parametrize(
    "change", [{"engine": "z"}, {"name": "z"}, {"dtype": "float16"}, {"count": 3}]
)
def test_the_fingerprint_of_slots_counts_what_binds(change: dict[str, Any]) -> None:
    slots = [make_slot("a"), make_slot("b")]
    changed = [slots[0], slots[1].model_copy(update=change)]
    assert fingerprint_of_slots(changed) != fingerprint_of_slots(slots)
    assert fingerprint_of_slots(slots[:1]) != fingerprint_of_slots(slots)


@pytest.mark.parametrize("change", [{"device": "cuda:0"}, {"readable": True}, {"mutable": True}])
def test_the_fingerprint_of_slots_leaves_out_where_they_are(change: dict[str, Any]) -> None:
    slot = make_slot("a")
    moved = slot.model_copy(update=change)
    assert fingerprint_of_slots([moved]) == fingerprint_of_slots([slot])


def test_names_cannot_be_mixed_up_in_a_fingerprint() -> None:
    one = [make_slot("b", engine="a"), make_slot("d", engine="c")]
    two = [make_slot('b","c', engine="a"), make_slot("d", engine="c")]
    assert fingerprint_of_slots(one) != fingerprint_of_slots(two)


def test_a_plan_survives_json() -> None:
    import torch

    rows = [recipe_row(make_slot("w")), pinned_row(make_slot("m"))]
    data = make_plan(rows, ties=[("w",)], pinned={"m": torch.ones(2)}).data
    assert PlanData.model_validate_json(data.model_dump_json()) == data


numbers = st.floats(allow_nan=False)
texts = st.text(max_size=5)
measures = st.builds(
    OutputMeasure, name=texts, ok=st.booleans(), max_abs_error=numbers, limit=numbers,
    scale=numbers, note=texts,
)  # fmt: skip
reports = st.builds(
    RefitReport,
    outcome=st.sampled_from(["committed", "rolled-back"]),
    backend=texts,
    source=texts,
    version=st.integers(0, 9),
    partial=st.booleans(),
    changed=st.none() | st.booleans(),
    slots_written=st.integers(0, 9),
    bytes_written=st.integers(0, 2**60),
    stages=st.lists(st.builds(StageTime, stage=texts, seconds=numbers), max_size=2).map(tuple),
    memory=st.lists(
        st.builds(EngineMemory, engine=texts, kind=texts, bytes=st.integers(0, 2**60)), max_size=2
    ).map(tuple),
    ledger=st.lists(
        st.builds(
            ReportRow, engine=texts, slot=texts, state=st.sampled_from(SlotState), strategy=texts,
            sources=st.lists(texts, max_size=2).map(tuple), reason=texts,
        ),
        max_size=2,
    ).map(tuple),
    verification=st.none()
    | st.builds(
        VerificationResult, verifier=texts, ok=st.booleans(),
        measures=st.lists(measures, max_size=2).map(tuple), note=texts,
    ),
    notes=st.lists(texts, max_size=2).map(tuple),
)  # fmt: skip


@given(reports)
def test_a_report_survives_json(report: RefitReport) -> None:
    assert RefitReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_measures_that_are_no_numbers_survive_json(value: str) -> None:
    measure = OutputMeasure(name="x", ok=False, max_abs_error=float(value))
    text = measure.model_dump_json()
    again = OutputMeasure.model_validate_json(text)
    assert repr(again.max_abs_error) == value
    assert "NaN" not in text.replace('"NaN"', "")  # JSON has no such number


def test_the_largest_error_of_a_result() -> None:
    errors = [OutputMeasure(name="x", ok=True, max_abs_error=e) for e in (1.0, 3.0, 2.0)]
    assert VerificationResult(verifier="v", ok=True, measures=tuple(errors)).max_abs_error == 3.0
    assert VerificationResult(verifier="v", ok=True).max_abs_error == 0.0


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passes", "text"),
    [
        (0.98, 0.99, True, False, "cosine 0.98, at least 0.99"),
        (0.99, 0.99, True, True, "cosine 0.99, at least 0.99"),
        (0.98, 0.99, False, True, "cosine 0.98, at most 0.99"),
        (1.5, 1, False, False, "cosine 1.5, at most 1"),
        (float("nan"), 0, True, False, "cosine nan, at least 0"),
        (float("nan"), 0, False, False, "cosine nan, at most 0"),
        (float("nan"), None, False, True, "cosine nan"),
    ],
)
def test_a_metric_is_held_against_its_limit(
    value: float, limit: float | None, at_least: bool, passes: bool, text: str
) -> None:
    metric = Metric(name="cosine", value=value, limit=limit, at_least=at_least)
    assert (metric.ok, str(metric)) == (passes, text)
    measure = OutputMeasure(name="y", ok=passes, metrics=(metric,))
    again = OutputMeasure.model_validate_json(measure.model_dump_json())
    assert repr(again) == repr(measure)
    assert measure.why == ("" if passes else text)
    if not passes:
        with pytest.raises(ValueError, match="outside its limit: cosine"):
            OutputMeasure(name="y", ok=True, metrics=(metric,))


def test_a_failure_has_its_note_and_its_metrics() -> None:
    metrics = (Metric(name="a", value=1, limit=0), Metric(name="b", value=1, limit=2))
    measure = OutputMeasure(name="y", ok=False, note="too far", metrics=metrics)
    assert measure.failed == metrics[:1]
    assert measure.why == "too far; a 1, at most 0"


def test_events_are_values() -> None:
    assert StageStarted("refit", "load") == StageStarted("refit", "load", None)
    assert StageFinished("refit", "load", 1.0) != StageFinished("refit", "load", 2.0)
    with pytest.raises(AttributeError):
        Step("refit", "load", "half").text = "whole"  # type: ignore[misc]
