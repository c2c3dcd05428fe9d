"""Numbers and tables of the benchmark on a GPU: what of it needs no GPU."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Found = dict[str, Any]
"""What one process measured of one model, as JSON holds it."""

STAGES = ("load", "map", "check", "prepare", "stage", "drain", "commit")
SOURCES = ("device", "pinned", "pageable")
MOST_COPIES, LEAST_FASTER = 5.0, 1000.0
"""The goal: so many copies of the slots on the device, so many times faster than upstream."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds, and of how many."""
    return {
        "p50_ms": statistics.median(seconds) * 1e3,
        "p99_ms": percentile(seconds, 0.99) * 1e3,
        "runs": len(seconds),
    }


def gaps(ends: Sequence[float]) -> dict[str, float]:
    """Times between the ends of calls that follow each other, in milliseconds."""
    between = [later - earlier for earlier, later in pairwise(ends)]
    if not between:
        return {"calls": len(ends)}
    return {**summary(between), "longest_ms": max(between) * 1e3, "calls": len(ends)}


def rate(nbytes: float, milliseconds: float) -> float:
    """GB/s."""
    return nbytes / milliseconds / 1e6 if milliseconds else 0.0


def split(reports: Sequence[Mapping[str, float]], whole: Sequence[float]) -> dict[str, float]:
    """Medians of all stages, in milliseconds; ``rest`` is what no stage accounts for.

    Args:
        reports: Seconds by stage, one for each refit.
        whole: Seconds of each refit, as its caller sees it.
    """
    found = {
        stage: statistics.median(report.get(stage, 0.0) for report in reports) * 1e3
        for stage in STAGES
    }
    rest = (total - sum(report.values()) for report, total in zip(reports, whole, strict=True))
    return {**found, "rest": statistics.median(rest) * 1e3}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: What stands above it.
        of: Gives the number or text; a lookup that fails leaves the cell empty.
    """

    head: str
    of: Callable[[Found], Any]


def cell(value: Any) -> str:
    """A number with three digits that mean something; text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int) or not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def table(columns: Sequence[Column], rows: Iterable[Found]) -> Iterator[str]:
    """Lines of a Markdown table; no line at all without rows."""
    bodies = [[_filled(column, row) for column in columns] for row in rows]
    if bodies:
        yield "| " + " | ".join(column.head for column in columns) + " |"
        yield "|" + "---|" * len(columns)
        for body in bodies:
            yield "| " + " | ".join(body) + " |"


def _filled(column: Column, row: Found) -> str:
    try:
        value = column.of(row)
    except (KeyError, TypeError, ZeroDivisionError):
        return ""
    return "" if value is None else cell(value)


def _ms(source: str, what: str) -> Callable[[Found], Any]:
    return lambda row: row["refit"][source]["first_output"][what]


def _over_copy(row: Found) -> float:
    return float(row["refit"]["device"]["refit"]["p50_ms"] / row["copies"]["device_ms"])


def _faster(name: str) -> Callable[[Found], float]:
    """How many times a refit of ours from a state_dict fits into one of upstream's."""
    return lambda row: row["upstream"][name] * 1e3 / row["refit"]["device"]["refit"]["p50_ms"]


NAME = (Column("model", lambda row: row["model"]), Column("dtype", lambda row: row["dtype"]))

