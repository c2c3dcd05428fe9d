"""What the command line says of a refit."""

from __future__ import annotations

import math

from refitkit.cli.report import most_changed, transform_lines, verdict
from refitkit.model import (
    ChangeRow,
    Metric,
    OutputMeasure,
    RefitReport,
    TransformRow,
    VerificationResult,
)


def row(transform: str, *errors: tuple[str, float], gives: int = 2) -> TransformRow:
    measures = tuple(
        OutputMeasure(name=name, ok=True, max_abs_error=error, limit=0.5) for name, error in errors
    )
    names = tuple(f"{transform}.{number}" for number in range(gives))
    return TransformRow(transform=transform, plugin="p", gives=names, measures=measures)


def report(*rows: TransformRow) -> RefitReport:
    return RefitReport(
        outcome="committed", backend="fake", source="weights", version=1, transforms=rows
    )


def test_a_line_for_each_transform_with_its_worst_entry() -> None:
    found = report(row("int8", ("a", 0.1)), row("pack", gives=1), row("int8", ("b", 0.25)))
    assert transform_lines(found) == [
        "4 weights by int8, largest error 0.25 (limit 0.5) in b",
        "1 weight by pack",
    ]


def test_nothing_where_nothing_was_transformed() -> None:
    assert transform_lines(report()) == []


def test_an_error_without_a_limit_is_told_too() -> None:
    measure = OutputMeasure(name="a", ok=True, max_abs_error=0.1)
    found = report(row("int8").model_copy(update={"measures": (measure,)}))
    assert transform_lines(found) == ["2 weights by int8, largest error 0.1 in a"]


def test_the_worst_of_each_metric_is_told() -> None:
    def measure(name: str, cosine: float, noise: float) -> OutputMeasure:
        metrics = (
            Metric(name="cosine", value=cosine, limit=0.9, at_least=True),
            Metric(name="noise", value=noise),
        )
        return OutputMeasure(name=name, ok=all(m.ok for m in metrics), metrics=metrics)

    measures = (measure("a", 0.95, 2.0), measure("b", 0.8, 1.0), measure("c", 0.99, 3.0))
    found = report(row("int8").model_copy(update={"measures": measures}))
    told = "cosine 0.8, at least 0.9, noise 3"
    assert transform_lines(found) == [f"2 weights by int8, {told}"]
    result = VerificationResult(verifier="cosine", ok=False, measures=measures, note="3 outputs")
    assert verdict(result) == f"cosine: 3 outputs, {told}"
    mixed = (*measures, OutputMeasure(name="d", ok=True, max_abs_error=0.5, limit=1.0))
    result = VerificationResult(verifier="cosine", ok=False, measures=mixed, note="4 outputs")
    assert verdict(result) == f"cosine: 4 outputs, largest error 0.5, limit 1, {told}"


def moved(*rows: tuple[str, float, float], sampled: bool = False) -> list[str]:
    changes = tuple(
        ChangeRow(engine="e", slot=slot, relative=relative, largest=largest, sampled=sampled)
        for slot, relative, largest in rows
    )
    return most_changed(report().model_copy(update={"changes": changes}))


def test_the_slot_that_moved_most_is_told() -> None:
    rows = ("a", 0.25, 8.0), ("b", 0.5, 0.125), ("c", 0.5, 0.0625)
    assert moved(*rows) == ["e/b: 0.5 times its norm, largest difference 0.125"]
    assert moved(*rows, sampled=True) == [
        "e/b: 0.5 times its norm, largest difference 0.125, from a sample"
    ]
    assert moved(*rows, ("z", math.inf, 0.5)) == ["e/z: from zeros, largest difference 0.5"]
    assert moved(("z", math.inf, math.inf)) == ["e/z: to or from values that are not finite"]
    assert moved() == moved(("a", 0.0, 0.0)) == []
