"""The code of the README runs in order and prints the shown output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- test: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = dict(BLOCK.findall(README.read_text()))

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def namespace():
    return {}


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        yield


def test_every_python_block_is_run_here():
    assert README.read_text().count("```python") == len(BLOCKS) == 3


@pytest.mark.parametrize("name", list(BLOCKS))
def test_block(name, namespace, capsys):
    code = BLOCKS[name]
    told = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    exec(compile(code, f"README.md:{name}", "exec"), namespace)  # noqa: S102
    assert capsys.readouterr().out.splitlines() == told
