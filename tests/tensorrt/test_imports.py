"""Saved modules whose converters come from an installed plugin, opened by the command line.

The plugin is the guide's example, installed as files that importlib.metadata reads. Nothing but the
command line runs in the processes that open the file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refitkit.builtin.torch_tensorrt import upstream
from tests.tensorrt.helpers import needs_torch_tensorrt

pytestmark = needs_torch_tensorrt
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "plugins" / "refitkit-example" / "src" / "refitkit_example"
MAKE = """
import torch
from refitkit_example.op import gate

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6)
        self.weight = torch.nn.Parameter(torch.randn(6))

    def forward(self, x):
        return gate(self.linear(x), self.weight, "weight")

model = Net().eval()
torch.export.save(torch.export.export(model, (torch.randn(2, 4),)), "program.pt2")
torch.save(model.state_dict(), "first.pt")
torch.save(Net().state_dict(), "later.pt")

import refitkit
options = {"min_block_size": 1, "imports": ["refitkit_example.converter"]}
program = torch.export.load("program.pt2")
refitkit.compile(program, "tensorrt_network", options).save("saved")
"""


def run(folder: Path, *command: str, installed: bool = True) -> tuple[int, str]:
    """The exit code, and both streams."""
    paths = [str(ROOT), *([str(folder / "site")] if installed else [])]
    environment = {k: v for k, v in os.environ.items() if k != "REFITKIT_NO_PLUGIN"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def refitkit(folder: Path, *args: str, installed: bool = True) -> tuple[int, str]:
    return run(folder, "-m", "refitkit.cli", *args, installed=installed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed plugin, a program, later weights, and a saved module."""
    folder = tmp_path_factory.mktemp("imports")
    site = folder / "site"
    shutil.copytree(SOURCE, site / SOURCE.name, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "refitkit_example-0.1.0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\nName: refitkit-example\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text("[refitkit]\nexample = refitkit_example\n")
    files = [file.relative_to(site) for file in (site / SOURCE.name).glob("*.py")]
    (info / "RECORD").write_text("".join(f"{file.as_posix()},,\n" for file in files))
    code, text = run(folder, "-c", MAKE)
    assert code == 0, text
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "saved"),
        ("refit", "saved", "later.pt", "-o", "refitted"),
        ("verify", "saved", "first.pt"),
    ],
)
def test_the_command_line_opens_it(folder: Path, command: tuple[str, ...]) -> None:
    code, text = refitkit(folder, *command)
    assert code == 0, text
    assert "Error" not in text


@pytest.mark.parametrize(("more", "installed"), [((), False), (("--no-plugin", "example"), True)])
def test_without_the_plugin_it_says_what_to_do(
    folder: Path, more: tuple[str, ...], installed: bool
) -> None:
    code, text = refitkit(folder, "verify", "saved", "first.pt", *more, installed=installed)
    assert code == 1
    assert "refitkit_example.converter" in text
    assert "Install the plugins" in text


def test_a_converter_can_be_imported_without_a_gpu(folder: Path) -> None:
    code, text = run(
        folder,
        "-c",
        "import sys, refitkit_example.converter as c; "
        "print(callable(c.convert_gate), [m for m in sys.modules if m.startswith('tensorrt')])",
    )
    assert (code, text.strip()) == (0, "True []")


OPENED_HERE = """
import sys
from refitkit.builtin.torch_tensorrt import upstream
found = upstream.import_for_ops(["json", "needs_upstream"])
print(list(found), upstream.is_imported())
print([name for name in sys.modules if name.startswith(("torch_tensorrt", "tensorrt"))])
"""


@pytest.mark.skipif(upstream.has_gpu(), reason="torch_tensorrt can be imported with a GPU")
def test_a_module_that_needs_torch_tensorrt_is_no_failure_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "needs_upstream.py").write_text("import torch_tensorrt.dynamo\n")
    code, text = run(tmp_path, "-c", OPENED_HERE)
    assert (code, text.split("\n")[:2]) == (0, ["['needs_upstream'] False", "[]"])
