"""docs/guides/serving.md: its code runs, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/serving.md").read_text()
FOUND = re.findall(r"<!-- (test|script): (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)
BLOCKS = {name: code for kind, name, code in FOUND if kind == "test"}
SCRIPTS = {name: code for kind, name, code in FOUND if kind == "script"}


def said(code: str) -> list[str]:
    """What the page says that a block prints."""
    return [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Set torch's threads back: the page sets them for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_python_block_is_run_here() -> None:
    assert PAGE.count("```python") == len(BLOCKS) + len(SCRIPTS)
    assert list(BLOCKS) == ["threads", "undo", "canary", "donate", "noticed", "routes"]
    assert list(SCRIPTS) == ["workers"]


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs/guides" / link).exists(), link


@pytest.mark.usefixtures("_one_thread")
def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for name, code in BLOCKS.items():
        exec(compile(code, f"serving.md:{name}", "exec"), names)  # noqa: S102
        assert capsys.readouterr().out.splitlines() == said(code), name
    assert len(list(names["answers"])) == 100
    # the script goes on from the file that the page has written
    for name, code in SCRIPTS.items():
        if name == "workers" and not hasattr(refitkit.CompiledModule, "share"):
            continue
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == said(code), name


def test_what_the_page_says_of_writes_to_donated_tensors() -> None:
    """The table: which writes move the version that refitkit looks at."""
    for write, is_noticed in (
        (lambda t: t.add_(1), True),
        (lambda t: t.view(2, 2)[0].add_(1), True),
        (lambda t: t.data.add_(1), False),
        (lambda t: t.numpy().__iadd__(1), False),
        (lambda t: torch.from_dlpack(t).add_(1), False),
    ):
        tensor = torch.zeros(4)
        before = tensor._version
        write(tensor)
        assert tensor[0] == 1
        assert (tensor._version != before) is is_noticed


def test_what_the_page_says_of_optimizers() -> None:
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.ones(4)
        before = parameter._version
        torch.optim.SGD([parameter], lr=1.0, fused=fused).step()
        assert parameter[0] == -1
        assert (parameter._version == before) is fused
