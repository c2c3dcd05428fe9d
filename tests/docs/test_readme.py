"""The README's code runs, in order, in one namespace, and says what it says it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- test: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = dict(BLOCK.findall((ROOT / "README.md").read_text()))


def run(name: str, namespace: dict[str, Any]) -> None:
    exec(compile(BLOCKS[name], f"README.md:{name}", "exec"), namespace)  # noqa: S102


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first block leaves behind; later blocks go on from there."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("readme"))
    names: dict[str, Any] = {}
    run("refit", names)
    patch.undo()
    return names


def test_every_python_block_is_run_here() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("```python") == len(BLOCKS) == 3


def test_the_ten_lines_are_ten_lines() -> None:
    lines = [line for line in BLOCKS["refit"].splitlines() if line.strip()]
    assert len(lines) <= 10


def test_refit(namespace: dict[str, Any]) -> None:
    assert namespace["result"].report.outcome == "committed"
    assert namespace["result"].report.verification.ok


def test_refusal_prints_what_the_readme_shows(
    namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [line[2:] for line in BLOCKS["refuse"].splitlines() if line.startswith("# ")]
    run("refuse", dict(namespace))
    assert capsys.readouterr().out.splitlines() == shown


def test_plugin(namespace: dict[str, Any]) -> None:
    code = [line for line in BLOCKS["plugin"].splitlines() if line.strip()]
    assert len(code) <= 20
    names = dict(namespace)
    run("plugin", names)
    assert not names["compiled"](names["x"]).any()
    huge = {"0.weight": names["torch"].full((4, 8), 1e6), "0.bias": names["torch"].zeros(4)}
    with pytest.raises(names["refitkit"].WeightMismatchError, match="too large"):
        names["pipeline"].refit(names["compiled"], huge)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
