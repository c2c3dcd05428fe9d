"""A slice of the campaign of kills; ``kills.py`` says how to run all of it."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.campaign.kills import VERBS, Campaign, Ground

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(tmp_path_factory.mktemp("ground"))
    before, tempfile.tempdir = tempfile.tempdir, str(made.temporary)
    yield made
    tempfile.tempdir = before


@pytest.mark.parametrize("verb", VERBS)
def test_a_slice(verb: str, ground: Ground) -> None:
    campaign = Campaign(verb, ground)
    campaign.run(count=2, seed=1)
    assert not campaign.problems
    assert campaign.outcomes["killed"]  # at a place it is never too late
