"""``plan show``: the ledger with recipes, one slot's recipe, guards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.model import Leaf, LeafKind, Number, OpCall, PinnedRef, SourceRef, Tensor, TorchName
from tests.fakes import call_row, make_plan, make_slot
from tests.unit.recipe import mutants

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome


@pytest.fixture
def show(run: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run ``plan show`` on a plan with recipes."""
    file = tmp_path / "net.refitplan"
    file.write_bytes(mutants.content())
    return lambda *args: run("plan", "show", file, *args)


def rows_of(text: str) -> dict[str, str]:
    """Lines of tables, by their first column, with single spaces."""
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    return {line.strip().split("  ")[0]: " ".join(line.split()) for line in lines}


def test_the_ledger_says_what_slots_are_made_of_and_by_how_many_ops(
    show: Callable[..., Outcome],
) -> None:
    out = show().out
    rows = rows_of(out)
    fold = "conv KERNEL recipe bfloat16 4 x 3 x 2 x 2 conv.weight, bn.weight, var 6"
    assert rows["conv KERNEL"] == fold
    assert rows["embedding"] == "embedding recipe float32 3 x 4 embed or twin, flat 7"
    assert rows["embed"] == "embed recipe float32 24 embed or twin"
    assert rows["table"] == "table pinned int32 2 x 2 its own name a constant of the graph"
    assert rows["index"] == "index frozen int64 3 a literal"
    assert "ops         27, shared by all slots" in out
    assert rows["scale"] == "scale bool scalar True bool()"


def test_one_slot_as_steps(show: Callable[..., Outcome]) -> None:
    out = show("--slot", "model/embedding").out
    steps = out[out.index("recipe\n") : out.index("guards")]
    assert [" ".join(line.split()) for line in steps.splitlines()[5:] if line] == [
        "embed parameter = twin float32 6 x 4",
        "flat parameter float32 24",
        "kept 'index' in the plan int64 3",
        "kept 'mask' in the plan bool 1 x 4",
        "%8.0 split_with_sizes(flat, [8, 4, 12]) float32 8",
        '%8.1 " float32 4',
        '%8.2 " float32 12',
        "%12 index.Tensor(embed, [kept 'index', None]) float32 3 x 4",
        "%13 add_.Tensor(%12, %8.1, alpha=2) float32 3 x 4",
        "%14 slice.Tensor(embed, 0, 1, 6, 2) float32 3 x 4",
        "%15 copy_(%13, %14) float32 3 x 4",
        "%16 masked_fill.Scalar(%15, kept 'mask', -inf) float32 3 x 4",
        "%17 clamp(%16, -2.5, None) float32 3 x 4",
        "embedding %17 float32 3 x 4",
    ]
    assert "engine  model" in out
    assert rows_of(out)["scale"] == "scale bool scalar True bool()"


@pytest.mark.parametrize(
    ("slot", "last"),
    [
        ("embed", "embed embed float32 24"),
        ("table", "table kept 'table' int32 2 x 2"),
        ("order", "order %25.1 int64 8"),
        ("KERNEL", "conv KERNEL %7 bfloat16 4 x 3 x 2 x 2"),
        ("CONSTANT", "[SHUFFLE] CONSTANT %10 float32 12"),
    ],
)
def test_the_end_of_a_name_is_enough(show: Callable[..., Outcome], slot: str, last: str) -> None:
    assert last in rows_of(show("--slot", slot).out).values()


def test_sources_that_override_what_is_kept_are_shown(show: Callable[..., Outcome]) -> None:
    out = show("--slot", "table").out
    assert "non persistent buffer" in out
    assert "reason  a constant of the graph" in out


def test_constants_are_written_as_people_write_them(show: Callable[..., Outcome]) -> None:
    assert "_to_copy(%4, dtype=bfloat16)" in show("--slot", "KERNEL").out


def test_as_json(show: Callable[..., Outcome]) -> None:
    data = show("--slot", "conv BIAS", "--json").data
    assert data["row"]["slot"]["name"] == "conv BIAS"
    assert [call["number"] for call in data["calls"]] == [0, 1, 2, 5, 6]
    assert data["calls"][0]["op"] == "aten.add.Tensor"
    assert data["calls"][0]["args"] == [{"kind": "source", "fqn": "var"}, 0.001]
    assert {leaf["fqn"] for leaf in data["leaves"]} == {"bn.weight", "mean", "var"}
    assert data["pinned"] == {}
    assert [guard["shown"] for guard in data["guards"]] == ["True"]
    kept = show("--slot", "embedding", "--json").data["pinned"]
    assert {name: one["shape"] for name, one in kept.items()} == {"index": [3], "mask": [1, 4]}


def test_an_unknown_slot(show: Callable[..., Outcome]) -> None:
    outcome = show("--slot", "embeding", "--json")
    assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
    assert [p["subject"] for p in outcome.error["problems"]] == ["model/embedding", "model/embed"]
    assert show("--slot", "no such thing at all", "--json").error["problems"] == []


def test_an_end_that_several_names_have(show: Callable[..., Outcome]) -> None:
    outcome = show("--slot", "s", "--json")
    assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
    assert [p["subject"] for p in outcome.error["problems"]] == ["model/sums", "model/scales"]


def test_names_in_a_plan_cannot_steer_the_terminal(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    odd = "a\x1b[2J"
    args: tuple[Any, ...] = (SourceRef(fqn=odd), PinnedRef(name=odd))
    call = OpCall(op="aten.mul.Tensor", args=args, results=(Tensor(dtype="float32", shape=(2,)),))
    row = call_row(make_slot(odd, (2,)), 0, odd)
    leaf = Leaf(fqn=odd, kind=LeafKind.BUFFER, dtype="float32", shape=(2,))
    kept = {odd: torch.ones(2)}
    make_plan([row], leaves=[leaf], calls=[call], pinned=kept).save(tmp_path / "p")
    for more in ((), ("--slot", odd), ("--slot", "x" + odd)):
        outcome = run("plan", "show", tmp_path / "p", *more)
        assert "\x1b" not in outcome.out + outcome.err
        assert "x1b" in outcome.out + outcome.err


def test_literals_of_all_kinds() -> None:
    from refitkit.cli.ledger import _text

    data = mutants.original().data
    shown = [_text(a, data) for a in (1, 1.5, True, None, "sum", TorchName(name="int8"), (1, (2,)))]  # type: ignore[arg-type]
    assert shown == ["1", "1.5", "True", "None", "'sum'", "int8", "[1, [2]]"]
    assert _text(Number(text="-inf"), data) == "-inf"
