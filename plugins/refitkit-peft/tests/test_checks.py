"""Adapters on tied weights, and on weights that fill no slot."""

from __future__ import annotations

import pytest
import refitkit
import torch
from peft_models import make_adapter, same, slots_of
from refitkit.errors import WeightMismatchError
from refitkit.model import LedgerRow, SlotState
from refitkit.testing.scenes import leaf_for, make_plan, make_slot, recipe_row

from refitkit_peft import Base, Lora
from refitkit_peft.checks import problems

pytest.importorskip("peft")

IDS = torch.tensor([[1, 7, 3], [0, 9, 2]])


class Tied(torch.nn.Module):
    """An embedding tied to the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(10, 16)
        self.mid = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mid(self.emb(ids))))


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture(scope="module")
def compiled(tied):
    return refitkit.compile(torch.export.export(tied, (IDS,)), prove=False)


@pytest.fixture
def on(tied, tmp_path):
    """An adapter for modules with these names."""

    def make(*modules):
        torch.manual_seed(1)
        free = torch.nn.ModuleDict(
            {
                "emb": torch.nn.Embedding(10, 16),
                "mid": torch.nn.Linear(16, 16),
                "head": torch.nn.Linear(16, 10, bias=False),
            }
        )
        made = make_adapter(free, tmp_path / "-".join(modules), target_modules=list(modules))
        return str(made.path)

    return make


def refused(compiled, weights, **how):
    slots = slots_of(compiled)
    with pytest.raises(WeightMismatchError) as caught:
        refitkit.refit(compiled, weights, **how)
    assert same(slots_of(compiled), slots)
    return [(problem.subject, problem.kind) for problem in caught.value.problems]


@pytest.mark.parametrize("module", ["emb", "head"])
def test_an_adapter_for_one_of_two_tied_names_breaks_the_tie(module, compiled, tied, on):
    for base in (tied, Base(tied, "host"), Base(tied, "mapped")):
        for delta in (False, True):
            found = refused(compiled, Lora(base, {on(module): 1.0}), delta=delta)
            assert [kind for _, kind in found] == ["tie broken"]
            assert found[0][0] in {"emb.weight", "head.weight"}


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_it_does_so_where_the_base_has_one_of_the_names_only(prefix, compiled, tied, on):
    base = {f"{prefix}{n}": v for n, v in tied.state_dict().items() if n != "head.weight"}
    refitkit.refit(compiled, base)  # the tied name fills it
    assert refused(compiled, Lora(base, {on("emb"): 1.0})) == [("emb.weight", "tie broken")]
    report = refitkit.refit(compiled, Lora(base, {on("mid"): 1.0})).report
    assert report.slots_written


def test_other_weights_of_a_tied_model_are_free(compiled, tied, on):
    base = Base(tied, "host")
    refitkit.refit(compiled, Lora(base, {on("mid"): 1.0}), inputs=(IDS,), delta=True)
    refitkit.refit(compiled, base, inputs=(IDS,), delta=True)


# -- plans that no backend makes easily -----------------------------------------------------


def lora(on):
    base = {"mid.weight": torch.ones(16, 16), "mid.bias": torch.ones(16)}
    return refitkit.Pipeline().open_weights(Lora(base, {on("mid"): 1.0}))


def plan_of(rows, leaves, **more):
    return make_plan(rows, leaves=leaves, **more).data


def test_a_weight_that_the_program_reads_and_no_slot_follows_from(on):
    weight, bias = make_slot("mid.weight", (16, 16)), make_slot("mid.bias", (16,))
    frozen = LedgerRow(slot=weight, state=SlotState.FROZEN, reason="a literal of the graph")
    leaves = [leaf_for(weight), leaf_for(bias)]
    (problem,) = problems(plan_of([frozen, recipe_row(bias)], leaves), lora(on))
    assert (problem.subject, problem.kind) == ("mid.weight", "not refittable")
    assert not list(problems(plan_of([recipe_row(weight), recipe_row(bias)], leaves), lora(on)))


def test_a_weight_that_the_program_does_not_read_may_have_an_adapter(on):
    weight, bias = make_slot("mid.weight", (16, 16)), make_slot("mid.bias", (16,))
    unread = leaf_for(weight).model_copy(update={"used": False})
    plan = plan_of([recipe_row(bias)], [unread, leaf_for(bias)])
    assert not list(problems(plan, lora(on)))


def test_where_nobody_knows_what_a_slot_follows_from_nothing_is_said(on):
    weight, bias = make_slot("mid.weight", (16, 16)), make_slot("mid.bias", (16,))
    row = LedgerRow(slot=weight, state=SlotState.UNMAPPED, reason="read by address")
    plan = plan_of([row, recipe_row(bias)], [leaf_for(weight), leaf_for(bias)])
    assert not list(problems(plan, lora(on)))


def test_a_slot_may_follow_from_the_weight_under_its_other_name(on):
    weight, bias = make_slot("other", (16, 16)), make_slot("mid.bias", (16,))
    leaves = [leaf_for(weight), leaf_for(weight, fqn="mid.weight"), leaf_for(bias)]
    plan = plan_of([recipe_row(weight), recipe_row(bias)], leaves, ties=[("other", "mid.weight")])
    found = list(problems(plan, lora(on)))
    assert [problem.kind for problem in found] == ["tie broken"]


def test_sources_without_adapters_are_left_alone(tied):
    source = refitkit.Pipeline().open_weights(tied)
    weight = make_slot("emb.weight", (10, 16))
    frozen = LedgerRow(slot=weight, state=SlotState.FROZEN, reason="a literal of the graph")
    assert not list(problems(plan_of([frozen], [leaf_for(weight)]), source))
