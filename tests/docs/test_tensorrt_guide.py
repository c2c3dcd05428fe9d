"""docs/guides/tensorrt.md: its CPU code runs, and what its GPU code names exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.model import RefitReport
from refitkit.pipeline import RefitResult

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "tensorrt.md").read_text()
BLOCK = re.compile(r"<!-- (test|gpu): ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = {(kind, name): code for kind, name, code in BLOCK.findall(PAGE)}
HERE = [name for kind, name in BLOCKS if kind == "test"]
THERE = [name for kind, name in BLOCKS if kind == "gpu"]

needs_torch_tensorrt = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed: refitkit[rtx]"
)


def test_every_python_block_is_looked_at() -> None:
    assert PAGE.count("```python") == len(BLOCKS)
    assert (HERE[0], THERE) == ("build", ["compile", "theirs", "drop-in", "save"])


def test_links_and_headings() -> None:
    for extra in ("rtx", "tensorrt"):
        assert f"pip install 'refitkit[{extra}]'" in PAGE
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


@needs_torch_tensorrt
def test_code_that_needs_no_gpu_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for name in HERE:
        code = BLOCKS["test", name]
        exec(compile(code, f"tensorrt.md:{name}", "exec"), names)  # noqa: S102
        said = capsys.readouterr().out
        for line in code.splitlines():
            assert not line.startswith("# ") or line[2:] in said.splitlines(), line
    held = {path.name for path in (tmp_path / "model.networks").iterdir()}
    assert held == {"refitkit.network", *(f"{name}.engine" for name in names["again"].engines)}
    (engine,) = (tmp_path / "model.networks").glob("*.engine")
    assert (tmp_path / "model.engine").read_bytes() == engine.read_bytes()
    assert {row.strategy for row in names["result"].report.ledger} == {"recipe"}
    assert names["result"].report.verification.ok
    assert len(names["plan"].ledger) == len(names["networks"].slots)


# ---- what needs a GPU: every name and argument exists -------------------------------------------

KNOWN: dict[str, Any] = {"compiled": refitkit.CompiledModule, "again": refitkit.CompiledModule}


def called(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression of dotted names stands for; None where it begins with a local one."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        of = called(node.value, names)
        return None if of is None else getattr(of, node.attr)
    return None


def imported(tree: ast.AST) -> dict[str, Any]:
    names = dict(KNOWN)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.name: importlib.import_module(one.name) for one in node.names}
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {one.name: getattr(module, one.name) for one in node.names}
    return names


@needs_torch_tensorrt
@pytest.mark.parametrize("name", THERE)
def test_what_code_for_a_gpu_names_exists(name: str) -> None:
    if not upstream.has_gpu():
        upstream.import_headless()
    tree = ast.parse(BLOCKS["gpu", name])
    names = imported(tree)
    seen = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            called(node, names)  # raises AttributeError
        if isinstance(node, ast.Call):
            function = called(node.func, names)
            if function is None:
                continue
            seen += 1
            known = inspect.signature(signed(function)).parameters
            given = {str(one.arg) for one in node.keywords}
            assert given <= known.keys(), ast.unparse(node)
    assert seen >= 2


def signed(function: Any) -> Any:
    """The function whose signature counts: the drop-in binds its arguments itself."""
    from refitkit import compat

    return compat._refit if function is compat.refit_module_weights else function


def test_what_the_report_is_said_to_have_exists() -> None:
    said = set(re.findall(r"report\.(\w+)", PAGE))
    assert {"ledger", "memory", "stages", "verification"} <= said
    fields = RefitReport.model_fields.keys() | {"seconds"}
    assert said <= fields
    assert "module" in inspect.signature(RefitResult).parameters
    assert isinstance(RefitResult.report, property)


def test_settings_and_errors_that_are_named_exist() -> None:
    for name in re.findall(r"`(\w+Error)`", PAGE):
        assert issubclass(getattr(refitkit, name), refitkit.RefitError)
    for name in re.findall(r"Config[.(](\w+)", PAGE):
        assert name in refitkit.Config.model_fields
    for name in re.findall(r"refitkit\.compat\.(\w+)", PAGE):
        assert hasattr(importlib.import_module("refitkit.compat"), name)
