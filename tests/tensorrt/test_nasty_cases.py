"""What is hard for a recording, through real converters: FACTS' list, and what must not change.

Parts are interpreted in this process, so that a change of the user's program or module would show;
values are compared with those of an interpreter's run on the new weights, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import LAYER_TYPES
from refitkit.builtin.torch_tensorrt.recording import constants_of, interpret_parts, own_copy
from refitkit.builtin.torch_tensorrt.settings import settings_from_options
from refitkit.errors import CompileError, UnmappedSlotError, WeightMismatchError
from refitkit.model import CallRef, Fingerprint, PlanData, fingerprint_of_slots
from refitkit.program import facts_of
from refitkit.program.bits import same_bits
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import index_of
from scripts.zoo.models import zoo
from tests.unit.recipe.unchanged import nothing_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

pytestmark = pytest.mark.usefixtures("torch_tensorrt")

TYPES = {one.name: one for one in LAYER_TYPES}
Values = dict[tuple[str, str], torch.Tensor]


def planned(program: ExportedProgram, options: Mapping[str, Any]) -> RefitPlan:
    """A plan of what is recorded here, stored and read again."""
    program_facts = facts_of(program)
    found = interpret_parts(
        own_copy(program), settings_from_options(options), TYPES, lambda _: None, record=True
    )
    assert found.recorded is not None
    rows, literals = found.recorded.rows, found.recorded.literals
    kept = {**constants_of(program), **literals}
    data = PlanData(
        backend="tensorrt_network",
        leaves=program_facts.leaves,
        ties=program_facts.ties,
        ledger=rows,
        calls=found.recorded.calls,
        guards=found.recorded.guards,
        pinned=index_of(kept),
        fingerprint=Fingerprint(
            graph=program_facts.graph, slots=fingerprint_of_slots(row.slot for row in rows)
        ),
    )
    return RefitPlan.from_bytes(RefitPlan(data, kept).to_bytes())


def rebuilt(program: ExportedProgram, options: Mapping[str, Any]) -> Values:
    """What an interpreter gives."""
    found = interpret_parts(
        own_copy(program), settings_from_options(options), TYPES, lambda _: None, record=False
    )
    return {
        (part, slot): value
        for part, holder in found.holders.items()
        for slot, value in holder.scanned.items()
    }


def replayed(plan: RefitPlan, weights: Mapping[str, torch.Tensor]) -> Values:
    found = plan.materialize(dict(weights))
    return {(part, slot): one for part, slots in found.items() for slot, one in slots.items()}


def agree(found: Values, wanted: Values) -> bool:
    return found.keys() == wanted.keys() and all(
        same_bits(found[key].reshape(-1), value.reshape(-1)) for key, value in wanted.items()
    )


CASES = [
    *("channels last", "complex rope, persistent", "complex rope", "expanded parameters"),
    *("flat parameter", "modules on one storage", "a parameter inside another", "chunked qkv"),
    *("scalars and nothing", "embeddings", "two parametrizations", "autocast", "lstm"),
    *("weights written in place", "tied weights in two engines", "one weight in three engines"),
    "casts",
]


@pytest.mark.parametrize("name", CASES)
def test_recipes_give_what_an_interpreter_gives_and_nothing_changes(name: str) -> None:
    entry = zoo()[f"nn/{name}"]
    model = entry.model("float32", 1)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    program = entry.program(model, "float32")
    with nothing_changes({}, program, model):
        plan = planned(program, entry.settings)
    assert {str(row.state) for row in plan.ledger} <= {"recipe", "pinned", "frozen"}
    assert any(row.state == "recipe" for row in plan.ledger)
    assert not plan.data.guards

    new = entry.model("float32", 2)
    wanted = rebuilt(entry.program(new, "float32"), entry.settings)
    with nothing_changes(new.state_dict(keep_vars=True), None, new):
        assert agree(replayed(plan, new.state_dict()), wanted)
        trained = {
            fqn: value.clone().requires_grad_(value.is_floating_point() or value.is_complex())
            for fqn, value in new.state_dict().items()
            if fqn not in tied(plan)
        }
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = replayed(plan, trained)
    assert agree(found, wanted)
    assert not any(one.requires_grad for one in found.values())


def tied(plan: RefitPlan) -> set[str]:
    """All names of tied tensors but one."""
    return {name for tie in plan.data.ties for name in tie[1:]}


@pytest.mark.parametrize("name", ["tied weights", "tied weights in two engines"])
def test_a_tie_that_new_weights_break_is_told(name: str) -> None:
    entry = zoo()[f"nn/{name}"]
    plan = planned(entry.program(entry.model("float32", 1), "float32"), entry.settings)
    assert len(plan.data.ties) == 2
    weights = {n: v.clone() for n, v in entry.model("float32", 2).state_dict().items()}
    assert replayed(plan, weights)
    for tie in plan.data.ties:
        for untied in tie:
            broken = {**weights, untied: weights[untied] + 1}
            with pytest.raises(WeightMismatchError, match="tie broken"):
                replayed(plan, broken)


def test_weights_that_are_offloaded_are_known_again_and_stay_where_they_are() -> None:
    entry = zoo()["nn/folded weights"]
    options = {**entry.settings, "offload_module_to_cpu": True}
    model = entry.model("float32", 1)
    program = entry.program(model, "float32")
    with nothing_changes({}, program, model):
        plan = planned(program, options)
    new = entry.model("float32", 2)
    wanted = rebuilt(entry.program(new, "float32"), options)
    assert agree(replayed(plan, new.state_dict()), wanted)


class Counting(torch.nn.Module):
    """A buffer that is updated in place, whole or through a view."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, 4))
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (self.count[0] if self.view else self.count).add_(1)
        return x * self.count


