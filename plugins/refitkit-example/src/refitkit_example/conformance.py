"""refitkit's suite for strategies on the mapper, for ``refitkit plugins check example``."""

from __future__ import annotations

import torch

from refitkit.model import LedgerRow, Slot, SlotState
from refitkit.protocols import MapRequest
from refitkit.recipe import TensorMap
from refitkit.testing import StrategySuite
from refitkit.testing.fakes import FakeModule
from refitkit.testing.scenes import make_plan
from refitkit_example.mapper import GateStrategy
from refitkit_example.op import LAYER

_NAMES = {"w": f"{LAYER}w CONSTANT", "deep.w": f"{LAYER}deep.w CONSTANT"}


class TestGateStrategy(StrategySuite):
    """Checks with two gates and an unrelated constant; ``torch.tanh`` computes right values."""

    def make_strategy(self) -> GateStrategy:
        """A new mapper."""
        return GateStrategy()

    def make_request(self, seed: int) -> MapRequest:
        """A request with weights for both gates."""
        return self._request(self._weights(seed), [*_NAMES.values(), "head/bias CONSTANT"])

    def make_lacking(self) -> MapRequest:
        """A request without the weight of one gate."""
        return self._request({"w": torch.ones(3)}, list(_NAMES.values()))

    def expected(self, seed: int) -> dict[tuple[str, str], torch.Tensor]:
        """The values of both gates, computed by torch in double precision."""
        weights = self._weights(seed).items()
        return {("e", _NAMES[fqn]): torch.tanh(w.double()).float() for fqn, w in weights}

    @staticmethod
    def _weights(seed: int) -> dict[str, torch.Tensor]:
        numbers = torch.linspace(-2.0, 2.0, 6) * seed
        return {"w": numbers[::2], "deep.w": numbers[1::2]}

    @staticmethod
    def _request(weights: dict[str, torch.Tensor], names: list[str]) -> MapRequest:
        slots = [Slot(engine="e", name=n, dtype="float32", shape=None, count=3) for n in names]
        rows = [LedgerRow(slot=s, state=SlotState.UNMAPPED, reason="not seen") for s in slots]
        plan = make_plan(rows)
        return MapRequest(plan, FakeModule([]), TensorMap(weights), plan.data.ledger)


SUITES = (TestGateStrategy,)
