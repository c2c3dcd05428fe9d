"""A refit from a sharded checkpoint holds two sets of weights, and nothing else of any size.

By the benchmark that does it with 4 GB: ``benchmarks/sharded_memory.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sharded_memory.py"
SIZES = ["--gigabytes", "0.1", "--width", "2048", "--shards", "3"]
IMPORTS = 0.75
"""What libraries may take that are needed first, in engine bytes: 50 MB, and less than a copy."""

BLUR = 0.25
"""One layer of six, and a little."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("sharded")

    def stage(name: str, *more: str) -> Any:
        command = [sys.executable, str(SCRIPT), *SIZES, "--stage", name, "--folder", str(folder)]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    made = stage("make")
    assert made["files"] == 3
    return stage


@pytest.mark.parametrize(
    ("how", "verifier", "sets", "more"),
    [
        ([], "weights", 1, BLUR),
        (["--delta"], "weights", 1, BLUR),
        (["--inputs"], "outputs", 1, IMPORTS),
        (["--give-up"], "weights", 0, BLUR),
    ],
    ids=["plain", "delta", "outputs", "given up"],
)
def test_two_sets_of_weights_are_the_most(
    how: list[str], verifier: str, sets: int, more: float, run: Callable[..., Any]
) -> None:
    """The live ones, and those for the way back, unless it is given up."""
    found = run("measure", *how)
    engine = found["engine"]
    assert 0.9e8 < engine < 1.1e8
    assert 1 <= (found["load_peak"] - found["begin"]) / engine < 1 + IMPORTS
    assert sets <= (found["refit_peak"] - found["loaded"]) / engine < sets + more
    assert found["changed"]
    assert found["verifier"] == verifier


@pytest.mark.parametrize("how", [[], ["--give-up"]], ids=["way back", "given up"])
def test_what_outputs_are_compared_with_is_no_set_of_weights(
    how: list[str], run: Callable[..., Any]
) -> None:
    """Eager torch computes it with one layer after another; what it imports is there already."""
    found = run("measure", "--inputs", "--again", *how)
    sets = 0 if how else 1  # besides the live ones
    assert sets <= (found["refit_base"] - found["loaded"]) / found["engine"] < sets + IMPORTS
    assert (found["refit_peak"] - found["refit_base"]) / found["engine"] < BLUR
    assert found["changed"]
    assert found["verifier"] == "outputs"
