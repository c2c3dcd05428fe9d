"""Every check has a bite: it fails on a broken object with the right message, and only there."""

from __future__ import annotations

import pytest

from refitkit.testing import (
    BackendSuite,
    Breach,
    EngineSuite,
    SourceSuite,
    StrategySuite,
    TransformSuite,
    VerifierSuite,
)
from refitkit.testing.offers import OfferSuite
from tests.conformance import (
    backend_bites,
    engine_bites,
    offer_bites,
    source_bites,
    strategy_bites,
    transform_bites,
    verifier_bites,
)
from tests.conformance.bites import Bite, attempt, checks_of

TABLES = {
    BackendSuite: backend_bites.BITES,
    EngineSuite: engine_bites.BITES,
    OfferSuite: offer_bites.BITES,
    SourceSuite: source_bites.BITES,
    StrategySuite: strategy_bites.BITES,
    TransformSuite: transform_bites.BITES,
    VerifierSuite: verifier_bites.BITES,
}
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


@pytest.mark.parametrize(("good", "check"), GOOD, ids=str)
def test_what_is_not_broken_passes(good: type, check: str) -> None:
    attempt(good, check)
