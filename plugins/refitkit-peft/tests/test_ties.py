"""Adapters on weights that the program reads under another tied name."""

from __future__ import annotations

import torch
from refitkit.model import LedgerRow, SlotState
from refitkit.testing.scenes import leaf_for, make_plan, make_slot

from refitkit_peft import Base, Lora
from refitkit_peft.checks import problems


def test_a_weight_is_read_if_its_twin_is():
    """Otherwise an adapter on it would silently change nothing."""
    weight = torch.ones(4, 4)
    base = Base({"mid.weight": weight, "twin.weight": weight})
    factors = {
        "base_model.model.mid.lora_A.weight": torch.ones(2, 4),
        "base_model.model.mid.lora_B.weight": torch.ones(4, 2),
    }
    base.add("a", factors, {"r": 2, "lora_alpha": 2, "peft_type": "LORA"})
    slot = make_slot("mid.weight", (4, 4))
    row = LedgerRow(slot=slot, state=SlotState.FROZEN, reason="a literal of the graph")
    unread = leaf_for(slot).model_copy(update={"used": False})
    leaves = [unread, leaf_for(slot, fqn="twin.weight")]
    plan = make_plan([row], leaves=leaves, ties=[("mid.weight", "twin.weight")])
    (problem,) = problems(plan.data, base.source(Lora(base, {"a": 1.0})))
    assert (problem.subject, problem.kind) == ("mid.weight", "not refittable")
