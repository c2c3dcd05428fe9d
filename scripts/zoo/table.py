"""Results as ``docs/zoo.md``."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from statistics import geometric_mean
from typing import Any

PACKAGES = (
    "torch",
    "torch-tensorrt-rtx",
    "tensorrt-rtx",
    "torchvision",
    "timm",
    "transformers",
    "numpy",
)
STATES = ("recipe", "pinned", "frozen", "unmapped")
Row = dict[str, Any]
_SECOND = "<!-- made by python -m scripts.zoo --backend aotinductor -->"
"""What the second part of the page begins with."""


def with_part(text: str, backend: str, made: str) -> str:
    """The page with one backend's part replaced; the other part stays what it is."""
    first, _, second = text.partition(_SECOND)
    if backend == "aotinductor":
        second = made
    else:
        first = made
    return f"{first.rstrip()}\n\n{_SECOND}\n\n{second.strip()}\n" if second.strip() else first


def page(results: list[Row]) -> str:
    """The whole page."""
    tried = [one for one in results if one["status"] != "upstream"]
    refused = [one for one in results if one["status"] == "upstream"]
    failed = [one for one in tried if one["status"] != "ok"]
    parts = [
        _head(tried),
        _summary(tried, refused),
        _failures(failed),
        "## Models\n\n" + _table(tried),
        _unbuilt(tried),
        _refused(refused),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(tried: list[Row]) -> str:
    counts = Counter(str(one.get("commit", "")) for one in tried)
    commits = ", ".join(f"{commit} ({count} rows)" for commit, count in counts.most_common())
    return f"""# The zoo

Made by `make zoo` (`python -m scripts.zoo --engines`), not by hand, at commit {commits}.
No weights are downloaded: all are random.

Every model is planned offline for the backend `tensorrt_network`, from a program with weights A.
Then two more programs are exported with other weights, B and C, and go through the reference's own
lowering, partitioning and interpreter; what `plan.materialize` makes of B's and C's state_dict is
compared with that, slot by slot, as raw bytes. Every float has moved in B and C, zeros and ones
too; ties and the domains of values are kept (variances are positive, indices in range). C has
values that are huge, tiny, denormal and -0, and its buffers of indices are permuted; where that
makes the reference's own values NaN, other weights are drawn. For the engine bytes, a module
compiled from A is refitted to B by the plan, and B's networks are built from scratch: the bytes
have to be equal, as for the verifier `engine-bytes`. The builder of TensorRT-RTX orders several
outputs of one network by chance, even in one process; so a network is built from scratch until the
bytes are equal, at most 12 times ("equal to build 3"), and where its own builds differ from one
another and none is equal, that decides nothing ("undecided"). In half precision there is one
round, C.

{versions()}"""


def versions() -> str:
    """Versions of what was used, as a sentence."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "Versions: " + ", ".join(found) + "."


def _summary(tried: list[Row], refused: list[Row]) -> str:
    ok = [one for one in tried if _slots_equal(one)]
    models = {dtype: sum(one["dtype"] == dtype for one in tried) for dtype in _dtypes(tried)}
    states = Counter[str]()
    for one in tried:
        states.update(one.get("states", {}))
    differ = sum(r["differ"] for one in tried for r in one.get("rounds", {}).values())
    compared = sum(one.get("slots", 0) * len(one.get("rounds", {})) for one in tried)
    bytes_ = Counter(_bytes(one).partition(" to build")[0] for one in tried)
    lines = [
        ("models and dtypes", f"{len(tried)}: " + ", ".join(f"{n} {d}" for d, n in models.items())),
        ("all slots bit-equal, none unmapped", f"{len(ok)} of {len(tried)}"),
        ("slots", f"{sum(states.values())}: " + ", ".join(f"{states[s]} {s}" for s in STATES)),
        ("slot values compared", f"{compared}, of which {differ} differ"),
        ("engine bytes", ", ".join(f"{n} {what}" for what, n in bytes_.most_common())),
        ("with several engines", str(sum(one.get("engines", 0) > 1 for one in tried))),
        ("with dynamic shapes", str(sum("dynamic" in one["model"] for one in tried))),
        ("rounds with outliers", str(sum(_had_outliers(one) for one in tried))),
        ("planning over the reference's export and rebuild", _ratio(ok)),
        ("what upstream cannot do (not counted)", str(len(refused))),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in lines)])


def _slots_equal(one: Row) -> bool:
    rounds = one.get("rounds", {}).values()
    wrong = any(r["differ"] or "error" in r for r in rounds)
    return bool(rounds) and not wrong and not one["states"].get("unmapped")


def _dtypes(results: list[Row]) -> list[str]:
    return list(dict.fromkeys(one["dtype"] for one in results))


def _had_outliers(one: Row) -> bool:
    return any(r["outliers"] for r in one.get("rounds", {}).values())


def _ratio(ok: list[Row]) -> str:
    ratios = [
        one["seconds"]["plan"] / one["seconds"]["reference B"]
        for one in ok
        if one["seconds"].get("reference B")
    ]
    return f"{geometric_mean(ratios):.2f} (geometric mean)" if ratios else ""


def _bytes(one: Row) -> str:
    said = str(one.get("bytes") or "not compared")
    kind = said.partition(":")[0]
    return kind if kind in {"not built", "undecided"} else said


def _table(tried: list[Row]) -> str:
    head = (
        "| model | dtype | slots | engines | recipe/pinned/frozen/unmapped | ops | differ "
        "| engine bytes | planning, s |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *map(_row, tried)])


def _row(one: Row) -> str:
    states, rounds = one.get("states", {}), one.get("rounds", {})
    cells = (
        one["model"],
        one["dtype"],
        one.get("slots", ""),
        one.get("engines", ""),
        "/".join(str(states.get(state, 0)) for state in STATES),
        one.get("ops", ""),
        "error" if any("error" in r for r in rounds.values()) else _differ(rounds),
        _bytes(one),
        one.get("seconds", {}).get("plan", ""),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _differ(rounds: Row) -> str:
    return str(sum(r["differ"] for r in rounds.values())) if rounds else "not compared"


def _failures(failed: list[Row]) -> str:
    if not failed:
        return ""
    lines = [f"- {one['model']}, {one['dtype']}: {text_of(one['reason'])}" for one in failed]
    return "\n".join(["## Failures\n", *lines])


def _unbuilt(tried: list[Row]) -> str:
    lines = [
        f"- {one['model']}, {one['dtype']}: {text_of(one['bytes'])}"
        for one in tried
        if _bytes(one) in {"not built", "undecided"}
    ]
    return "\n".join(["## Engines that are not compared\n", *lines]) if lines else ""


def _refused(refused: list[Row]) -> str:
    if not refused:
        return ""
    intro = (
        "Not counted above: `torch.export` or Torch-TensorRT fails on them, without refitkit too."
    )
    lines = [f"- {one['model']}, {one['dtype']}: {text_of(one['reason'])}" for one in refused]
    return "\n".join(["## What upstream cannot do\n", intro, "", *lines])


def text_of(reason: str) -> str:
    """A reason as Markdown text of moderate length."""
    for sign in "|<>[]()_*`":
        reason = reason.replace(sign, f"\\{sign}")
    return reason if len(reason) <= 300 else reason[:297] + "..."
