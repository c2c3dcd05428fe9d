"""The built-in verifiers, with real modules if the machine can run them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.network.backend import EngineBytesVerifier
from refitkit.builtin.verify.outputs import OutputsVerifier
from refitkit.builtin.verify.weights import WeightsVerifier
from refitkit.config import TOLERANCES
from refitkit.protocols import VerifyRequest
from refitkit.recipe import TensorMap
from refitkit.testing import VerifierSuite
from refitkit.testing.fakes import FakeEngine, FakeModule
from refitkit.testing.scenes import plan_for
from tests.conformance import test_aotinductor as aotinductor
from tests.conformance import test_strategies as networks
from tests.conformance.test_tensorrt_network import held

if TYPE_CHECKING:
    from collections.abc import Mapping

    import refitkit

X = torch.arange(12.0).reshape(4, 3)


def request_of(
    compiled: refitkit.CompiledModule, weights: Mapping[str, torch.Tensor], **more: Any
) -> VerifyRequest:
    """A request like the pipeline's, for a second module with the same weights."""
    plan = compiled.plan
    assert plan is not None
    source = TensorMap(weights)
    values: Any = plan.values_of(plan.ledger, source)
    given = {"inputs": None, "reference": None, "tolerances": TOLERANCES, **more}
    module = compiled.opened.reopen()
    return VerifyRequest(plan, module, source, values, program=compiled.program, **given)


class OnAOTInductor(VerifierSuite):
    """The common part of the suites on a compiled module."""

    inputs: Any = ((X,), {})

    def make_request(self) -> VerifyRequest:
        torch.manual_seed(1)
        net = aotinductor.Net()
        weights = {n: v.detach() + v.is_floating_point() for n, v in net.state_dict().items()}
        weights |= {"order": torch.tensor([0, 1]), "mask": torch.tensor([False, True])}
        return request_of(aotinductor.planned(), weights, inputs=self.inputs)

    def wrong_value(self, key: Any, value: torch.Tensor) -> torch.Tensor:
        return value.flip(0) if key[1] == "order" else super().wrong_value(key, value)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        return aotinductor.held(module.engines["model"])


class TestOutputs(OnAOTInductor):
    """Verification against the module's program."""

    def make_verifier(self) -> Any:
        return OutputsVerifier()

    def make_hopeless(self) -> VerifyRequest:
        return replace(self.make_request(), inputs=None)


class TestOutputsWithoutAnything(TestOutputs):
    """Verification against a reference; impossible without one."""

    def make_request(self) -> VerifyRequest:
        request = super().make_request()
        net = aotinductor.Net()
        net.load_state_dict({n: request.source.get(n).clone() for n in request.source.names()})
        with torch.no_grad():
            return replace(request, reference=net(X), program=None)

    def make_hopeless(self) -> VerifyRequest:
        return replace(self.make_request(), reference=None)


class TestWeights(OnAOTInductor):
    inputs = None

    def make_verifier(self) -> Any:
        return WeightsVerifier()

    def make_hopeless(self) -> VerifyRequest:
        module = FakeModule([FakeEngine("mute", {"w": torch.zeros(2)})])
        plan, source = plan_for(module), TensorMap({"w": torch.ones(2)})
        values: Any = plan.values_of(plan.ledger, source)
        return replace(self.make_request(), plan=plan, module=module, source=source, values=values)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        if isinstance(module, FakeModule):
            return module.holds()
        return super().held(module)


@pytest.mark.skipif(not upstream.is_installed(), reason="torch_tensorrt is not installed")
class TestEngineBytes(VerifierSuite):
    """Verification of networks that TensorRT-RTX builds."""

    def make_verifier(self) -> Any:
        return EngineBytesVerifier()

    def make_request(self) -> VerifyRequest:
        return request_of(networks.compiled(), networks.weights(1))

    def make_hopeless(self) -> VerifyRequest:
        return replace(self.make_request(), program=None)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        """The weights in the files that engines were built from."""
        return {
            f"{name}/{slot}": value
            for name, engine in module.engines.items()
            for slot, value in held(engine).items()
        }
