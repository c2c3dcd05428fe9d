"""Results of AOTInductor as the second part of ``docs/zoo.md``."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from scripts.zoo.table import STATES, text_of, versions

Row = dict[str, Any]
FAMILIES = ("nn", "torchvision", "timm", "transformers")


def part(results: list[Row]) -> str:
    """The whole part."""
    tried = [one for one in results if one["status"] != "upstream"]
    refused = [one for one in results if one["status"] == "upstream"]
    parts = [
        _head(tried),
        _summary(tried, refused),
        _list("Failures", "", [one for one in tried if one["status"] != "ok"]),
        "## Models with AOTInductor\n\n" + _table(tried),
        _notes(tried),
        _list(
            "What upstream cannot do with AOTInductor",
            "Not counted above: `torch.export` or AOTInductor fails on them, without refitkit too.",
            refused,
        ),
    ]
    return "\n\n".join(one for one in parts if one)


def _head(tried: list[Row]) -> str:
    counts = Counter(str(one.get("commit", "")) for one in tried)
    commits = ", ".join(f"{commit} ({count} rows)" for commit, count in counts.most_common())
    return f"""# The zoo of AOTInductor

Made by `make zoo-aoti` (`python -m scripts.zoo --backend aotinductor`), not by hand, at commit
{commits}. All weights are random, all configurations are small, on the CPU.

Every model is exported as users do: with its keyword inputs, losses, and dicts or tuples of
results. `refitkit.compile` compiles it with the defaults and with proof. Then the engine is
refitted from the state_dict of another model, B: every float has moved, ties are kept. Its outputs
are compared with those of B in eager mode, after `load_state_dict`; the tolerances are those of
refits (`refitkit.config.TOLERANCES`). Last, the engine is refitted to the first weights, A: its
outputs have to be bit-equal to those from before. Models that keep a state and those with dynamic
shapes are called several times. "Error" is the largest difference of an output of B, divided by
the largest value of that output.

{versions()}"""


def _summary(tried: list[Row], refused: list[Row]) -> str:
    ok = [one for one in tried if one["status"] == "ok"]
    families = Counter(one["model"].partition("/")[0] for one in tried)
    states = Counter[str]()
    for one in tried:
        states.update(one.get("states", {}))
    shown = ", ".join(f"{families[name]} {name}" for name in FAMILIES if families[name])
    errors = [one["errors"]["B"] for one in ok]
    lines = [
        ("models", f"{len(tried)}: {shown}"),
        ("B equal to eager, A bit-equal again", f"{len(ok)} of {len(tried)}"),
        ("slots", f"{sum(states.values())}: " + ", ".join(f"{states[s]} {s}" for s in STATES)),
        ("error, median and largest", f"{median(errors):.1e}, {max(errors):.1e}" if ok else ""),
        ("what upstream cannot do (not counted)", str(len(refused))),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in lines)])


def _table(tried: list[Row]) -> str:
    head = "| model | dtype | slots | recipe/pinned | result | error |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(_row, tried)])


def _row(one: Row) -> str:
    states, error = one.get("states", {}), one.get("errors", {}).get("B")
    cells = (
        one["model"],
        one["dtype"],
        one.get("slots", ""),
        "/".join(str(states.get(state, 0)) for state in ("recipe", "pinned")),
        one["status"],
        "" if error is None else f"{error:.1e}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _list(title: str, intro: str, rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [f"- {one['model']}, {one['dtype']}: {text_of(one['reason'])}" for one in rows]
    return "\n".join([f"## {title}\n", *([intro, ""] if intro else []), *lines])


def _notes(tried: list[Row]) -> str:
    noted = [one for one in tried if one.get("notes")]
    lines = [f"- {one['model']}: {text_of('; '.join(one['notes']))}" for one in noted]
    return "\n".join(["## Notes of proofs and reports\n", *lines]) if lines else ""
