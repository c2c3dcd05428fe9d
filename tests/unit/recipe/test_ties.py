"""One tensor under several names, in recipes: any of its names serves, and none wins silently."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from refitkit.errors import UnmappedSlotError, WeightMismatchError
from refitkit.model import CallRef, SourceRef
from refitkit.protocols import SlotValue
from refitkit.recipe import TensorMap
from tests.fakes import leaf_for, make_plan, make_slot, recipe_row
from tests.unit.recipe.recorder import REFUSED, Recording, Tensors, agree, like, record, truth

NAN = float("nan")
TIE = ("twin", "w", "third")
"""In the program's order; ``w`` is the name under which it is met first."""


def leaves() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(4, 6, generator=generator)
    b = torch.randn(6, generator=generator)
    return {"w": one, "twin": one, "third": one.detach(), "b": b, "lone": b * 1, "other": b * 1}


def function(**leaf: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Computed of one name, of another, of both; and as it is, under two names."""
    w, twin, b = leaf["w"], leaf["twin"], leaf["b"]
    return w * b, twin + 1, w.t() @ twin, w, leaf["third"].t(), b * 2


def recorded() -> Recording:
    return record(function, leaves(), ties=[TIE, ("lone", "other")])


def given(*names: str, seed: int = 1) -> Tensors:
    """Other weights, tied, under these names only, each in memory of its own."""
    new = like(leaves(), seed)
    return {name: (new["w"] if name in TIE else new[name]).clone() for name in names}


def wanted(seed: int = 1) -> Tensors:
    new = like(leaves(), seed)
    return truth(function, {**new, "twin": new["w"], "third": new["w"]})


def test_a_row_names_all_names_of_what_it_follows_from() -> None:
    rows = recorded().rows
    assert {name: sorted(row.sources) for name, row in rows.items()} == {
        **{name: sorted(TIE) for name in ("y1", "y2", "y3", "y4")},
        "y0": sorted({*TIE, "b"}),
        "y5": ["b"],
    }
    assert {name: type(row.value) for name, row in rows.items()} == {
        **dict.fromkeys(("y0", "y1", "y2", "y4", "y5"), CallRef),
        "y3": SourceRef,
    }


def test_calls_of_different_names_of_one_tensor_are_one_call() -> None:
    both = record(
        lambda **leaf: (leaf["w"] * 2, leaf["twin"] * 2, leaf["third"] * 2), leaves(), ties=[TIE]
    )
    assert both.ops == ["mul.Tensor"]


@pytest.mark.parametrize("names", [TIE, *((n,) for n in TIE), ("third", "twin")], ids=" ".join)
def test_any_of_the_names_serves(names: tuple[str, ...]) -> None:
    assert agree(recorded().values(given(*names, "b")), wanted())


def test_without_any_of_the_names_nothing_is_served() -> None:
    assert recorded().values(given("b")) is REFUSED


def test_names_may_share_memory_as_they_did() -> None:
    new = given("w", "b")
    new["twin"] = new["w"].detach()
    new["third"] = torch.nn.Parameter(new["w"])
    assert agree(recorded().values(new), wanted())


@pytest.mark.parametrize(("kept", "untied"), [p for p in product(TIE, TIE) if p[0] != p[1]])
def test_a_tie_that_the_source_breaks_is_told(kept: str, untied: str) -> None:
    """Also of the name that no recipe reads: none of them wins silently."""
    weights = given(kept, untied, "b")
    weights[untied][-1, -1] += 1
    slots = recorded().plan.iter_slots(weights)
    with pytest.raises(WeightMismatchError) as info:
        next(slots)
    (problem,) = info.value.problems
    assert problem.kind == "tie broken"
    assert {problem.subject, problem.found.rpartition(" ")[2].strip("'")} == {kept, untied}


def test_all_broken_ties_are_told_at_once() -> None:
    function = record(
        lambda **leaf: (leaf["w"] * 2, leaf["lone"] * 2), leaves(), ties=[TIE, ("lone", "other")]
    )
    weights = like(leaves())
    with pytest.raises(WeightMismatchError) as info:
        function.plan.materialize(weights)
    assert [p.subject for p in info.value.problems] == ["w", "third", "other"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(0.0, -0.0, False), (NAN, NAN, True), (1.0, 1.0000001, False)],
    ids=["zeros", "nan", "next float"],
)
def test_bits_decide_whether_a_tie_is_broken(one: float, other: float, same: bool) -> None:
    weights = given("w", "twin", "b")
    weights["w"][0, 0], weights["twin"][0, 0] = one, other
    if same:
        assert recorded().plan.materialize(weights)
    else:
        with pytest.raises(WeightMismatchError, match="tie broken"):
            recorded().plan.materialize(weights)


def test_the_same_memory_read_in_another_order_is_another_value() -> None:
    square = torch.arange(9.0).view(3, 3)
    plan = record(lambda w, twin: w * 2, {"w": square, "twin": square}, ties=[("w", "twin")]).plan
    assert plan.materialize({"w": square, "twin": square.detach()})
    with pytest.raises(WeightMismatchError, match="tie broken"):
        plan.materialize({"w": square, "twin": square.t()})


def test_a_name_of_another_shape_or_kind_is_told_though_nobody_reads_it() -> None:
    weights = {**given("w", "b"), "twin": torch.zeros(6, 4), "third": torch.zeros(4, 6).to_sparse()}
    with pytest.raises(WeightMismatchError) as info:
        recorded().plan.materialize(weights)
    assert {(p.subject, p.kind) for p in info.value.problems} == {
        ("twin", "value"),
        ("third", "unusable"),
    }


def test_a_tie_that_no_slot_follows_from_may_break() -> None:
    weights = {**given(*TIE, "b"), "lone": torch.zeros(6), "other": torch.ones(6)}
    assert agree(recorded().values(weights), wanted())


def test_a_tie_that_only_a_guard_follows_from_may_not() -> None:
    plan = record(
        lambda **leaf: leaf["b"] * (2 if leaf["lone"][0] > 0 else 3),
        {**leaves(), "lone": torch.ones(6), "other": torch.ones(6)},
        ties=[("lone", "other")],
    ).plan
    weights = {**given("b"), "lone": torch.ones(6), "other": torch.ones(6)}
    assert plan.materialize(weights)
    weights["other"] = -torch.ones(6)
    with pytest.raises(WeightMismatchError, match="tie broken"):
        plan.materialize(weights)


def test_a_value_says_which_names_it_is_made_of() -> None:
    plan = recorded().plan
    row = next(row for row in plan.ledger if row.slot.name == "y0")
    value = plan.value_of(row, TensorMap(given("third", "b")))
    assert isinstance(value, SlotValue)
    assert value.sources == ("third", "b")
    assert agree({"y": value.load()}, {"y": wanted()["y0"]})
    assert plan.value_of(row, TensorMap(given("b"))) == "the source has no 'twin'"
    assert plan.lacking(row, TensorMap(given("w"))) == ("b",)


def test_plans_without_recipes_tell_of_broken_ties_too() -> None:
    slot = make_slot("w")
    plan = make_plan(
        [recipe_row(slot, "w", "a")],
        leaves=[leaf_for(slot, fqn=name) for name in ("a", "w")],
        ties=[("a", "w")],
    )
    with pytest.raises(WeightMismatchError, match="tie broken"):
        plan.materialize({"a": torch.zeros(2), "w": torch.ones(2)})
    with pytest.raises(UnmappedSlotError):
        plan.materialize({})
