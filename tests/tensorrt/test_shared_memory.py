"""Tensors that share memory with weights follow a refit of a network, too."""

from __future__ import annotations

import copy

import pytest
import torch

import refitkit
from refitkit.model import SlotState
from tests.shared_memory import exported, model_of
from tests.tensorrt.helpers import BACKEND, needs_torch_tensorrt

pytestmark = needs_torch_tensorrt
SETTINGS = {"min_block_size": 1}
NAMES = ["turned", "packed", "views only"]


def loaded(name: str, seed: int) -> torch.export.ExportedProgram:
    """The program of the model of seed 0 after ``load_state_dict``."""
    model = model_of(name)
    model.load_state_dict(copy.deepcopy(model_of(name, seed).state_dict()))
    return exported(model)


@pytest.mark.parametrize("name", NAMES)
def test_slots_hold_what_a_plan_of_the_loaded_model_would_hold(name: str) -> None:
    state = model_of(name, seed=1).state_dict()
    plan = refitkit.plan(exported(model_of(name)), backend=BACKEND, options=SETTINGS)
    other = refitkit.plan(loaded(name, 1), backend=BACKEND, options=SETTINGS)
    assert not any(row.state is SlotState.UNMAPPED for row in plan.ledger)
    found, wanted = plan.materialize(state), other.materialize(loaded(name, 1).state_dict)
    assert found.keys() == wanted.keys()
    moved = 0
    for engine, slots in wanted.items():
        assert found[engine].keys() == slots.keys()
        for slot, value in slots.items():
            assert torch.equal(found[engine][slot].reshape(-1), value.reshape(-1))
            moved += 1
    assert moved


def test_a_refitted_network_builds_to_the_bytes_of_the_loaded_model() -> None:
    compiled = refitkit.compile(exported(model_of("views only")), BACKEND, SETTINGS)
    report = refitkit.refit(
        compiled, model_of("views only", seed=1).state_dict(), verify="engine-bytes"
    ).report
    assert report.verification.ok
    fresh = refitkit.compile(loaded("views only", 1), BACKEND, SETTINGS, prove=False)
    mine, theirs = (
        {name: one.opened.engine_bytes(name) for name in one.engines} for one in (compiled, fresh)
    )
    assert mine == theirs
