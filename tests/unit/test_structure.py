"""The check of the structure fails where a package has more than its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts import structure

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        ({"refitkit.model": structure.Size(0, 10_000, 0)}, "files, the limit is 0"),
        ({"refitkit.model": structure.Size(10_000, 0, 0)}, "imports, the limit is 0"),
        ({"refitkit.pipeline": structure.Size(10_000, 10_000, -1)}, "in circles, the limit is -1"),
    ],
)
def test_more_than_a_limit_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limits: Mapping[str, structure.Size],
    fault: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["structure", "--check"])
    assert structure.main() == 0
    monkeypatch.setattr(structure, "LIMITS", {**structure.LIMITS, **limits})
    assert structure.main() == 1
    assert fault in capsys.readouterr().out


def test_a_new_package_needs_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["structure", "--check"])
    monkeypatch.setattr(structure, "LIMITS", {})
    assert structure.main() == 1
