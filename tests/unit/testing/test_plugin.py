"""The pytest plugin: its fixtures, and its imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from refitkit.testing import scenes
from refitkit.testing.scenes import ScenePlugin

HEAVY = ("torch", "numpy", "safetensors", "pydantic", "refitkit.host")
CODE = f"""
import sys
before = set(sys.modules)
import {{module}}
print([m for m in {HEAVY} if m in sys.modules and m not in before])
print([m for m in sys.modules if m.startswith("refitkit.builtin")])
"""


@pytest.mark.parametrize("module", ["refitkit.testing", "refitkit.testing.plugin"])
def test_importing_it_imports_neither_torch_nor_built_ins(module: str) -> None:
    command = [sys.executable, "-c", CODE.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.split("\n")[:2], done.stderr) == (["[]", "[]"], "")


def test_suites_can_be_imported_without_pytest() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None; import refitkit.testing as t;"
        "print([getattr(t, name) is not None for name in t.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.count("True"), done.stderr) == (9, "")


def test_a_host_without_what_is_installed(
    refitkit_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entry:
        name = "installed"
        value = "installed_plugin"
        dist = None

        def load(self) -> Any:
            raise AssertionError("it takes part")

    monkeypatch.setattr(scenes, "entry_points", lambda group: [Entry()])
    monkeypatch.setattr("refitkit.host.entry_points", lambda group: [Entry()])
    names = [info.name for info in refitkit_host(ScenePlugin(), no_plugins={"checks"}).plugins()]
    assert names[-1] == "conformance-scene"
    assert not {"installed", "checks"} & set(names)


def test_a_pipeline_an_engine_and_a_module(
    refitkit_pipeline: Any, refitkit_module: Any, refitkit_engine: Any
) -> None:
    pipeline = refitkit_pipeline(ScenePlugin(), check_finite=False)
    assert pipeline.config.check_finite is False
    compiled = pipeline.load(refitkit_module)
    new = {"w": torch.ones(2, 3), "b": torch.tensor([1.0, float("nan")])}
    report = pipeline.refit(compiled, new, verify="weights").report
    assert report.outcome == "committed"
    assert torch.equal(refitkit_engine.live["w"], new["w"])


def test_the_names_of_the_kit() -> None:
    import refitkit.testing as kit

    assert dir(kit) == kit.__all__ == sorted(kit._MODULES)
    with pytest.raises(AttributeError, match="EngineSuit"):
        _ = kit.EngineSuit
