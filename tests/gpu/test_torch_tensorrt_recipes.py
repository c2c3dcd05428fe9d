"""Recipes recorded on a GPU: every slot as the rebuild makes it, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refitkit.builtin.torch_tensorrt import LAYER_TYPES
from refitkit.program.bits import same_bits
from refitkit.protocols import Tools
from tests.gpu.trt_helpers import PIPELINE, close, compiled_by_us, export, needs_trt
from tests.gpu.trt_models import (
    Convolutions,
    Fallback,
    Several,
    Twins,
    Words,
    inputs_of,
    randomized,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    import refitkit

pytestmark = needs_trt
TOOLS = Tools(layer_types={one.name: one for one in LAYER_TYPES})
KINDS = [Convolutions, Words, Several, Twins, Fallback]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[[], torch.nn.Module]:
    found: Callable[[], torch.nn.Module] = request.param
    return found


@pytest.fixture(scope="module")
def compiled(kind: Callable[[], torch.nn.Module]) -> refitkit.CompiledModule:
    return compiled_by_us(kind)


def differing(
    compiled: refitkit.CompiledModule, new: torch.nn.Module, weights: dict[str, torch.Tensor]
) -> list[str]:
    program = export(new, inputs_of(type(new)))
    wanted = compiled.opened.rebuilt(program, TOOLS)
    assert compiled.plan
    found = compiled.plan.materialize(weights)
    slots = compiled.slots
    assert slots
    return [
        f"{slot.engine}/{slot.name}"
        for slot in slots
        if not same_bits(
            found[slot.engine][slot.name].cpu().contiguous().reshape(-1),
            wanted[slot.engine][slot.name].cpu().contiguous().reshape(-1),
        )
    ]


def test_every_slot_has_a_recipe(compiled: refitkit.CompiledModule) -> None:
    assert compiled.plan
    rows = compiled.plan.ledger
    assert rows
    assert [(row.slot.name, row.reason) for row in rows if row.state == "unmapped"] == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_values_are_those_of_the_rebuild(
    compiled: refitkit.CompiledModule, kind: Callable[[], torch.nn.Module], device: str
) -> None:
    new = randomized(kind, 7)
    weights = {name: value.to(device) for name, value in new.state_dict().items()}
    assert differing(compiled, new, weights) == []


def test_a_refit_needs_no_interpreter(
    compiled: refitkit.CompiledModule, kind: Callable[[], torch.nn.Module]
) -> None:
    new = randomized(kind, 3)
    inputs = inputs_of(kind)
    report = PIPELINE.refit(compiled, new.state_dict(), inputs=inputs).report
    assert {row.strategy for row in report.ledger} == {"recipe"}
    assert close(compiled(*inputs), new(*inputs))
