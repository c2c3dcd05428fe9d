"""``refitkit diff`` as it is printed, as JSON, and by its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes import Opener, make_module, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Thirty tensors, of which the second file has other values for 25."""
    a = {f"w{n:02}": torch.ones(4) for n in range(30)}
    b = {name: value * (1 + max(n - 4, 0)) for n, (name, value) in enumerate(a.items())}
    a["shape"], b["shape"] = torch.ones(2, 3), torch.ones(6)
    a["kind"], b["kind"] = torch.ones(2), torch.ones(2, dtype=torch.int64)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def rows_of(out: str) -> list[list[str]]:
    """Cells of the table, without its head."""
    lines = [line.split() for line in out.splitlines()]
    start = next(n for n, line in enumerate(lines) if line[:1] == ["name"]) + 2
    end = next(n for n, line in enumerate(lines) if line[:1] == ["A"])
    return [line for line in lines[start:end] if line]


def test_the_table(run: Callable[..., Outcome], files: tuple[Path, Path]) -> None:
    outcome = run("diff", *files)
    assert outcome.code == 0
    rows = rows_of(outcome.out)
    assert rows[0] == ["kind", "other", "dtype", "float32", "->", "int64", "2"]
    assert rows[1] == ["shape", "other", "shape", "float32", "2", "x", "3", "->", "6"]
    assert rows[2] == ["w29", "changed", "float32", "4", "25", "25", "1"]
    assert len(rows) == 20
    assert "7 rows that differ: --all shows them" in outcome.out
    assert "25 changed, 1 other dtype, 1 other shape, 5 same" in outcome.out
    assert all(f"'{file}'" in outcome.out for file in files)


def test_more_and_fewer_rows(run: Callable[..., Outcome], files: tuple[Path, Path]) -> None:
    shown = run("diff", *files, "--all").out
    assert len(rows_of(shown)) == 32
    assert rows_of(shown)[-1] == ["w04", "same", "float32", "4", "0", "0", "0"]
    assert "not shown" not in shown
    assert len(rows_of(run("diff", *files, "--top", "3").out)) == 3
    none = run("diff", *files, "--top", "0").out
    assert "27 rows that differ" in none
    assert "changed  float32" not in none
    most = run("diff", *files, "--top", "100").out
    assert len(rows_of(most)) == 27
    assert "not shown" not in most
    assert run("diff", *files, "--top", "-1").code == 2


def test_json_has_all_rows(run: Callable[..., Outcome], files: tuple[Path, Path]) -> None:
    data = run("diff", *files, "--top", "1", "--json").data
    assert len(data["rows"]) == 32
    assert data["counts"] == {"changed": 25, "other dtype": 1, "other shape": 1, "same": 5}
    assert data["summary"].startswith("25 changed")
    assert data["rows"][2]["relative"] == 25
    assert data["rows"][0]["relative"] is None
    save_file({"z": torch.zeros(1)}, files[0])
    save_file({"z": torch.ones(1)}, files[1])
    assert run("diff", *files, "--json").data["rows"][0]["relative"] == "Infinity"


def test_the_exit_code(run: Callable[..., Outcome], files: tuple[Path, Path]) -> None:
    assert run("diff", *files, "--exit-code").code == 4
    assert run("diff", files[0], files[0], "--exit-code").code == 0
    same = run("diff", files[0], files[0])
    assert (same.code, "nothing changed: 32 same" in same.out) == (0, True)
    assert run("diff", *files, "--exit-code", "--json").data["counts"]["changed"] == 25


def test_a_module(run: Callable[..., Outcome], tmp_path: Path) -> None:
    plugin = Opener(make_module(1))
    new = weights_for(plugin.module, 1.0)
    new["e0.bias"] = plugin.module.engines["e0"].live["e0.bias"]
    file = tmp_path / "w.safetensors"
    alone = {f"net.{name}": value for name, value in new.items()}
    args = ("diff", "fake:module", file, "--json")
    save_file(alone, file)
    (note,) = run(*args, plugins=[plugin]).data["notes"]
    assert "'net.'" in note
    assert "'net.'" in run(*args[:-1], plugins=[plugin]).out
    save_file({**alone, **{f"old.{name}": value + 1 for name, value in new.items()}}, file)
    refused = run(*args, plugins=[plugin])
    assert (refused.code, refused.error["type"]) == (1, "WeightMismatchError")
    data = run(*args, "--subtree", "net.", plugins=[plugin]).data
    assert {row["name"]: row["state"] for row in data["rows"]} == {
        "e0.weight": "changed",
        "e0.bias": "same",
    }
    assert run("diff", "fake:module", "fake:module", plugins=[plugin]).code == 0


