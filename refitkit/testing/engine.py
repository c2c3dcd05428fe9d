"""The suite for engines: ``class TestMyEngine(EngineSuite)``, a factory, an oracle."""

from __future__ import annotations

from refitkit.testing.engine_abilities import AbilityChecks
from refitkit.testing.engine_past import PastChecks
from refitkit.testing.engine_refusals import RefusalChecks
from refitkit.testing.engine_slots import SlotChecks
from refitkit.testing.engine_staging import StagingChecks
from refitkit.testing.engine_transaction import TransactionChecks


class EngineSuite(
    SlotChecks, StagingChecks, RefusalChecks, TransactionChecks, AbilityChecks, PastChecks
):
    """Every contract of :class:`refitkit.protocols.Engine` and of what engines may be able to do.

    Write ``make_engine`` and ``held``. Where any values will not do, write ``make_values``. With
    ``commit_fault`` and ``rollback_fault`` the way back is tried from where it is hardest.
    """
