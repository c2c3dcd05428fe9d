"""A plan in memory: which value a slot gets, what it fits, and its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import (
    PlanMismatchError,
    SourceError,
    UnmappedSlotError,
    WeightMismatchError,
)
from refitkit.model import Leaf, LeafKind, LedgerRow, SlotState
from refitkit.protocols import Plan, SlotValue
from refitkit.recipe import RefitPlan, TensorMap
from tests.fakes import (
    CountingMapping,
    leaf_for,
    make_plan,
    make_slot,
    pinned_row,
    recipe_row,
)

if TYPE_CHECKING:
    from pathlib import Path

W, B, M = make_slot("w"), make_slot("b", (3,), "bfloat16", "second"), make_slot("m", (2,), "int64")
PINNED = torch.tensor([7, 8])
PLAN = make_plan([recipe_row(W), recipe_row(B), pinned_row(M, "m")], pinned={"m": PINNED})
WEIGHTS = {"w": torch.tensor([1.0, -0.0]), "b": torch.ones(3, dtype=torch.bfloat16)}


# -- values -----------------------------------------------------------------------------------


def test_materialize_gives_every_slot_by_engine() -> None:
    found = PLAN.materialize(WEIGHTS)
    assert {engine: sorted(slots) for engine, slots in found.items()} == {
        "model": ["m", "w"],
        "second": ["b"],
    }
    assert found["model"]["w"].data_ptr() == WEIGHTS["w"].data_ptr()  # no copies
    assert found["model"]["m"].tolist() == [7, 8]


def test_iter_slots_reads_one_after_another() -> None:
    weights = CountingMapping(WEIGHTS)
    slots = PLAN.iter_slots(TensorMap(weights))
    before = next(slots)
    assert before[0] == W
    described = weights.reads["b"]
    assert next(slots)[0] == B
    assert weights.reads["b"] == described + 1
    assert next(slots)[0] == M
    assert next(slots, None) is None


def test_a_source_overrides_a_pinned_value() -> None:
    own = torch.tensor([1, 2])
    assert PLAN.materialize({**WEIGHTS, "m": own})["model"]["m"] is not PINNED
    assert PLAN.materialize({**WEIGHTS, "m": own})["model"]["m"].tolist() == [1, 2]


def test_a_pinned_value_is_given_as_it_is() -> None:
    value = PLAN.value_of(PLAN.ledger[2], TensorMap({}))
    assert isinstance(value, SlotValue)
    assert (value.sources, value.strategy, value.identity) == ((), "recipe", True)
    assert value.load() is PLAN.pinned("m")


def test_a_pinned_value_without_names_cannot_be_overridden() -> None:
    plan = make_plan([pinned_row(M)], pinned={"m": PINNED})
    assert plan.materialize({"m": torch.tensor([1, 2])})["model"]["m"].tolist() == [7, 8]


def test_frozen_slots_have_no_value() -> None:
    frozen = LedgerRow(slot=make_slot("eps"), state=SlotState.FROZEN, reason="a literal")
    plan = make_plan([recipe_row(W), frozen])
    assert list(plan.materialize(WEIGHTS)["model"]) == ["w"]


@pytest.mark.parametrize("sources", [(), ("w",)])
def test_an_unmapped_slot_is_never_guessed(sources: tuple[str, ...]) -> None:
    """Even where it is known which weights it has to do with."""
    row = LedgerRow(
        slot=make_slot("u"), state=SlotState.UNMAPPED, sources=sources, reason="nobody knows"
    )
    plan = make_plan([recipe_row(W), row], leaves=[leaf_for(W)])
    assert plan.value_of(row, TensorMap(WEIGHTS)) == "nobody knows"
    with pytest.raises(UnmappedSlotError) as info:
        plan.materialize(WEIGHTS)
    assert [(p.subject, p.hint) for p in info.value.problems] == [("u", "nobody knows")]


def test_a_frozen_slot_is_never_filled() -> None:
    row = LedgerRow(slot=W, state=SlotState.FROZEN, sources=("w",), reason="a literal")
    assert isinstance(make_plan([row]).value_of(row, TensorMap(WEIGHTS)), str)


def test_everything_missing_is_listed_before_anything_is_given() -> None:
    slots = PLAN.iter_slots({})
    with pytest.raises(UnmappedSlotError) as info:
        next(slots)
    assert [p.subject for p in info.value.problems] == ["w", "b"]


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ({"w": torch.ones(3)}, {"shape"}),
        ({"w": torch.ones(1, 2)}, {"shape"}),
        ({"w": torch.ones(2).double()}, {"dtype"}),
        ({"w": torch.ones(2).to_sparse()}, {"unusable"}),
        ({"w": torch.ones(2, device="meta")}, {"unusable"}),
        ({"w": 3}, {"unusable"}),
        ({"w": torch.ones(3), "b": torch.ones(2)}, {"shape", "dtype"}),
    ],
    ids=["shape", "rank", "dtype", "sparse", "meta", "int", "all"],
)
def test_what_does_not_fit_its_slot_is_refused(weights: Any, kinds: set[str]) -> None:
    with pytest.raises((WeightMismatchError, SourceError)) as info:
        PLAN.materialize({**WEIGHTS, **weights})
    assert {p.subject for p in info.value.problems} == set(weights)


def test_tied_names_stand_in_for_one_another() -> None:
    plan = make_plan([recipe_row(W, "w", "twin", "third")], ties=[("w", "twin", "third")])
    own, twin = torch.ones(2), torch.zeros(2)
    assert plan.materialize({"w": own, "twin": own.clone()})["model"]["w"].equal(own)
    with pytest.raises(WeightMismatchError, match="tie broken"):
        plan.materialize({"w": own, "twin": twin})
    assert plan.materialize({"twin": twin})["model"]["w"].equal(twin)
    assert plan.materialize({"third": twin})["model"]["w"].equal(twin)
    with pytest.raises(UnmappedSlotError):
        plan.materialize({"other": twin})


def test_the_name_of_the_row_comes_before_those_it_is_tied_to() -> None:
    """Ties list names in the program's order; the row's own name is what was compiled."""
    plan = make_plan([recipe_row(W, "w", "a")], ties=[("a", "w")])
    value = plan.value_of(plan.ledger[0], TensorMap({"a": torch.zeros(2), "w": torch.ones(2)}))
    assert isinstance(value, SlotValue)
    assert value.sources == ("w",)
    assert value.identity


def test_a_plan_of_its_own_opens_mappings_and_sources_only() -> None:
    assert PLAN.materialize(TensorMap(WEIGHTS))
    for thing in ("file.pt", torch.nn.Linear(1, 1), None):
        with pytest.raises(SourceError, match=type(thing).__name__) as info:
            PLAN.materialize(thing)
        assert "open_weights" in info.value.hint


def test_an_opener_is_asked() -> None:
    asked: list[tuple[object, RefitPlan]] = []

    def opener(weights: object, plan: RefitPlan) -> TensorMap:
        asked.append((weights, plan))
        return TensorMap(WEIGHTS)

    plan = RefitPlan(PLAN.data, {"m": PINNED}, opener)
    assert plan.materialize("a name")["second"]["b"].shape == (3,)
    assert asked == [("a name", plan)]


def test_pinned_tensors_are_found_by_name() -> None:
    assert PLAN.pinned("m").equal(PINNED)
    with pytest.raises(KeyError):
        PLAN.pinned("w")


def test_a_plan_is_what_strategies_and_checks_see() -> None:
    assert isinstance(PLAN, Plan)
    assert PLAN.backend == "fake"
    assert PLAN.ledger == PLAN.data.ledger


# -- binding ----------------------------------------------------------------------------------


def test_a_plan_fits_engines_of_the_same_slots() -> None:
    PLAN.check_engines("fake", [M, B, W])
    PLAN.check_engines("fake", iter([M, B, W]))
    other = W.model_copy(update={"device": "cuda:0", "readable": True, "shape": None})
    PLAN.check_engines("fake", [M, B, other])


def test_every_difference_is_listed() -> None:
    changed = [
        W.model_copy(update={"dtype": "float16"}),
        B.model_copy(update={"count": 4, "shape": (4,)}),
        make_slot("new"),
    ]
    with pytest.raises(PlanMismatchError) as info:
        PLAN.check_engines("other", changed)
    assert [(p.subject, p.kind, p.found, p.wanted) for p in info.value.problems] == [
        ("backend", "differs", "fake", "other"),
        ("model/m", "in the plan, not in the engine", "", ""),
        ("model/new", "in the engine, not in the plan", "", ""),
        ("model/w", "differs", "float32 x 2", "float16 x 2"),
        ("second/b", "differs", "bfloat16 x 3", "bfloat16 x 4"),
    ]
    assert "refitkit.plan" in info.value.hint


def test_a_slot_of_another_engine_is_another_slot() -> None:
    moved = W.model_copy(update={"engine": "second"})
    with pytest.raises(PlanMismatchError) as info:
        PLAN.check_engines("fake", [M, B, moved])
    assert {p.subject for p in info.value.problems} == {"model/w", "second/w"}


# -- files ------------------------------------------------------------------------------------


def test_a_file_gives_the_plan_back(tmp_path: Path) -> None:
    file = tmp_path / "model.refitplan"
    PLAN.save(str(file))
    again = RefitPlan.load(str(file))
    assert again.data == PLAN.data
    assert again.pinned("m").equal(PINNED)
    assert [f.name for f in tmp_path.iterdir()] == ["model.refitplan"]


def test_the_same_plan_gives_the_same_bytes() -> None:
    assert RefitPlan.from_bytes(PLAN.to_bytes()).to_bytes() == PLAN.to_bytes()


@pytest.mark.parametrize(
    ("platform", "device", "fits"),
    [
        ("Linux x86_64 cpu", "cpu", True),
        ("Linux x86_64 cpu", "cuda:0", False),
        ("Linux x86_64 cuda", "cuda:1", True),
        ("Linux x86_64 cuda", "cpu", False),
        ("", "cuda:0", True),
        ("somewhere", "cuda:0", True),
    ],
)
def test_a_plan_of_another_kind_of_device_does_not_bind(
    platform: str, device: str, fits: bool
) -> None:
    """Names can be the same there while values are not."""
    fingerprint = PLAN.data.fingerprint.model_copy(update={"platform": platform})
    plan = RefitPlan(PLAN.data.model_copy(update={"fingerprint": fingerprint}), {"m": PINNED})
    slots = [slot.model_copy(update={"device": device}) for slot in (M, B, W)]
    if fits:
        plan.check_engines("fake", slots)
        return
    with pytest.raises(PlanMismatchError, match=r"device: differs, found c\w+, wanted c\w+"):
        plan.check_engines("fake", slots)


def test_an_opener_can_be_given_to_a_plan_that_is_read() -> None:
    plan = RefitPlan.from_bytes(PLAN.to_bytes(), opener=lambda weights, plan: TensorMap(WEIGHTS))
    assert plan.materialize("anything")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(PlanMismatchError, match=path.name):
            RefitPlan.load(path)


def test_saving_does_not_change_pinned_tensors() -> None:
    weird = torch.arange(12.0).reshape(3, 4).t()[1:, ::2]
    assert not weird.is_contiguous()
    slot = make_slot("m", tuple(weird.shape))
    plan = make_plan([pinned_row(slot)], pinned={"m": weird})
    again = RefitPlan.from_bytes(plan.to_bytes())
    assert again.pinned("m").equal(weird)
    assert plan.pinned("m") is weird


def test_values_survive_bit_for_bit() -> None:
    odd = torch.tensor([0.0, -0.0, float("nan"), float("-inf"), 1e-45])
    bits = odd.view(torch.int32)
    plan = make_plan([pinned_row(make_slot("m", (5,)))], pinned={"m": odd})
    assert RefitPlan.from_bytes(plan.to_bytes()).pinned("m").view(torch.int32).equal(bits)


def test_pinned_tensors_that_share_memory_are_kept_apart() -> None:
    base = torch.arange(4.0)
    rows = [pinned_row(make_slot(n, (3,))) for n in ("a", "b")]
    plan = make_plan(rows, pinned={"a": base[:3], "b": base[1:]})
    again = RefitPlan.from_bytes(plan.to_bytes())
    assert again.pinned("a").tolist() == [0, 1, 2]
    assert again.pinned("b").tolist() == [1, 2, 3]


PINNABLE = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", PINNABLE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,), (2, 1, 2)], ids=str)
def test_every_dtype_and_shape_can_be_pinned(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    slot = make_slot("m", shape, str(dtype).removeprefix("torch."))
    again = RefitPlan.from_bytes(
        make_plan([pinned_row(slot)], pinned={"m": tensor}).to_bytes()
    ).pinned("m")
    assert (again.dtype, again.shape) == (dtype, tensor.shape)
    assert again.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


def test_a_conjugated_constant_is_pinned_with_its_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    plan = make_plan([pinned_row(make_slot("m", (2,), "complex64"))], pinned={"m": tensor})
    again = RefitPlan.from_bytes(plan.to_bytes()).pinned("m")
    assert again.tolist() == [1 - 2j, 3 + 4j]


def test_names_may_be_anything() -> None:
    names = [
        "a.b",
        "[CONVOLUTION]-[x]-[c/conv] KERNEL",
        "ü",
        "a/../b",
        "",
        " ",
        "m\n",
        "__metadata",
    ]
    rows = [recipe_row(make_slot(name)) for name in names]
    pinned = {f"p{n}": torch.ones(2) for n in names}
    rows += [pinned_row(make_slot(name)) for name in pinned]
    leaves = [Leaf(fqn=n, kind=LeafKind.BUFFER, dtype="float32", shape=(2,)) for n in names]
    plan = make_plan(rows, leaves=leaves, pinned=pinned)
    assert RefitPlan.from_bytes(plan.to_bytes()).data == plan.data
