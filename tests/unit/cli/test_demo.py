"""The verdict of the demo, and what it says when it cannot be run. No compile is needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.cli.demo_run import Accuracy, DemoResult, LaterRefits
from refitkit.model import RefitReport, VerificationResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome

EARLY = Accuracy(eager=0.6, engine=0.6, differing=0)
LATER = Accuracy(eager=0.99, engine=0.99, differing=0)
VERIFIED = RefitReport(
    outcome="committed",
    backend="aotinductor",
    source="later",
    version=1,
    verification=VerificationResult(verifier="outputs", ok=True),
)


def result(**changes: Any) -> DemoResult:
    good: dict[str, Any] = {
        "samples": 450,
        "changed": 180,
        "slots": 17,
        "weight_bytes": 1024,
        "early": EARLY,
        "later": LATER,
        "after_all": LATER,
        "train_seconds": 2.0,
        "compile_seconds": 10.0,
        "first_refit_seconds": 0.1,
        "times_as_fast": 100.0,
        "later_refits": (
            LaterRefits(verifier="outputs", refits=20, seconds=0.05, times_as_fast=200.0),
            LaterRefits(verifier="weights", refits=20, seconds=0.002, times_as_fast=5000.0),
        ),
        "report": VERIFIED,
    }
    return DemoResult(**{**good, **changes})


def test_a_good_result_has_no_problems() -> None:
    assert result().problems() == ()


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"changed": 0}, "checkpoints"),
        ({"early": LATER}, "checkpoints"),
        ({"early": Accuracy(eager=0.6, engine=0.6, differing=2)}, "engine, early"),
        ({"later": Accuracy(eager=0.99, engine=0.98, differing=0)}, "engine, later"),
        ({"later": Accuracy(eager=0.99, engine=0.99, differing=2)}, "engine, later"),
        ({"later": Accuracy(eager=0.99, engine=0.6, differing=180)}, "engine, later"),
        ({"after_all": Accuracy(eager=0.99, engine=0.6, differing=9)}, "engine, after_all"),
        ({"report": VERIFIED.model_copy(update={"verification": None})}, "first refit"),
    ],
)
def test_whatever_is_not_as_it_should_be_is_a_problem(
    changes: dict[str, Any], subject: str
) -> None:
    assert [problem.subject for problem in result(**changes).problems()] == [subject]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[DemoResult], None]:
    """Let the demo measure this."""

    def patch(fake: DemoResult) -> None:
        monkeypatch.setattr("refitkit.cli.demo._run", lambda *_: fake)

    return patch


def test_a_good_demo_is_0(
    run: Callable[..., Outcome], measured: Callable[[DemoResult], None], tmp_path: Path
) -> None:
    measured(result())
    outcome = run("demo", "--json")
    assert outcome.code == 0
    assert DemoResult.model_validate_json(outcome.out) == result()
    outcome = run("demo", "--keep", tmp_path / "new" / "folder")
    assert outcome.code == 0
    for part in ("60.0%", "99.0%", "10 s", "100 times as fast", "5000 times as fast", "50 ms"):
        assert part in outcome.out
    assert f"refitkit inspect {tmp_path}/new/folder/digits.refitkit" in outcome.out
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_bad_demo_is_1_and_shows_what_it_measured(
    run: Callable[..., Outcome], measured: Callable[[DemoResult], None]
) -> None:
    bad = result(later=Accuracy(eager=0.99, engine=0.6, differing=180))
    measured(bad)
    outcome = run("demo", "--json")
    assert outcome.code == 1
    assert outcome.error["type"] == "VerificationError"
    assert DemoResult.model_validate(outcome.error["report"]) == bad
    outcome = run("demo")
    assert outcome.code == 1
    assert "180 of 450 differ" in outcome.out
    assert "engine, later: differs" in outcome.err


def test_without_scikit_learn_the_extra_is_named(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    outcome = run("demo", "--json")
    assert outcome.code == 1
    assert "pip install 'refitkit[demo]'" in outcome.error["hint"]
    assert "Traceback" not in outcome.err


def test_a_folder_that_cannot_be_made(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        outcome = run("demo", "--keep", folder)
        assert outcome.code == 1
        assert str(tmp_path / "file") in outcome.err
        assert "Traceback" not in outcome.err


def test_training_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    import torch

    from refitkit.cli.demo_run import load_digits, train

    training, test = load_digits()
    assert len(training.labels) + len(test.labels) == 1797
    assert test.pictures.shape == (450, 1, 8, 8)
    assert (float(test.pictures.min()), float(test.pictures.max())) == (0.0, 1.0)
    assert torch.bincount(test.labels).min() >= 40  # every digit has its share
    state = torch.random.get_rng_state()
    early, later = train(training)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not early.training
    assert not later.training
    with torch.no_grad():
        says = [net(test.pictures).argmax(1) for net in (early, later)]
    shares = [float((one == test.labels).double().mean()) for one in says]
    assert shares[0] < 0.9
    assert shares[1] > 0.95
