"""A slice of the campaign of faults; ``io_faults.py`` says how to run all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.campaign.interrupts import make_file
from tests.campaign.io_faults import VERBS, Campaign

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file(tmp_path_factory.mktemp("source"))


@pytest.fixture
def campaign(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Iterator[Campaign]:
    campaign = Campaign(request.param, source, tmp_path)
    yield campaign
    campaign.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("campaign", VERBS, indirect=True)
def test_a_slice(campaign: Campaign) -> None:
    campaign.run(count=4, allocations=1, seed=1)
    assert not campaign.problems
    assert sum(campaign.outcomes.values()) > 2
