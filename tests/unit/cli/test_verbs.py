"""``inspect``, ``plan``, ``refit``, ``verify`` and ``compile`` on a backend in memory."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from tests.fakes import Opener, make_module, same_state, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fakes import FakeModule
    from tests.unit.cli.conftest import Outcome


@pytest.fixture
def module() -> FakeModule:
    return make_module(2)


@pytest.fixture
def weights(tmp_path: Path, module: FakeModule) -> Path:
    """Weights that fit the module, and that it does not hold."""
    path = tmp_path / "weights.safetensors"
    save_file(weights_for(module, 5.0), path)
    return path


@pytest.fixture
def call(run: Callable[..., Outcome], module: FakeModule) -> Callable[..., Outcome]:
    def do(*args: object) -> Outcome:
        return run(*args, plugins=[Opener(module)])

    return do


# -- refit --------------------------------------------------------------------------------------


def test_a_refit_writes_and_reports(
    call: Callable[..., Outcome], module: FakeModule, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = call("refit", "fake:module", weights, "-o", out, "--json")
    assert outcome.code == 0
    report = refitkit.RefitReport.model_validate_json(outcome.out)
    assert (report.outcome, report.changed, report.slots_written) == ("committed", True, 4)
    assert report.verification is not None
    assert report.verification.verifier == "weights"
    new = weights_for(module, 5.0)
    assert same_state(module.by_slot(), new)
    assert json.loads(out.read_text())["attachments"] == ["plan.refitplan"]


def test_the_printed_report_says_what_was_done(
    call: Callable[..., Outcome], weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = call("refit", "fake:module", weights, "-o", out)
    assert outcome.code == 0
    for part in (
        "committed: weights changed",
        "4 slots, 64 bytes",
        "weights: 4 slots read back, 0 differ, largest error 0",
        "64 bytes in device",
        "commit",
        str(out),
    ):
        assert part in outcome.out
    again = call("refit", "fake:module", weights, "-o", out, "--verify", "none")
    assert "nothing changed" in again.out
    assert "only staging was checked" in again.out


def test_in_place_replaces_the_file(
    call: Callable[..., Outcome], weights: Path, tmp_path: Path
) -> None:
    file, link = tmp_path / "module.fake", tmp_path / "link.fake"
    file.write_text("old")
    link.symlink_to(file)
    assert call("refit", link, weights, "--in-place").code == 0
    assert link.is_symlink()
    assert "engines" in file.read_text()
    missing = call("refit", "fake:module", weights, "--in-place", "--json")
    assert missing.error["type"] == "UnsupportedTargetError"


def test_nothing_is_written_when_weights_do_not_fit(
    call: Callable[..., Outcome], module: FakeModule, tmp_path: Path
) -> None:
    file, out, before = tmp_path / "w.safetensors", tmp_path / "out", module.holds()
    save_file({"e0.weight": torch.full((2, 3), float("inf")), "e0.bais": torch.zeros(2)}, file)
    outcome = call("refit", "fake:module", file, "-o", out, "--json")
    assert outcome.code == 1
    assert outcome.error["type"] == "WeightMismatchError"
    kinds = {problem["subject"]: problem["kind"] for problem in outcome.error["problems"]}
    assert kinds["e0.bais"] == "unexpected"
    assert kinds["e0.bias"] == "missing"
    assert kinds["e0.weight"] == "non-finite"
    hints = {problem["kind"]: problem["hint"] for problem in outcome.error["problems"]}
    assert hints["missing"].endswith("to leave such slots as they are: pass --partial")
    assert hints["non-finite"].endswith("pass --no-check-finite")
    assert not out.exists()
    assert same_state(module.holds(), before)


def test_flags_of_a_refit(call: Callable[..., Outcome], module: FakeModule, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"e0.weight": torch.full((2, 3), float("inf"))}, file)
    args = ("refit", "fake:module", file, "-o", tmp_path / "out")
    assert call(*args, "--partial").code == 1
    assert call(*args, "--no-check-finite").code == 1
    assert call(*args, "--partial", "--no-check-finite").code == 0
    assert torch.isinf(module.holds()["e0/e0.weight"]).all()


def test_inputs_verify_outputs(call: Callable[..., Outcome], weights: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    save_file({"0": torch.ones(1)}, inputs)
    args = ("refit", "fake:module", weights, "-o", tmp_path / "out", "--inputs", inputs)
    outcome = call(*args, "--json")
    assert outcome.code == 2  # the module has no program, so there is nothing to compare with
    assert "nothing to compare with" in outcome.error["message"]
    assert call(*args, "--verify", "weights").code == 0
    assert call(*args, "--verify", "nobody").code == 2


def test_a_refit_that_verification_rejects_is_reported(
    call: Callable[..., Outcome],
    module: FakeModule,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = module.engines["e1"]
    monkeypatch.setattr(engine, "read", torch.zeros_like, raising=False)
    monkeypatch.setattr(engine, "read", lambda slot: torch.zeros_like(engine.live[slot]))
    outcome = call("refit", "fake:module", weights, "-o", tmp_path / "out", "--json")
    assert outcome.code == 1
    assert outcome.error["type"] == "VerificationError"
    assert outcome.error["report"]["outcome"] == "rolled-back"
    assert not (tmp_path / "out").exists()


def test_a_plan_from_elsewhere(
    call: Callable[..., Outcome], module: FakeModule, weights: Path, tmp_path: Path
) -> None:
    plan, other = tmp_path / "plan", tmp_path / "other"
    plan.write_bytes(module.attachments.pop("plan.refitplan"))
    other.write_bytes(make_module(1).attachments["plan.refitplan"])
    args = ("refit", "fake:module", weights, "-o", tmp_path / "out", "--json")
    assert call(*args).error["type"] == "PlanMismatchError"
    assert call(*args, "--plan", other).error["type"] == "PlanMismatchError"
    assert call(*args, "--plan", plan).code == 0


# -- verify -------------------------------------------------------------------------------------


def test_verify_says_whether_it_holds_them(
    call: Callable[..., Outcome], module: FakeModule, weights: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.safetensors"
    save_file(module.by_slot(), held)
    outcome = call("verify", "fake:module", held)
    assert outcome.code == 0
    assert "holds these weights (weights: 4 slots read back" in outcome.out
    assert call("verify", "fake:module", held, "--json").data["ok"] is True
    outcome = call("verify", "fake:module", weights, "--json")
    assert outcome.code == 1
    assert len(outcome.error["problems"]) == 4
    assert outcome.error["report"]["ok"] is False


def test_weights_of_another_model_are_not_held(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    for tensors in ({}, {"unknown": torch.zeros(1)}):
        save_file(tensors, tmp_path / "w.safetensors")
        outcome = call("verify", "fake:module", tmp_path / "w.safetensors", "--json")
        assert outcome.code == 1
        assert outcome.error["type"] == "WeightMismatchError"


def test_a_verifier_that_does_not_exist(call: Callable[..., Outcome], weights: Path) -> None:
    assert call("verify", "fake:module", weights, "--with", "nobody").code == 2


# -- inspect and plan ---------------------------------------------------------------------------


def test_inspect_weights(run: Callable[..., Outcome], weights: Path, tmp_path: Path) -> None:
    outcome = run("inspect", weights, "--json")
    assert outcome.code == 0
    assert (outcome.data["kind"], outcome.data["bytes"]) == ("weights", 64)
    found = {one["name"]: (one["dtype"], one["shape"]) for one in outcome.data["tensors"]}
    assert found["e1.weight"] == ("float32", [2, 3])
    assert "e1.weight" in run("inspect", weights).out
    torch.save({"w": torch.zeros(2), "n": 3, "s": torch.eye(2).to_sparse()}, tmp_path / "w.pt")
    outcome = run("inspect", tmp_path / "w.pt")
    assert outcome.code in {0, 1}
    assert "Traceback" not in outcome.err


def test_inspect_and_show_a_plan(
    run: Callable[..., Outcome], module: FakeModule, tmp_path: Path
) -> None:
    for name in ("plan.refitplan", "without-suffix"):
        (tmp_path / name).write_bytes(module.attachments["plan.refitplan"])
        outcome = run("inspect", tmp_path / name, "--json")
        assert (outcome.code, outcome.data["kind"]) == (0, "plan")
        shown = run("plan", "show", tmp_path / name, "--json")
        assert outcome.data == {"file": str(tmp_path / name), "kind": "plan", **shown.data}
        assert [row["slot"]["name"] for row in shown.data["ledger"]] == [
            "e0.weight",
            "e0.bias",
            "e1.weight",
            "e1.bias",
        ]
        table = run("plan", "show", tmp_path / name).out
        for part in ("engine e0, 2 slots", "e1.bias", "recipe", "2 x 3", "4 recipe"):
            assert part in table


def test_inspect_a_module(
    call: Callable[..., Outcome], run: Callable[..., Outcome], module: FakeModule, tmp_path: Path
) -> None:
    slot = {"name": "[a] w", "dtype": "float32", "shape": [2, 3], "device": "cpu"}
    plugin = Opener(module)
    plugin.backend.described = {
        "format": "fake/1",
        "weight_bytes": 2048,
        "nothing": None,
        "versions": {"fake": "1"},
        "slots": [slot],
    }
    plugin.backend.attached = module.attachments
    (tmp_path / "m.fake").write_text("x")
    outcome = run("inspect", tmp_path / "m.fake", "--json", plugins=[plugin])
    assert (outcome.data["kind"], outcome.data["slots"]) == ("module", [slot])
    table = run("inspect", tmp_path / "m.fake", plugins=[plugin]).out
    for part in ("weight bytes  2.0 KiB", "fake: 1", "1 slot", "[a] w", "2 x 3"):
        assert part in table
    shown = run("plan", "show", tmp_path / "m.fake", "--json", plugins=[plugin])
    assert len(shown.data["ledger"]) == 4


def test_what_inspect_cannot_show_is_told_for_each_kind(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    outcome = run("inspect", tmp_path / "file", "--json")
    assert outcome.code == 1
    subjects = [problem["subject"] for problem in outcome.error["problems"]]
    assert subjects == ["as a module", "as a plan", "as weights"]
    (tmp_path / "file.safetensors").write_text("text")
    outcome = run("inspect", tmp_path / "file.safetensors", "--json")
    assert [problem["subject"] for problem in outcome.error["problems"]] == ["as weights"]
    for name in (tmp_path, tmp_path / "missing"):
        assert run("inspect", name, "--json").error["type"] == "UnsupportedTargetError"


def test_names_of_tensors_cannot_steer_the_terminal(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    save_file({"[red]a\x1b[2J": torch.zeros(1)}, tmp_path / "w.safetensors")
    out = run("inspect", tmp_path / "w.safetensors").out
    assert "[red]a\\x1b[2J" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "FILE"),
        ("plan", "show", "FILE"),
        ("compile", "FILE", "-o", "out"),
        ("refit", "FILE", "w", "-o", "out"),
        ("refit", "fake:module", "FILE", "-o", "out"),
        ("refit", "fake:module", "w", "-o", "out", "--plan", "FILE"),
        ("refit", "fake:module", "w", "-o", "out", "--inputs", "FILE"),
        ("verify", "fake:module", "FILE"),
        ("plan", "make", "FILE", "--target", "x", "-o", "out"),
        ("plan", "make", "x", "--target", "FILE", "-o", "out"),
    ],
)
def test_what_may_not_be_read_is_refused_in_one_way(
    run: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
) -> None:
    file = tmp_path / "file.safetensors"
    file.touch()
    monkeypatch.chdir(tmp_path)
    may = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: str(p) != str(file) and may(p, mode))
    outcome = run(*(str(file) if arg == "FILE" else arg for arg in args), "--json")
    assert outcome.code == 1
    assert outcome.error["message"] == f"{str(file)!r} cannot be read: permission denied."


# -- compile and plan make ----------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Net(), (torch.zeros(1, 4),)), path)
    return path


def test_compile(call: Callable[..., Outcome], program: Path, tmp_path: Path) -> None:
    args = ("compile", program, "-o", tmp_path / "out", "--backend", "fake")
    outcome = call(*args, "--json")
    assert outcome.code == 0
    data = outcome.data
    assert (data["backend"], data["slots"], data["weight_bytes"]) == ("fake", 4, 23 * 4)
    assert data["file_bytes"] == (tmp_path / "out").stat().st_size
    stages = [(stage["verb"], stage["stage"]) for stage in data["stages"]]
    assert stages[:2] == [("compile", "compile"), ("compile", "plan")]
    assert stages[-1] == ("save", "save")
    assert {verb for verb, _ in stages} == {"compile", "save"}
    assert all(stage["seconds"] >= 0 for stage in data["stages"])
    printed = call(*args).out
    for part in ("fake", "4 slots of 92 bytes", "compile", str(tmp_path / "out")):
        assert part in printed


def test_options_reach_the_backend(
    call: Callable[..., Outcome], program: Path, tmp_path: Path
) -> None:
    args = ("compile", program, "-o", tmp_path / "out", "--backend", "fake", "--option")
    assert call(*args, "mute=true").code == 0
    outcome = call(*args, "deaf=true", "--json")
    assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
    assert "deaf" in outcome.error["message"]


def test_a_backend_that_does_not_exist(
    call: Callable[..., Outcome], program: Path, tmp_path: Path
) -> None:
    outcome = call("compile", program, "-o", tmp_path / "out", "--backend", "nobody", "--json")
    assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
    assert "aotinductor, fake" in outcome.error["hint"]


def test_the_output_is_checked_before_the_work(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = call("compile", tmp_path / "missing", "-o", tmp_path / "no" / "out", "--json")
    assert "cannot be written" in outcome.error["message"]


def test_make_a_plan(call: Callable[..., Outcome], program: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.refitplan"
    outcome = call("plan", "make", program, "--backend", "fake", "-o", out, "--json")
    assert outcome.code == 0
    assert refitkit.RefitPlan.load(out).backend == "fake"
    assert [row["slot"]["name"] for row in outcome.data["ledger"]] == [
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    ]
    other = call("plan", "make", program, "--target", "fake:module", "-o", out, "--json")
    assert other.error["type"] in {"PlanMismatchError", "UnsupportedTargetError"}
