"""Each call into torch fails once, in refits past the refitter: the weights are old or new."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt.direct import known
from refitkit.pipeline.pipeline import Pipeline
from tests.device_faults import DeviceFaults
from tests.fakes import Tripwire, same_state
from tests.unit.builtin.torch_tensorrt.scenes import TrtModule

Values = dict[str, torch.Tensor]
RUNTIMES = ("direct", "python")


def weights_of(module: TrtModule, seed: int) -> Values:
    """Weights for all slots."""
    g = torch.Generator().manual_seed(seed)
    return {
        slot.name: torch.randn(slot.shape or (slot.count,), generator=g).to(
            getattr(torch, slot.dtype)
        )
        for engine in module.engines.values()
        for slot in engine.slots.values()
    }


class Opener:
    """Opens the fake module."""

    name = "opener"

    @refitkit.hookimpl
    def refitkit_load_module(self, target: Any) -> Any:
        return target if isinstance(target, TrtModule) else None


class World:
    """A module with an engine that is written directly, and two sets of weights."""

    def __init__(self) -> None:
        known._of_process.clear()
        self.module = TrtModule(RUNTIMES, Tripwire())
        self.pipeline = Pipeline(plugins=[Opener()])
        self.compiled = self.pipeline.load(self.module)
        self.weights = [weights_of(self.module, seed) for seed in (1, 2)]
        self.held = []
        for number in (0, 1, 0, 1):
            routes = self.refit(number).report.routes
            self.held.append(self.module.holds())
        assert ("e0", "direct") in [(route.engine, route.name) for route in routes]
        assert not same_state(self.held[0], self.held[1])
        assert same_state(self.held[1], self.held[3])

    def refit(self, number: int) -> Any:
        return self.pipeline.refit(self.compiled, self.weights[number])

    def fault(self, at: int | None, *, after: bool) -> DeviceFaults:
        """Have one call of a refit fail, and check what is live."""
        before, faults = self.compiled.version, DeviceFaults(at, after=after)
        with faults:
            try:
                self.refit(0)
            except refitkit.ModuleLostError:
                raise
            except (refitkit.RefitError, RuntimeError):
                assert self.compiled.version == before, faults.failed
        number = 0 if self.compiled.version > before else 1
        assert same_state(self.module.holds(), self.held[number]), (at, after, faults.failed)
        for again in (0, 1):
            self.refit(again)
            assert same_state(self.module.holds(), self.held[again]), (at, after, faults.failed)
        return faults


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_refit_with_a_fault_is_done_or_was_never_there(*, after: bool) -> None:
    world = World()
    calls = world.fault(None, after=after).calls
    assert calls > 100
    for at in range(calls):
        assert world.fault(at, after=after).failed
