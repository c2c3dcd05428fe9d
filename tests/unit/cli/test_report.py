"""What the command line says of a refit."""

from __future__ import annotations

from refitkit.cli.report import through
from refitkit.model import OutputMeasure, RefitReport, TransformRow


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
    assert through(found) == [
        "4 weights by int8, largest error 0.25 of 0.5 in b",
        "1 weight by pack",
    ]


def test_nothing_where_nothing_was_transformed() -> None:
    assert through(report()) == []


def test_an_error_without_a_limit_is_told_too() -> None:
    measure = OutputMeasure(name="a", ok=True, max_abs_error=0.1)
    found = report(row("int8").model_copy(update={"measures": (measure,)}))
    assert through(found) == ["2 weights by int8, largest error 0.1 in a"]
