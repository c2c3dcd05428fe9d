"""The way back of engines that are built ahead of time: judged by engine bytes."""

from __future__ import annotations

import torch

import refitkit
from tests.tensorrt.helpers import CASES, bytes_of, compiled_from, needs_torch_tensorrt

pytestmark = needs_torch_tensorrt
CASE = CASES["odd"]
KEEPING = refitkit.Pipeline({"keep_base": True})


def test_engine_bytes_are_those_from_before() -> None:
    compiled = compiled_from(CASE)
    first = bytes_of(compiled)
    KEEPING.refit(compiled, CASE.model(1).state_dict())
    second = bytes_of(compiled)
    third = KEEPING.refit(compiled, CASE.model(2).state_dict())
    assert len({str(first), str(second), str(bytes_of(compiled))}) == 3
    third.undo(verify="weights")
    assert bytes_of(compiled) == second
    KEEPING.restore(compiled, verify="weights")
    assert bytes_of(compiled) == first


def test_two_backends_in_one_transaction() -> None:
    network = compiled_from(CASE)
    model = torch.nn.Linear(4, 3).eval()
    linear = refitkit.compile(torch.export.export(model, (torch.randn(2, 4),)), prove=False)
    first, bits = bytes_of(network), linear.read("weight")
    later = torch.nn.Linear(4, 3).state_dict()
    results = refitkit.refit_all([(network, CASE.model(1).state_dict()), (linear, later)])
    assert bytes_of(network) != first
    results.undo()
    assert bytes_of(network) == first
    assert torch.equal(linear.read("weight"), bits)
