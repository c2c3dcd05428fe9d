"""No check without a bite: each fails on something broken, says what is wrong, and only there."""

from __future__ import annotations

import pytest

from refitkit.testing import Breach, EngineSuite
from tests.conformance import engine_bites
from tests.conformance.bites import Bite, attempt, checks_of

TABLES = {EngineSuite: engine_bites.BITES}
BITES = [bite for table in TABLES.values() for bite in table]


@pytest.mark.parametrize("bite", BITES, ids=lambda bite: bite.name)
def test_it_is_caught_and_told(bite: Bite) -> None:
    with pytest.raises(Breach, match=bite.says) as info:
        attempt(bite.broken, bite.check)
    assert info.value.advice.endswith(".")
    assert info.value.contract


@pytest.mark.parametrize("suite", TABLES, ids=lambda suite: suite.__name__)
def test_every_check_has_a_bite(suite: type) -> None:
    assert {bite.check for bite in TABLES[suite]} == checks_of(suite)


GOOD = sorted({(bite.good, bite.check) for bite in BITES}, key=str)


@pytest.mark.parametrize(("good", "check"), GOOD, ids=lambda value: str(value))
def test_what_is_not_broken_passes(good: type, check: str) -> None:
    attempt(good, check)
