"""State_dicts whose tensors are spread over processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

CHILD = Path(__file__).parent / "children" / "refit_from_dtensors.py"
ROOT = Path(__file__).parents[4]


def test_every_process_gets_whole_tensors(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(CHILD), str(port), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name for file in tmp_path.iterdir()} == {"rank 0", "rank 1"}
