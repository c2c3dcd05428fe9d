"""A slice of the campaign of interrupts; ``interrupts.py`` says how to run all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.campaign.interrupts import VERBS, Campaign, make_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file(tmp_path_factory.mktemp("source"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lines", [False, True], ids=["signals", "lines"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_slice(verb: str, lines: bool, source: Path, tmp_path: Path) -> None:
    campaign = Campaign(verb, source, tmp_path, lines=lines)
    campaign.run(count=6, seed=1)
    assert not campaign.problems
    assert campaign.outcomes["Interrupt"]
