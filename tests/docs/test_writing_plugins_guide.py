"""docs/guides/writing-plugins.md: the example is quoted as it is; the code runs, and says so."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import refitkit
from refitkit import hookspecs
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.cli.api import main
from refitkit.host import GROUP
from tests.fakes import Opener, make_module, same_state, weights_for

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "refitkit-example"
SOURCE = EXAMPLE / "src" / "refitkit_example"
PAGE = (ROOT / "docs" / "guides" / "writing-plugins.md").read_text()
BLOCK = re.compile(r"<!-- (file|run): ([\w.-]+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)
QUOTED = ("op.py", "converter.py", "mapper.py", "__init__.py")
RUN = {name: code for kind, name, code in BLOCKS if kind == "run"}


def lines(text: str) -> list[str]:
    """Lines that are not empty: where one block ends and the next begins there may be none."""
    return [line for line in text.splitlines() if line]


def test_every_python_block_is_looked_at() -> None:
    assert PAGE.count("```python") == len(BLOCKS)
    assert list(RUN) == [
        "object",
        "without",
        "formula",
        "with",
        "clash",
        "errors",
        "settings",
        "command",
    ]


@pytest.mark.parametrize("name", QUOTED)
def test_the_plugin_is_quoted_line_by_line(name: str) -> None:
    """All of it, in its order, and nothing else."""
    quoted = "".join(code for kind, file, code in BLOCKS if (kind, file) == ("file", name))
    assert lines(quoted) == lines((SOURCE / name).read_text())


def test_all_of_the_plugin_is_quoted() -> None:
    """But its conformance suite, which is a test."""
    assert {path.name for path in SOURCE.glob("*.py")} == {*QUOTED, "conformance.py"}
    assert {file for kind, file, _ in BLOCKS if kind == "file"} == set(QUOTED)


def test_the_plugin_has_at_most_100_lines() -> None:
    assert sum(len((SOURCE / name).read_text().splitlines()) for name in QUOTED) <= 100


def test_every_hook_is_in_the_table() -> None:
    table = PAGE.partition("## Which hook")[2].partition("\n## ")[0]
    hooks = {name for name in vars(hookspecs) if name.startswith("refitkit_")}
    assert set(re.findall(r"`(refitkit_\w+)`", table)) == hooks


def test_the_entry_points_are_those_of_the_example() -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    written = (EXAMPLE / "pyproject.toml").read_text()
    for line in lines(toml):
        assert line.partition("  #")[0].strip() in written


def test_names_and_links_exist() -> None:
    for name in re.findall(r"`(\w+Error)`", PAGE):
        assert issubclass(getattr(refitkit, name), refitkit.RefitError)
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGE):
        page = ROOT / "docs" / "guides" / (link or "writing-plugins.md")
        assert page.exists(), link
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [one.lower().replace(" ", "-") for one in headings], anchor
    for setting in re.findall(r"Config[.(](\w+)", PAGE):
        assert setting in refitkit.Config.model_fields


WALKS = re.findall(
    r"### (\w+)\n\n```console\n(.*?)```", PAGE.partition("## A walk for each kind")[2], re.DOTALL
)
KINDS = ["source", "transform", "strategy", "verifier", "backend", "listener", "command"]


def test_there_is_a_walk_for_each_kind() -> None:
    assert [title.lower() for title, _ in WALKS] == KINDS


@pytest.mark.parametrize(("title", "block"), WALKS)
def test_a_walk_has_the_commands_of_the_project_that_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, block: str
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *others = block.splitlines()
    assert first.startswith("$ refitkit plugins new ")
    assert main(first.removeprefix("$ refitkit ").split()) == 0
    readme = (tmp_path / f"my-{title.lower()}" / "README.md").read_text()
    commands = "".join(re.findall(r"```console\n(.*?)```", readme, re.DOTALL)).splitlines()
    start = PAGE.partition("## A walk for each kind")[2].partition("```console\n")[2]
    shared = start.partition("```")[0].replace("my-source", f"my-{title.lower()}").splitlines()
    assert [*shared, *others] == commands
    paragraph = PAGE.partition(block)[2].partition("\n### ")[0].partition("\n## ")[0]
    code = "".join(path.read_text() for path in (tmp_path / f"my-{title.lower()}").rglob("*.py"))
    for name in re.findall(r"`(\w+)`", paragraph):
        assert name in code or name == "verify", name


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as if it was installed."""
    monkeypatch.syspath_prepend(str(SOURCE.parent))
    entry = EntryPoint("example", "refitkit_example", GROUP)
    monkeypatch.setattr("refitkit.host.entry_points", lambda **_: [entry])


@pytest.mark.usefixtures("_installed")
@pytest.mark.skipif(not upstream.is_installed(), reason="torch_tensorrt is not installed")
def test_the_code_runs_and_says_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for name, code in RUN.items():
        exec(compile(code, f"writing-plugins.md:{name}", "exec"), names)  # noqa: S102
        said = capsys.readouterr().out.splitlines()
        told = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert said == told, name


def test_the_command_promotes_the_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"refitkit": refitkit}
    exec(compile(RUN["command"], "writing-plugins.md:command", "exec"), names)  # noqa: S102
    module, run, out = make_module(2), tmp_path / "run", tmp_path / "out"
    run.mkdir()
    command = ["promote", "fake:module", str(run), "-o", str(out), "--json"]
    plugins = [Opener(module), names["Promote"]()]
    assert main(command, plugins) == 1
    assert "There is no checkpoint" in capsys.readouterr().out
    for step in (1, 2):
        save_file(weights_for(module, float(step)), run / f"{step}.safetensors")
    assert main(command, plugins) == 0
    report = refitkit.RefitReport.model_validate_json(capsys.readouterr().out)
    assert (report.outcome, report.source) == ("committed", f"{str(run / '2.safetensors')!r}")
    held = module.by_slot()
    assert same_state(held, weights_for(module, 2.0))
    assert out.exists()
