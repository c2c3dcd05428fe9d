"""Mutated plan files; ``scripts/fuzz.py plans`` tries ten thousand of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from refitkit.recipe import RefitPlan, store
from tests.fuzzing import quiet_alarm  # noqa: F401 - a fixture
from tests.unit.recipe import mutants

SCRIPT = Path(__file__).parents[3] / "scripts" / "fuzz.py"


pytestmark = pytest.mark.usefixtures("quiet_alarm")


def test_the_plan_itself_is_good() -> None:
    assert RefitPlan.from_bytes(mutants.content()).data == mutants.original().data
    assert mutants._verdict(mutants.content()) == (mutants.SAME, "")
    assert not all(
        mutants.same_bits(mutants.truth(1)[key], mutants.truth(2)[key]) for key in mutants.truth(1)
    )


def test_mutants_are_known_by_their_number() -> None:
    assert mutants.mutant(7) == mutants.mutant(7)
    assert len({mutants.mutant(number)[1] for number in range(40)}) > 35


def test_mutants_are_refused_or_do_no_harm() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "plans", "--count=300"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("300 mutants of plans\n"), run.stdout


def verdicts(count: int) -> Counter[str]:
    return Counter(mutants.judge(number)[0] for number in range(count))


def test_a_reader_that_checks_nothing_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "problems_of", lambda data: iter(()))
    assert any(verdict.startswith("fault") for verdict in verdicts(60))


def test_damage_that_gives_other_slots_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only edits that were sealed with a new digest need a proof."""
    monkeypatch.setattr(mutants, "mutant", lambda number: ("bytes changed", mutants.content()))
    other = mutants.truth(3)
    monkeypatch.setattr(mutants, "truth", lambda seed: other)
    assert verdicts(1) == {"fault: damage that gave other slots": 1}


def test_a_hang_and_an_error_without_a_type_would_be_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spins(file: bytes) -> tuple[str, str]:
        while True:
            pass

    def fails(file: bytes) -> tuple[str, str]:
        raise KeyError("x")

    monkeypatch.setattr(mutants, "SECONDS", 1)
    monkeypatch.setattr(mutants, "_verdict", spins)
    assert verdicts(1) == {"fault: it hung": 1}
    monkeypatch.setattr(mutants, "_verdict", fails)
    assert verdicts(1) == {"fault: KeyError is no RefitError": 1}
