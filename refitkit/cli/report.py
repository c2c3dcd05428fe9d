"""Print the report of a refit and the result of a verifier."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from refitkit.cli.tables import count, duration, facts, shown, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from refitkit.model import (
        EngineRoute,
        Metric,
        OutputMeasure,
        RefitReport,
        StageFinished,
        TransformRow,
        VerificationResult,
    )

_CHANGED = {
    True: "weights changed",
    False: "nothing changed",
    None: "unknown whether weights changed",
}


def print_report(
    console: Console, report: RefitReport, finished: Iterable[StageFinished], output: str
) -> None:
    """Print the actions and measurements of a refit, in a few lines.

    Args:
        console: Console to print on.
        report: Report of the refit.
        finished: All stages of the command, including those outside the refit.
        output: Path of the saved module.
    """
    times = ", ".join(f"{one.stage} {duration(one.seconds)}" for one in report.stages)
    # Stages of loading and saving are not part of the refit.
    around = [f"{one.verb} {duration(one.seconds)}" for one in finished if one.verb != "refit"]
    kept = sum(one.bytes for one in report.memory)
    kinds = ", ".join(sorted({one.kind for one in report.memory}))
    console.print(
        facts(
            [
                ("outcome", f"{report.outcome}: {_CHANGED[report.changed]}"),
                ("weights", report.source),
                *(("transformed", text) for text in transform_lines(report)),
                ("written", f"{count(report.slots_written, 'slot')}, {size(report.bytes_written)}"),
                *(("moved most", text) for text in most_changed(report)),
                ("refit", f"{duration(report.seconds)}: {times}"),
                ("other stages", ", ".join(around)),
                ("for rollback", f"{size(kept)} in {kinds}"),
                (
                    "verified",
                    "no" if report.verification is None else verdict(report.verification),
                ),
                ("calls waited", pause(report)),
                *(("way", way(route)) for route in report.routes),
                *(("note", note) for note in report.notes),
                ("saved to", output),
            ]
        )
    )


def pause(report: RefitReport) -> str:
    """How long calls had to wait for a refit, as text."""
    seconds = report.pause_seconds
    return "not at all" if not seconds else f"at most {duration(seconds)}"


def way(route: EngineRoute) -> str:
    """The way in which an engine got its weights, and why, as text."""
    return f"{route.name} ({route.why})" if route.why else route.name


def print_verification(console: Console, result: VerificationResult) -> None:
    """Print the result of a verifier, and its notes."""
    console.print(shown(f"The module holds these weights ({verdict(result)})."))
    if result.notes:
        console.print(facts([("note", note) for note in result.notes]))


def transform_lines(report: RefitReport) -> list[str]:
    """One line for each transform: the number of its weights, and its largest error."""
    rows = {
        row.transform: [one for one in report.transforms if one.transform == row.transform]
        for row in report.transforms
    }
    return [_transform_line(name, of_it) for name, of_it in rows.items()]


def _transform_line(transform: str, rows: list[TransformRow]) -> str:
    entries = sum(len(row.gives) for row in rows)
    text = f"{count(entries, 'weight')} by {transform}"
    left = sum(len(row.takes) for row in rows if not row.gives)
    if left:
        text += f", {left} left out"
    measures = [measure for row in rows for measure in row.measures]
    text = ", ".join([text, *_worst_metrics(measures)])
    # Relative to their limits, because errors of different entries are not comparable.
    worst = max(
        (measure for measure in measures if _has_error(measure)),
        key=lambda measure: measure.max_abs_error / (measure.limit or 1),
        default=None,
    )
    if worst is None:
        return text
    limit = f" (limit {worst.limit:.3g})" if worst.limit else ""
    return f"{text}, largest error {worst.max_abs_error:.3g}{limit} in {worst.name}"


def most_changed(report: RefitReport) -> list[str]:
    """A line about the slot with the largest relative change; empty if no slot changed."""
    row = report.most_changed
    if row is None or not row.relative:
        return []
    name = f"{row.engine}/{row.slot}"
    if math.isinf(row.largest):
        return [f"{name}: to or from values that are not finite"]
    # The relative change is infinite if all old values were zeros.
    by = "from zeros" if math.isinf(row.relative) else f"{row.relative:.3g} times its norm"
    how = ", from a sample" if any(one.sampled for one in report.changes) else ""
    return [f"{name}: {by}, largest difference {row.largest:.3g}{how}"]


def verdict(result: VerificationResult) -> str:
    """The result of a verifier, in a line."""
    compared = [measure for measure in result.measures if _has_error(measure)]
    limits = [measure.limit for measure in compared if measure.limit]
    measured = f"largest error {result.max_abs_error:.3g}" if compared else ""
    # Outputs of several dtypes have several limits; the smallest one is the strictest.
    allowed = f"limit {min(limits):.3g}" if limits else ""
    metrics = _worst_metrics(result.measures)
    parts = [f"{result.verifier}: {result.note}", measured, allowed, *metrics]
    return ", ".join(part for part in parts if part)


def _has_error(measure: OutputMeasure) -> bool:
    """Whether the largest error says something: a measure with metrics need not have one."""
    return not measure.metrics or bool(measure.max_abs_error or measure.limit)


def _worst_metrics(measures: Sequence[OutputMeasure]) -> list[str]:
    """For each metric by name the worst of all measures, with its limit."""
    found: dict[str, list[Metric]] = {}
    for measure in measures:
        for metric in measure.metrics:
            found.setdefault(metric.name, []).append(metric)
    return [str(_worst(metrics)) for metrics in found.values()]


def _worst(metrics: list[Metric]) -> Metric:
    def distance(metric: Metric) -> tuple[bool, bool, float]:
        value = -metric.value if metric.at_least else metric.value
        return not metric.ok, math.isnan(value), value

    return max(metrics, key=distance)
