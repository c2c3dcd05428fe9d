"""Starting up imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "sklearn", "numpy", "tensorrt", "torch_tensorrt", "rich", "safetensors")

CODE = """
import sys
from refitkit.cli.main import main

code = main(sys.argv[2:])
loaded = sorted(set(sys.argv[1].split(",")) & sys.modules.keys())
print("loaded", ",".join(loaded), file=sys.stderr)
sys.exit(code)
"""


def loaded_after(*args: str) -> list[str]:
    command = [sys.executable, "-c", CODE, ",".join(HEAVY), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stderr.splitlines()[-1].removeprefix("loaded ")
    return [name for name in last.split(",") if name]


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("compile", "inspect", "plan", "refit", "verify", "diff")),
        *([name, "--help"] for name in ("plugins", "doctor", "demo")),
        ["plugins", "--json"],
    ],
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    assert loaded_after(*args) == []


def test_the_probe_sees_torch() -> None:
    assert "torch" in loaded_after("doctor", "--json")


def test_importing_refitkit_imports_no_torch() -> None:
    code = "import refitkit, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