@pytest.mark.parametrize("view", [False, True])
def test_a_buffer_that_is_updated_in_place_is_refused_and_is_as_before(view: bool) -> None:
    model = Counting(view=view).eval()
    program = torch.export.export(model, (torch.randn(2, 4),))
    with (
        nothing_changes({}, program, model),
        pytest.raises(CompileError, match="count: changed in place"),
    ):
        planned(program, {"min_block_size": 1})


# -- converters that do something with a weight -----------------------------------------------


class Converted(torch.nn.Module):
    def __init__(self, op: Callable[..., torch.Tensor], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(4, 4)
        self.weight = torch.nn.Parameter(torch.randn(4))
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.linear(x), self.weight)


def program_of(op: Callable[..., torch.Tensor], seed: int) -> tuple[torch.nn.Module, Any]:
    from tests.tensorrt.children import looking_converters  # noqa: F401 - it registers them

    model = Converted(op, seed).eval()
    return model, torch.export.export(model, (torch.randn(2, 4),))


OPTIONS = {"min_block_size": 1}


def test_a_copy_that_is_updated_in_place_through_views_is_followed() -> None:
    model, program = program_of(torch.nextafter, 0)
    with nothing_changes({}, program, model):
        plan = planned(program, OPTIONS)
    assert {str(row.state) for row in plan.ledger} == {"recipe"}
    assert not plan.data.guards
    other, new = program_of(torch.nextafter, 1)
    assert agree(replayed(plan, other.state_dict()), rebuilt(new, OPTIONS))


def test_a_converter_that_changes_the_weight_itself_is_stopped_before_it_does() -> None:
    model, program = program_of(torch.special.gammaincc, 0)
    with nothing_changes({}, program, model), pytest.raises(CompileError) as info:
        planned(program, OPTIONS)
    assert [(p.subject, p.kind) for p in info.value.problems] == [("weight", "changed in place")]


def test_an_array_that_was_filled_with_a_weight_is_guarded() -> None:
    model, program = program_of(torch.special.gammainc, 0)
    plan = planned(program, OPTIONS)
    (guard,) = plan.data.guards
    assert guard.reason == "passed to NumPy"
    assert agree(replayed(plan, model.state_dict()), rebuilt(program, OPTIONS))
    other, _ = program_of(torch.special.gammainc, 1)
    with pytest.raises(UnmappedSlotError, match="weight: guard"):
        replayed(plan, other.state_dict())


def test_weights_of_four_bits_have_the_dtype_and_count_of_their_bytes() -> None:
    """Two elements a byte: n bytes for torch are 2n for TensorRT, which is asked."""
    _, program = program_of(torch.special.hermite_polynomial_h, 0)
    plan = planned(program, OPTIONS)
    (row,) = [row for row in plan.ledger if "fp4" in row.slot.name]
    assert (row.slot.dtype, row.slot.count, row.slot.shape) == ("uint8", 2, (2,))
    assert isinstance(row.value, CallRef)
    assert row.sources == ("weight",)
    for seed in (1, 2):
        other, new = program_of(torch.special.hermite_polynomial_h, seed)
        assert agree(replayed(plan, other.state_dict()), rebuilt(new, OPTIONS))
