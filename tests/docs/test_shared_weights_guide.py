"""docs/guides/shared-weights.md: its script runs, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/guides/shared-weights.md").read_text()
BLOCKS = re.findall(r"<!-- test: script -->\n```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is of Linux")
def test_the_script_runs(tmp_path: Path) -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 1
    script = tmp_path / "script.py"
    script.write_text(BLOCKS[0])
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("# ") for line in BLOCKS[0].splitlines() if line.startswith("# ")]
    assert done.stdout.splitlines() == told
