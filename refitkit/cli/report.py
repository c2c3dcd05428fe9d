"""How a refit's report and a verifier's result are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.cli.tables import facts
from refitkit.cli.text import count, duration, shown, size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from refitkit.model import RefitReport, StageFinished, VerificationResult

_CHANGED = {
    True: "weights changed",
    False: "nothing changed",
    None: "whether weights changed, no engine can tell",
}


def print_report(
    console: Console, report: RefitReport, finished: Iterable[StageFinished], output: str
) -> None:
    """Print what a refit did and measured, in a few lines."""
    times = ", ".join(f"{one.stage} {duration(one.seconds)}" for one in report.stages)
    around = [f"{one.verb} {duration(one.seconds)}" for one in finished if one.verb != "refit"]
    kept = sum(one.bytes for one in report.memory)
    kinds = ", ".join(sorted({one.kind for one in report.memory}))
    console.print(
        facts(
            [
                ("outcome", f"{report.outcome}: {_CHANGED[report.changed]}"),
                ("weights", report.source),
                ("written", f"{count(report.slots_written, 'slot')}, {size(report.bytes_written)}"),
                ("refit", f"{duration(report.seconds)}: {times}"),
                ("around it", ", ".join(around)),
                ("way back", f"{size(kept)} in {kinds}"),
                (
                    "verified",
                    "no" if report.verification is None else verdict(report.verification),
                ),
                *(("note", note) for note in report.notes),
                ("saved to", output),
            ]
        )
    )


def print_verification(console: Console, result: VerificationResult) -> None:
    """Print what a verifier found."""
    console.print(shown(f"The module holds these weights ({verdict(result)})."))


def verdict(result: VerificationResult) -> str:
    """What a verifier found, in a line."""
    limits = [measure.limit for measure in result.measures if measure.limit]
    measured = f"largest error {result.max_abs_error:.3g}" if result.measures else ""
    allowed = f"at most {min(limits):.3g} passes" if limits else ""
    said = [f"{result.verifier}: {result.note}", measured, allowed]
    return ", ".join(part for part in said if part)
