"""Mutated files of weights; ``scripts/fuzz.py weights`` tries ten thousand of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from refitkit.builtin.weights import torch_files
from refitkit.files import safetensors_format
from tests.fuzzing import quiet_alarm  # noqa: F401 - a fixture
from tests.unit.builtin.weights import mutants

SCRIPT = Path(__file__).parents[4] / "scripts" / "fuzz.py"


pytestmark = pytest.mark.usefixtures("quiet_alarm")


@pytest.mark.parametrize("kind", mutants.originals())
def test_the_files_themselves_are_good(kind: str) -> None:
    assert mutants._verdict(kind, mutants.originals()[kind]) == (mutants.BOTH, "")


def test_mutants_are_known_by_their_number() -> None:
    assert mutants.mutant(7) == mutants.mutant(7)
    assert len({mutants.mutant(number)[1] for number in range(40)}) > 30


def test_mutants_are_refused_or_read_as_the_library_reads_them() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "weights", "--count=500"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("500 mutants of weights\n"), run.stdout


def verdicts(count: int) -> Counter[str]:
    return Counter(mutants.judge(number)[0] for number in range(count))


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        (torch_files, "_storages_are_in_order", lambda archive: True),
        (safetensors_format, "_without_duplicates", dict),
    ],
)
def test_readers_that_check_less_would_be_found_out(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, instead: object
) -> None:
    monkeypatch.setattr(module, name, instead)
    assert any(verdict.startswith("fault") for verdict in verdicts(500))
