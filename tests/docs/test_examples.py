"""examples/: each example runs, and its own checks pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "examples/serving.py"
LAST = "all checks passed"
SABOTAGE = f"""
import runpy, sys
from refitkit.pipeline import RefitResult
RefitResult.undo = lambda self: None
sys.argv = [{str(SERVING)!r}]
runpy.run_path({str(SERVING)!r}, run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_every_example_is_run_here() -> None:
    assert list((ROOT / "examples").glob("*.py")) == [SERVING]


def test_the_server_checks_itself() -> None:
    done = run(str(SERVING))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == LAST


def test_the_checks_of_the_server_bite() -> None:
    """Without rollbacks the answers after one are wrong."""
    done = run("-c", SABOTAGE)
    assert done.returncode == 1
    assert LAST not in done.stdout
    assert "these are not answers of the early weights" in done.stderr
