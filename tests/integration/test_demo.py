"""``refitkit demo``: what it says of itself is true, and it fails when the refit is sabotaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import refitkit
from refitkit.cli.demo_run import DemoResult
from refitkit.cli.main import main

if TYPE_CHECKING:
    from refitkit.protocols import WeightSource

SECONDS = 500


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    """One run of the demo, and the folder that it kept."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "refitkit.cli", "demo", "--json", "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return DemoResult.model_validate(json.loads(done.stdout)), folder


def test_its_numbers_are_consistent(demo: tuple[DemoResult, Path]) -> None:
    result, _ = demo
    assert result.problems() == ()
    assert result.samples == 450
    assert result.early.eager < 0.9
    assert result.later.eager > 0.95
    for accuracy in (result.early, result.later, result.after_all):
        assert accuracy.engine == accuracy.eager
        assert accuracy.differing == 0
    gained = (result.later.eager - result.early.eager) * result.samples
    assert result.changed >= gained - 1e-6
    assert result.times_as_fast == result.compile_seconds / result.first_refit_seconds
    for later in result.later_refits:
        assert later.times_as_fast == result.compile_seconds / later.seconds
    assert {later.verifier for later in result.later_refits} == {"outputs", "weights"}
    verification = result.report.verification
    assert verification is not None
    assert verification.verifier == "outputs"
    (measure,) = verification.measures
    assert 0 <= measure.max_abs_error <= measure.limit
    assert result.report.seconds <= result.first_refit_seconds


def test_what_it_keeps_is_what_it_measured(demo: tuple[DemoResult, Path]) -> None:
    """Accuracy again, from the files alone and with nothing of the demo but its test digits."""
    from refitkit.cli.demo_run import load_digits, make_net

    result, folder = demo
    _, test = load_digits()
    assert load_file(folder / "inputs.safetensors")["0"].equal(test.pictures)
    compiled = refitkit.load(folder / "digits.refitkit")
    for name, accuracy in (("early", result.early), ("later", result.later)):
        state = load_file(folder / f"{name}.safetensors")
        refitkit.refit(compiled, state)
        net = make_net().eval()
        net.load_state_dict(state)
        with torch.no_grad():
            eager, engine = (m(test.pictures).argmax(1) for m in (net, compiled))
        assert engine.equal(eager)
        assert float((engine == test.labels).double().mean()) == accuracy.engine


class Saboteur:
    """Reads the early checkpoint wherever the later one is asked for.

    Every check and verifier of refitkit reads the same source, so none of them can notice.
    """

    name = "saboteur"

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: Any) -> WeightSource | None:
        from refitkit.recipe import TensorMap

        if not isinstance(source, Path) or source.name != "later.safetensors":
            return None
        return TensorMap(load_file(source.with_name("early.safetensors")))


def test_a_sabotaged_refit_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refitkit.cli.demo_run.LATER", 2)
    code = main(["demo", "--json"], plugins=[Saboteur()])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == 1
    assert error["type"] == "VerificationError"
    wrong = {problem["subject"] for problem in error["problems"]}
    assert {"engine, later", "engine, after_all"} <= wrong
    report = DemoResult.model_validate(error["report"])
    assert report.later.engine == report.early.engine < report.later.eager
    assert report.later.differing == report.changed


def test_the_saboteur_is_what_is_noticed(tmp_path: Path) -> None:
    """The plugin of the test above does swap the weights."""
    for name, value in (("early", 1.0), ("later", 2.0)):
        save_file({"w": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    pipeline = refitkit.Pipeline(plugins=[Saboteur()])
    assert float(pipeline.open_weights(tmp_path / "later.safetensors").get("w")) == 1.0