def test_rules_need_a_plan(
    run: Callable[..., Outcome], files: tuple[Path, Path], tmp_path: Path
) -> None:
    outcome = run("diff", *files, "--cast", "any", "--json")
    assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
    assert "--plan" in outcome.error["hint"]
    opened = make_module(1)
    plan, half, whole = (
        tmp_path / "p.refitplan",
        tmp_path / "h.safetensors",
        tmp_path / "w.safetensors",
    )
    plan.write_bytes(opened.attachments["plan.refitplan"])
    new = weights_for(opened, 1.0)
    save_file(new, whole)
    save_file({name: value.half() for name, value in new.items()}, half)
    args = ("diff", whole, half, "--plan", plan, "--exit-code")
    assert run(*args).code == 4
    assert run(*args, "--cast", "lossless").code == 0


def test_each_side_has_rules_of_its_own(run: Callable[..., Outcome], tmp_path: Path) -> None:
    a, b = {"net.w": torch.ones(2), "old.w": torch.zeros(2)}, {"x.w": torch.ones(2)}
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(a, files[0])
    save_file({**b, "head.w": torch.ones(1)}, files[1])
    flags = ("--a-subtree", "net.", "--b-rename", r"x\.(.*)=\1", "--b-ignore", r"head\..*")
    data = run("diff", *files, *flags, "--json").data
    assert data["counts"] == {"same": 1}
    assert any("head.w" in note for note in data["notes"])
    turned = [
        flag.replace("--a-", "--c-").replace("--b-", "--a-").replace("--c-", "--b-")
        for flag in flags
    ]
    assert run("diff", *files[::-1], *turned, "--json").data["counts"] == {"same": 1}
    assert run("diff", *files, "--ignore", r"(net|old|x|head)\.w", "--json").data["counts"] == {}
    opened = make_module(1)
    plan = tmp_path / "p.refitplan"
    plan.write_bytes(opened.attachments["plan.refitplan"])
    state = weights_for(opened, 1.0)
    half = {name: value.half() for name, value in state.items()}
    save_file({f"{t}.{n}": v + 0 for t in ("net", "old") for n, v in state.items()}, files[0])
    save_file(half, files[1])
    args = ("diff", *files, "--plan", plan, "--json")
    refused = run(*args, "--b-cast", "lossless")
    (note,) = refused.error["notes"]
    assert note == (
        "This is about A. To set rules for A only, use rules_a= in Python, or --a-... on the "
        "command line."
    )
    data = run(*args, "--b-cast", "lossless", "--a-subtree", "old.").data
    assert data["counts"] == {"same": 2}
    plugin = Opener(opened)
    refused = run(
        "diff", "fake:module", files[0], "--a-subtree", "net.", "--json", plugins=[plugin]
    )
    assert (refused.code, refused.error["problems"][0]["subject"]) == (2, "A")
    done = run("diff", "fake:module", files[0], "--b-subtree", "net.", "--json", plugins=[plugin])
    assert done.code == 0, done.err


def test_names_cannot_steer_the_terminal(run: Callable[..., Outcome], tmp_path: Path) -> None:
    save_file({"[red]a\x1b[2J": torch.zeros(1)}, tmp_path / "w.safetensors")
    out = run("diff", *(tmp_path / "w.safetensors",) * 2, "--all").out
    assert "[red]a\\x1b[2J" in out
    assert "\x1b" not in out


def test_what_cannot_be_read(run: Callable[..., Outcome], files: tuple[Path, Path]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-8])
    outcome = run("diff", *files, "--exit-code", "--json")
    assert (outcome.code, outcome.error["type"]) == (1, "SourceError")
    assert str(files[1]) in outcome.error["message"]
    for missing in ((files[0], "nothing"), ("nothing", files[0]), ("nothing", "nowhere")):
        assert run("diff", *missing, "--json").error["type"] == "SourceError"