REFITS = (
    *NAME,
    Column("slots", lambda row: row["slots"]),
    Column("MB", lambda row: row["nbytes"] / 1e6),
    *(
        Column(f"{source} {what[:3]} ms", _ms(source, what))
        for source in SOURCES
        for what in ("p50_ms", "p99_ms")
    ),
    Column("copy on the device ms", lambda row: row["copies"]["device_ms"]),
    Column("copy from pinned ms", lambda row: row["copies"]["pinned_ms"]),
    Column("refit alone over device copy", _over_copy),
    Column("plain Python before ms", lambda row: row["refit"]["device"]["yardstick_ms"][0]),
    Column("and after ms", lambda row: row["refit"]["device"]["yardstick_ms"][1]),
)
SPLITS = (
    *NAME,
    Column("source", lambda row: row["source"]),
    *(Column(name, lambda row, name=name: row["split"][name]) for name in (*STAGES, "rest")),
    Column("refit ms", lambda row: row["whole"]["p50_ms"]),
    Column("GB/s", lambda row: rate(row["nbytes"], row["whole"]["p50_ms"])),
)
OTHERS = (
    *NAME,
    Column("refitkit ms", lambda row: row["refit"]["device"]["refit"]["p50_ms"]),
    Column("by hand, kept, values ready ms", lambda row: row["by_hand"]["ready"]["p50_ms"]),
    Column("by hand, kept, with copies ms", lambda row: row["by_hand"]["copied"]["p50_ms"]),
    Column("by hand, new refitter s", lambda row: row["by_hand"]["new_s"]),
    Column("upstream, map s", lambda row: row["upstream"]["map"]),
    Column("upstream, no map s", lambda row: row["upstream"]["no map"]),
    Column("faster than map", _faster("map")),
    Column("faster than no map", _faster("no map")),
    Column("compile s", lambda row: row["seconds"]["compile"]),
    Column("first refit s", lambda row: row["seconds"]["first refit"]),
)
SERVING = (
    *NAME,
    Column("call, REFIT ms", lambda row: row["call"]["refittable"]["p50_ms"]),
    Column("call, immutable ms", lambda row: row["call"]["immutable"]["p50_ms"]),
    Column("calls p99 ms", lambda row: row["load"]["quiet"]["p99_ms"]),
    Column("p99 with refits ms", lambda row: row["load"]["refits"]["p99_ms"]),
    Column("longest gap ms", lambda row: row["load"]["quiet"]["longest_ms"]),
    Column("longest with refits ms", lambda row: row["load"]["refits"]["longest_ms"]),
    Column("refits per s", lambda row: row["load"]["refits_per_s"]),
    Column("refit's peak in torch MB", lambda row: row["memory"]["torch_peak"] / 1e6),
    Column("on the device MB", lambda row: row["memory"]["device_peak"] / 1e6),
    Column("held by refitkit MB", lambda row: row["memory"]["held"] / 1e6),
)
RIGHT = (
    *NAME,
    Column("slots that differ from the rebuild", lambda row: row["correct"]["differing"]),
    Column("A, B, A bit-equal", lambda row: row["correct"]["a_b_a"]),
    Column("every timed output right", lambda row: row["correct"]["always"]),
    Column("error of A / norm", lambda row: row["correct"]["error_a"]),
    Column("error of B / norm", lambda row: row["correct"]["error_b"]),
    Column("by hand: error of B / norm", lambda row: row["by_hand"]["error_b"]),
)


def split_rows(found: Iterable[Found]) -> Iterator[Found]:
    """One row for each model and source."""
    for row in found:
        for source, one in row.get("refit", {}).items():
            yield {**row, "source": source, "split": one["split"], "whole": one["refit"]}


def goal(found: Iterable[Found]) -> Iterator[str]:
    """What of the goal each model reaches."""
    for row in found:
        if "device" not in row.get("refit", {}) or "copies" not in row:
            continue
        over = _over_copy(row)
        told = [f"{over:.0f} copies ({'met' if over <= MOST_COPIES else 'NOT met'})"]
        if "upstream" in row:
            faster = _faster("map")(row)
            told.append(
                f"{faster:.0f}x upstream ({'met' if faster >= LEAST_FASTER else 'NOT met'})"
            )
        equal = row.get("correct", {}).get("a_b_a", False)
        told.append("A, B, A bit-equal" if equal else "A, B, A NOT bit-equal")
        yield f"{row['model']} {row['dtype']}: {', '.join(told)}"


def report(found: Sequence[Found]) -> str:
    """All tables."""
    failed = [f"{row['model']} {row['dtype']}: {row['error']}" for row in found if "error" in row]
    rows = [row for row in found if "refit" in row]
    parts = (
        ("To the first right output", table(REFITS, rows)),
        ("Split of a refit, ms", table(SPLITS, split_rows(rows))),
        ("Against others", table(OTHERS, rows)),
        ("Serving", table(SERVING, rows)),
        ("Right", table(RIGHT, rows)),
        ("The goal", goal(rows)),
        ("Failed", failed),
    )
    lines: list[str] = []
    for title, body in parts:
        some = list(body)
        lines += ["", f"## {title}", "", *some] if some else []
    return "\n".join(lines)
