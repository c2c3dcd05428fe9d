"""The verbs as plain functions: which pipeline they use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from refitkit import api

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ENTRY = "[refitkit]\nlate = late\n"


def test_all_functions_share_one_pipeline() -> None:
    assert api._pipeline() is api._pipeline()


def test_a_plugin_that_is_installed_later_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    before = api._pipeline()
    assert "late" not in {plugin.name for plugin in before.host.plugins()}
    (tmp_path / "late.py").write_text('"""A plugin without hooks."""\n')
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: late\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    after = api._pipeline()
    assert "late" in {plugin.name for plugin in after.host.plugins()}
    assert after is api._pipeline()


def test_folders_that_are_not_there_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, "/nowhere", ""])
    assert api._pipeline() is api._pipeline()
