"""What must be true of weights before anything is staged: all that is wrong, at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.builtin.checks import finite as finite_check
from refitkit.config import Config
from refitkit.errors import SHOWN_PROBLEMS, Problem, WeightMismatchError
from refitkit.host import make_host
from refitkit.model import CallRef, Leaf, LeafKind, LedgerRow, SlotState, SourceRef, TensorInfo
from refitkit.pipeline.checks import check_weights
from refitkit.pipeline.context import Context
from refitkit.program import bits
from refitkit.recipe import TensorMap, name_suggestions
from tests.fakes import (
    FakeEngine,
    FakeModule,
    OpenEngine,
    call_row,
    guard_of,
    leaf_for,
    make_plan,
    make_slot,
    op_call,
    pinned_row,
    recipe_row,
    slot_for,
)

NAN, INF = float("nan"), float("inf")


def problems(
    weights: Any,
    plan: Any = None,
    module: FakeModule | None = None,
    *,
    partial: bool = False,
    **settings: Any,
) -> list[Problem]:
    """Problems of weights, or of a source, for a plan."""
    source = TensorMap(weights) if isinstance(weights, dict) else weights
    plan = plan or PLAN
    module = module or module_of(plan)
    config = Config(**settings)
    try:
        check_weights(Context(make_host(), config), plan, module, source, partial=partial)
    except WeightMismatchError as exc:
        return list(exc.problems)
    return []


def module_of(plan: Any, kind: type[FakeEngine] = OpenEngine, **values: Any) -> FakeModule:
    """A module with one engine that has the plan's slots, all zeros but for those given."""
    zeros = {
        row.slot.name: torch.zeros(row.slot.shape, dtype=getattr(torch, row.slot.dtype))
        for row in plan.ledger
    }
    return FakeModule([kind("model", {**zeros, **values})])


def kinds(found: list[Problem]) -> list[tuple[str, str]]:
    return [(p.subject, p.kind) for p in found]


W, B = make_slot("w", (2, 3)), make_slot("b", (2,), "bfloat16")
UNUSED = Leaf(fqn="steps", kind=LeafKind.BUFFER, dtype="int64", shape=(), used=False)
PLAN = make_plan([recipe_row(W), recipe_row(B)], leaves=[leaf_for(W), leaf_for(B), UNUSED])
WHOLE = "a subtree has all names"
GOOD: dict[str, Any] = {"w": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_weights_that_fit() -> None:
    assert problems(GOOD) == []
    assert problems({**GOOD, "steps": torch.tensor(3)}) == []


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 2).t(),
        torch.ones(1).expand(2, 3),
        torch.nn.Parameter(torch.ones(2, 3)),
        torch.ones(20)[1:7].reshape(2, 3),
    ],
    ids=["transposed", "expanded", "parameter", "view"],
)
def test_layout_does_not_matter(weight: torch.Tensor) -> None:
    assert problems({**GOOD, "w": weight}) == []


def test_everything_that_is_wrong_is_told_at_once() -> None:
    tied = [make_slot(f"t{n}") for n in range(3)]
    rows = [
        *PLAN.ledger,
        recipe_row(make_slot("shape")),
        recipe_row(make_slot("dtype")),
        recipe_row(make_slot("both")),
        recipe_row(make_slot("odd")),
        recipe_row(make_slot("sparse")),
        recipe_row(make_slot("nan")),
        recipe_row(tied[0], "t0", "t1", "t2"),
    ]
    plan = make_plan(rows, ties=[("t0", "t1", "t2")])
    found = problems(
        {
            "extra": torch.ones(1),
            "shape": torch.ones(3),
            "dtype": torch.ones(2).half(),
            "both": torch.ones(3).half(),
            "odd": [1.0, 2.0],
            "sparse": torch.ones(2).to_sparse(),
            "nan": torch.tensor([1.0, NAN]),
            "t0": torch.zeros(2),
            "t1": torch.ones(2),
            "t2": torch.zeros(2),
        },
        plan,
    )
    assert kinds(found) == [
        ("extra", "unexpected"),
        ("shape", "shape"),
        ("dtype", "dtype"),
        ("both", "dtype"),
        ("both", "shape"),
        ("odd", "unusable"),
        ("sparse", "unusable"),
        ("t1", "tie broken"),
        ("w", "missing"),
        ("b", "missing"),
        ("nan", "non-finite"),
    ]


# -- one by one -------------------------------------------------------------------------------


def test_missing() -> None:
    (found,) = problems({"b": GOOD["b"]})
    assert found == Problem("w", "missing", "", "float32 (2, 3)", found.hint)
    assert "partial=True" in found.hint


def test_unexpected() -> None:
    (found,) = problems({**GOOD, "ww": torch.ones(4)})
    assert (found.subject, found.kind, found.found) == ("ww", "unexpected", "float32 (4,)")


def test_an_unexpected_name_is_held_against_those_that_exist() -> None:
    slots = [make_slot("layers.0.attention.weight"), make_slot("head")]
    plan = make_plan([recipe_row(slot) for slot in slots])
    found = problems({"layers.0.attn.weight": torch.ones(2), "zzz": torch.ones(2)}, plan)
    hints = {p.subject: p.hint for p in found if p.kind == "unexpected"}
    assert hints["layers.0.attn.weight"] == "did you mean 'layers.0.attention.weight'?"
    assert hints["zzz"] == "the model has no such name"


def test_suggestions_are_looked_for_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking takes time quadratic in the names, and a wrong prefix makes all of them wrong."""
    calls: list[str] = []

    def counted(name: str, *arguments: object, **named: object) -> list[str]:
        calls.append(name)
        return []

    monkeypatch.setattr(name_suggestions, "get_close_matches", counted)
    plan = make_plan([recipe_row(make_slot(f"layers.{n}.weight")) for n in range(200)])
    weights = {f"module.layers.{n}.weight": torch.ones(2) for n in range(1, 200)}
    found = problems(weights, plan)  # of a whole model under a prefix that alone would be told
    assert len(found) == 399
    assert len(calls) <= SHOWN_PROBLEMS


def test_whole_models_under_prefixes_are_told_and_nothing_else() -> None:
    part = dict(list(GOOD.items())[1:])
    trees = {"best.net.": GOOD, "last.": GOOD, "part.": part}
    given = {prefix + name: value for prefix, tree in trees.items() for name, value in tree.items()}
    found = problems(given)
    assert kinds(found) == [("'best.net.'", WHOLE), ("'last.'", WHOLE)]
    assert problems(given, partial=True) == found
    assert [p.hint for p in found] == [
        "set rules.subtree to 'best.net.', or pass --subtree 'best.net.'",
        "set rules.subtree to 'last.', or pass --subtree 'last.'",
    ]


def test_a_model_of_which_a_name_is_there_is_not_looked_for_elsewhere() -> None:
    name, value = next(iter(GOOD.items()))
    given = {**{f"net.{n}": v for n, v in GOOD.items()}, name: value}
    assert {kind for _, kind in kinds(problems(given))} <= {"unexpected", "missing"}
    assert {kind for _, kind in kinds(problems({f"part.{name}": value}))} == {
        "unexpected",
        "missing",
    }


def test_what_a_state_dict_would_not_hold_is_never_unexpected() -> None:
    """A live module brings buffers that are not persistent: the model may have folded them."""
    source = TensorMap({**GOOD, "cache": torch.ones(9)}, not_persistent=["cache"])
    assert problems(source) == []
    assert kinds(problems(TensorMap({**GOOD, "cache": torch.ones(9)}))) == [("cache", "unexpected")]


def test_what_the_program_does_not_read_may_be_left_out() -> None:
    assert problems(GOOD) == []


def test_what_the_program_does_not_read_must_still_have_its_shape() -> None:
    """Otherwise these are weights of another model."""
    assert kinds(problems({**GOOD, "steps": torch.ones(4)})) == [("steps", "shape")]
    assert problems({**GOOD, "steps": torch.tensor(1.0)}) == []
    assert problems({**GOOD, "steps": 3}) == []


def test_shape() -> None:
    (found,) = problems({**GOOD, "w": torch.ones(2, 4)})
    assert (found.kind, found.found, found.wanted, found.hint) == ("shape", "(2, 4)", "(2, 3)", "")
    (turned,) = problems({**GOOD, "w": torch.ones(3, 2)})
    assert turned.hint == "the transposed shape"


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3, 1), ()], ids=str)
def test_the_right_number_of_elements_is_not_enough(shape: tuple[int, ...]) -> None:
    assert kinds(problems({**GOOD, "w": torch.ones(shape)})) == [("w", "shape")]


def test_dtype() -> None:
    (found,) = problems({**GOOD, "w": torch.ones(2, 3).double()})
    assert (found.kind, found.found, found.wanted) == ("dtype", "float64", "float32")
    assert "never casts" in found.hint


def test_unusable() -> None:
    (found,) = problems({**GOOD, "w": torch.ones(2, 3, device="meta")})
    assert found.kind == "unusable"
    assert "meta" in found.found
    assert found.wanted == "float32 (2, 3)"


def test_only_headers_are_read_where_names_do_not_fit() -> None:
    class Headers(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            raise AssertionError(f"{fqn} was read")

    source = Headers({"w": torch.ones(3), "b": torch.ones(3), "x": torch.ones(1)})
    assert len(problems(source)) == 4


def test_what_fits_is_not_described() -> None:
    """A description of every entry was half of what checks took."""

    class Told(TensorMap):
        def info(self, fqn: str) -> TensorInfo:
            told.append(fqn)
            return super().info(fqn)

    told: list[str] = []
    assert problems(Told({**GOOD, "steps": torch.tensor(3)})) == []
    assert told == []
    assert kinds(problems(Told({**GOOD, "w": torch.ones(3)}))) == [("w", "shape")]
    assert told == ["w"]


# -- ties -------------------------------------------------------------------------------------

TIED = make_plan([recipe_row(make_slot("t0"), "t0", "t1", "t2")], ties=[("t0", "t1", "t2")])


def tied(**values: list[float]) -> list[Problem]:
    return problems({name: torch.tensor(value) for name, value in values.items()}, TIED)


def test_a_tie_that_holds() -> None:
    assert tied(t0=[1.0, 2.0], t1=[1.0, 2.0], t2=[1.0, 2.0]) == []
    same = torch.ones(2)
    assert problems({"t0": same, "t1": same, "t2": same.clone()}, TIED) == []


@pytest.mark.parametrize("name", ["t0", "t1", "t2"])
def test_any_name_of_a_tie_is_enough(name: str) -> None:
    assert tied(**{name: [1.0, 2.0]}) == []


def test_all_names_of_a_tie_missing_is_one_problem() -> None:
    (found,) = tied()
    assert (found.subject, found.kind) == ("t0", "missing")
    assert "t1" in found.hint


def test_a_broken_tie() -> None:
    (found,) = tied(t0=[1.0, 2.0], t2=[1.0, 3.0])
    assert (found.subject, found.kind) == ("t2", "tie broken")
    assert "'t0'" in found.found


def test_a_broken_tie_forbids_a_partial_refit_too() -> None:
    weights = {"t0": torch.zeros(2), "t1": torch.ones(2)}
    assert kinds(problems(weights, TIED, partial=True)) == [("t1", "tie broken")]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(0.0, -0.0, False), (NAN, NAN, True), (1.0, 1.0, True), (1.0, 1.0000001, False)],
)
def test_ties_are_compared_by_bits(one: float, other: float, same: bool) -> None:
    found = problems(
        {"t0": torch.tensor([one, 0.0]), "t1": torch.tensor([other, 0.0])},
        TIED,
        check_finite=False,
    )
    assert kinds(found) == [] if same else [("t1", "tie broken")]


def test_ties_of_other_layouts_are_compared_by_value() -> None:
    base = torch.arange(9.0)
    assert problems({"t0": base[1:3], "t1": torch.tensor([1.0, 2.0])}, TIED) == []
    assert problems({"t0": base[::2][:2], "t1": torch.tensor([0.0, 2.0])}, TIED) == []


def test_a_name_that_does_not_fit_breaks_no_tie() -> None:
    weights = {"t0": torch.zeros(2), "t1": torch.ones(3), "t2": "text"}
    assert kinds(problems(weights, TIED)) == [("t1", "shape"), ("t2", "unusable")]


def test_ties_of_what_no_slot_needs_may_break() -> None:
    leaves = [leaf_for(W), *(leaf_for(make_slot(n)) for n in ("x", "y"))]
    plan = make_plan([recipe_row(W)], leaves=leaves, ties=[("x", "y")])
    weights = {"w": torch.ones(2, 3), "x": torch.zeros(2), "y": torch.ones(2)}
    assert problems(weights, plan) == []


# -- pinned, frozen, unmapped -----------------------------------------------------------------


def test_a_pinned_value_need_not_be_given_but_must_fit() -> None:
    slot = make_slot("mask")
    plan = make_plan([pinned_row(slot, "mask")], pinned={"mask": torch.zeros(2)})
    assert problems({}, plan) == []
    assert problems({"mask": torch.ones(2)}, plan) == []
    assert kinds(problems({"mask": torch.ones(3)}, plan)) == [("mask", "shape")]
    assert kinds(problems({"mask": torch.tensor([1.0, NAN])}, plan)) == [("mask", "non-finite")]


def test_unmapped_slots_are_not_the_checks_business() -> None:
    """Another strategy may have a value for them."""
    row = LedgerRow(slot=make_slot("u"), state=SlotState.UNMAPPED, reason="nobody knows")
    assert problems({"w": torch.ones(2, 3)}, make_plan([recipe_row(W), row])) == []


def test_with_an_unmapped_slot_everything_that_the_program_reads_is_needed() -> None:
    """Nobody knows what such a slot follows from, so it may be anything."""
    row = LedgerRow(slot=make_slot("u"), state=SlotState.UNMAPPED, reason="nobody knows")
    a, b, twin = (leaf_for(make_slot(name)) for name in ("a", "b", "twin"))
    unread = UNUSED.model_copy(update={"fqn": "unread"})
    plan = make_plan([row], leaves=[a, b, twin, unread], ties=[("b", "twin")])
    good = {"a": torch.ones(2), "twin": torch.ones(2)}
    assert problems(good, plan) == []
    assert kinds(problems({"twin": torch.ones(2)}, plan)) == [("a", "missing")]
    assert kinds(problems({"a": torch.ones(2)}, plan)) == [("b", "missing")]
    assert kinds(problems({**good, "a": torch.ones(2).half()}, plan)) == [("a", "dtype")]
    assert kinds(problems({**good, "x": torch.ones(2)}, plan)) == [("x", "unexpected")]
    # what it holds now is not known either: engines look at their slots
    assert problems({**good, "a": torch.tensor([NAN, 1.0])}, plan) == []


# -- computed slots ---------------------------------------------------------------------------

BN = ("bn.weight", "bn.var", "bn.eps")
SCALE, SHIFT = make_slot("scale"), make_slot("shift")
EPS = Leaf(fqn="bn.eps", kind=LeafKind.NON_PERSISTENT_BUFFER, dtype="float32", shape=(2,))
FOLDED = make_plan(
    [call_row(SCALE, 2, *BN), call_row(SHIFT, 3, "bn.weight", "bn.bias", "twin")],
    leaves=[*(leaf_for(SCALE, fqn=n) for n in ("bn.weight", "bn.var", "bn.bias", "twin")), EPS],
    ties=[("bn.bias", "twin")],
    calls=[
        op_call("add.Tensor", "@bn.var", "@bn.eps"),
        op_call("rsqrt.default", CallRef(call=0)),
        op_call("mul.Tensor", "@bn.weight", CallRef(call=1)),
        op_call("add.Tensor", "@bn.bias", "@bn.weight"),
    ],
    pinned={"bn.eps": torch.zeros(2)},
)
FULL = {name: torch.ones(2) for name in ("bn.weight", "bn.var", "bn.bias")}


def test_every_source_of_a_computed_slot_is_needed() -> None:
    assert problems(FULL, FOLDED) == []
    found = {p.subject: p for p in problems({"bn.eps": torch.ones(2)}, FOLDED)}
    assert {name: p.kind for name, p in found.items()} == dict.fromkeys(FULL, "missing")
    assert "needed by 'scale', 'shift';" in found["bn.weight"].hint
    assert "needed by 'scale';" in found["bn.var"].hint
    assert found["bn.var"].wanted == "float32 (2,)"


def test_of_a_computed_slots_source_any_name_is_enough() -> None:
    without = {name: value for name, value in FULL.items() if name != "bn.bias"}
    assert problems({**without, "twin": torch.ones(2)}, FOLDED) == []
    (found,) = problems(without, FOLDED)
    assert found.subject == "bn.bias"
    assert "or its other names ('twin',)" in found.hint


def test_what_no_state_dict_holds_is_never_missing() -> None:
    assert problems({**FULL, "bn.eps": torch.ones(2)}, FOLDED) == []
    assert kinds(problems({**FULL, "bn.eps": torch.ones(3)}, FOLDED)) == [("bn.eps", "shape")]


def test_many_slots_that_need_a_weight_are_counted() -> None:
    rows = [call_row(make_slot(f"s{n}"), 0, "w") for n in range(9)]
    plan = make_plan(rows, calls=[op_call("neg.default", "@w")])
    (found,) = problems({}, plan)
    assert "needed by 's0', 's1', 's2' and 6 more" in found.hint


GUARDED = make_plan(
    [recipe_row(W)],
    leaves=[leaf_for(W), *(leaf_for(SCALE, fqn=n) for n in ("g", "g2", "other"))],
    ties=[("g", "g2")],
    calls=[
        op_call("neg.default", "@other"),
        op_call("stack.default", (SourceRef(fqn="g"), SourceRef(fqn="g"))),
    ],
    guards=[guard_of(CallRef(call=1), torch.ones(2, 2))],
)


def test_what_guards_follow_from_is_needed() -> None:
    weight = {"w": torch.ones(2, 3)}
    assert problems({**weight, "g": torch.ones(2)}, GUARDED) == []
    assert problems({**weight, "g2": torch.ones(2)}, GUARDED) == []
    assert kinds(problems(weight, GUARDED)) == [("g", "missing")]
    for name in ("g", "g2"):
        half = {**weight, name: torch.ones(2).half()}
        assert kinds(problems(half, GUARDED)) == [(name, "dtype")]
    broken = {**weight, "g": torch.ones(2), "g2": torch.zeros(2)}
    assert kinds(problems(broken, GUARDED)) == [("g2", "tie broken")]


def test_a_guards_weight_alone_is_nothing_to_refit() -> None:
    found = problems({"g": torch.ones(2)}, GUARDED, partial=True)
    assert [p.kind for p in found] == ["nothing to refit"]


def test_a_computed_slot_tells_nothing_of_single_elements() -> None:
    """Which elements a fold mixes nobody knows: the slot may be finite, or not, as a whole."""
    bad = {**FULL, "bn.var": torch.tensor([1.0, NAN])}
    (found,) = problems(bad, FOLDED)
    assert (found.subject, found.kind) == ("bn.var", "non-finite")
    assert found.found == "1 of 2 elements, the first at (1,)"
    other = module_of(FOLDED, scale=torch.tensor([-INF, 0.0]))
    assert problems(bad, FOLDED, other) == []
    of_shift = {**FULL, "bn.bias": torch.tensor([1.0, NAN])}
    assert kinds(problems(of_shift, FOLDED, other)) == [("bn.bias", "non-finite")]
    mute = module_of(FOLDED, FakeEngine, scale=torch.tensor([-INF, 0.0]))
    assert kinds(problems(bad, FOLDED, mute)) == [("bn.var", "non-finite")]


def test_a_slot_that_holds_a_weight_as_it_is_tells_more_than_a_computed_one() -> None:
    plan = make_plan(
        [call_row(SCALE, 0, "w"), recipe_row(make_slot("w"))],
        calls=[op_call("neg.default", "@w")],
    )
    module = module_of(plan, scale=torch.tensor([INF, INF]), w=torch.tensor([-INF, 0.0]))
    assert problems({"w": torch.tensor([-INF, 0.0])}, plan, module) == []
    (found,) = problems({"w": torch.tensor([-INF, NAN])}, plan, module)
    assert found.found == "1 of 2 elements, the first at (1,)"


def test_what_the_plan_keeps_may_be_non_finite_where_it_is() -> None:
    """A mask of a program, given with all its other tensors, to an engine that cannot be read."""
    slot, mask = make_slot("mask"), torch.tensor([-INF, 0.0])
    plan = make_plan([pinned_row(slot, "mask")], pinned={"mask": mask})
    mute = module_of(plan, FakeEngine)
    assert problems({"mask": mask}, plan, mute) == []
    assert kinds(problems({"mask": mask.flip(0)}, plan, mute)) == [("mask", "non-finite")]


# -- partial ----------------------------------------------------------------------------------


def test_a_partial_refit_may_miss_things() -> None:
    assert problems({"w": torch.ones(2, 3)}, partial=True) == []


def test_a_partial_refit_of_nothing() -> None:
    for weights in ({}, {"steps": torch.tensor(3)}):
        (found,) = problems(weights, partial=True)
        assert found.kind == "nothing to refit"


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"w": torch.ones(3, 3)}, [("w", "shape")]),
        ({"b": torch.ones(2)}, [("b", "dtype")]),
        ({"w": torch.full((2, 3), NAN)}, [("w", "non-finite")]),
        ({"w": torch.ones(2, 3), "x": torch.ones(1)}, [("x", "unexpected")]),
    ],
    ids=["shape", "dtype", "nan", "unexpected"],
)
def test_a_partial_refit_takes_nothing_that_does_not_fit(weights: Any, found: Any) -> None:
    assert kinds(problems(weights, partial=True)) == found


# -- finite -----------------------------------------------------------------------------------


def finite(new: Any, present: Any = None, kind: type[FakeEngine] = OpenEngine) -> list[Problem]:
    """Problems of one weight, where the engine holds another."""
    new = torch.as_tensor(new)
    present = torch.zeros_like(new) if present is None else torch.as_tensor(present)
    plan = make_plan([recipe_row(slot_for("w", new))])
    return problems({"w": new}, plan, module_of(plan, kind, w=present))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_weight_that_is_suddenly_not_finite(bad: float) -> None:
    (found,) = finite([[1.0, 2.0], [bad, bad]])
    assert (found.subject, found.kind) == ("w", "non-finite")
    assert found.found == "2 of 4 elements, the first at (1, 0)"
    assert "check_finite=False" in found.hint


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_by_design_may_stay_so(bad: float) -> None:
    assert finite([0.0, bad, 2.0], [5.0, -INF, 5.0]) == []
    assert finite([0.0, 1.0, 2.0], [5.0, -INF, 5.0]) == []
    (found,) = finite([bad, bad, 2.0], [5.0, -INF, 5.0])
    assert found.found == "1 of 3 elements, the first at (0,)"


def test_an_engine_that_cannot_be_read_needs_finite_values() -> None:
    """Nobody can say that they were not finite before."""
    assert kinds(finite([0.0, -INF], [0.0, -INF], FakeEngine)) == [("w", "non-finite")]
    assert finite([0.0, 1.0], [0.0, -INF], FakeEngine) == []


def test_the_finite_check_can_be_switched_off() -> None:
    plan = make_plan([recipe_row(make_slot("w"))])
    assert problems({"w": torch.tensor([NAN, INF])}, plan, check_finite=False) == []


FLOATS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_floating_dtype_is_looked_at(dtype: torch.dtype) -> None:
    good, bad = (torch.tensor([1.0, x]).to(dtype) for x in (2.0, NAN))
    assert finite(good) == []
    (found,) = finite(bad)
    assert found.found == "1 of 2 elements, the first at (1,)"
    assert finite(bad, bad) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_are_always_finite(dtype: torch.dtype) -> None:
    assert finite(torch.ones(2).to(dtype)) == []


def test_a_number_and_nothing_at_all() -> None:
    assert finite(torch.ones(0, 3)) == []
    (found,) = finite(torch.tensor(NAN))
    assert found.found == "1 of 1 elements, the first at ()"


def test_the_imaginary_part_counts() -> None:
    assert kinds(finite(torch.complex(torch.ones(2), torch.tensor([0.0, INF])))) == [
        ("w", "non-finite")
    ]


MANY = {f"w{n}": make_slot(f"w{n}", (300,)) for n in range(1200)}  # 1.4 MB: more than one group
OF_MANY = make_plan([recipe_row(slot) for slot in MANY.values()])


def test_small_weights_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = bits.has_finite_sum
    monkeypatch.setattr(
        bits, "has_finite_sum", lambda value: asked.append(value.numel()) or real(value)
    )
    assert problems({name: torch.ones(300) for name in MANY}, OF_MANY) == []
    assert len(asked) == 2
    assert sum(asked) == 300 * len(MANY)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_only_those_of_a_group_that_are_spoilt_are_named(bad: float) -> None:
    weights = {name: torch.ones(300) for name in MANY}
    for name in ("w0", "w1", "w700", "w1199"):
        weights[name][7] = bad
    weights["w2"] *= 3e38  # the sum of its group is not finite either
    assert [p.subject for p in problems(weights, OF_MANY)] == ["w0", "w1", "w700", "w1199"]
    assert finite_check._non_finite(TensorMap(weights), MANY) == ["w0", "w1", "w700", "w1199"]


def test_opposite_infinities_do_not_cancel_out() -> None:
    weights = {name: torch.ones(300) for name in MANY}
    weights["w5"][0], weights["w6"][0] = INF, -INF
    assert [p.subject for p in problems(weights, OF_MANY)] == ["w5", "w6"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_is_too_large_accuses_nobody(dtype: torch.dtype) -> None:
    large = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
    assert not large.sum().isfinite()
    assert finite(large) == []
    assert finite(large[:1]) == []
    large[200, 3] = NAN
    (found,) = finite(large)
    assert found.found == "1 of 90000 elements, the first at (200, 3)"


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_a_gpu_is_asked(bad: float) -> None:
    """The questions, asked of a CPU: those that are spoilt, and those of too large a sum."""
    values = {f"v{n}": torch.ones(100 + 10 * n) for n in range(6)}
    asked = bits._device_candidates
    assert asked(values, torch.float32) == []
    values["v1"][4] = values["v5"][0] = bad
    values["v3"] *= 3e38
    assert sorted(asked(values, torch.float32)) == ["v1", "v3", "v5"]
    assert sorted(finite_check._non_finite(TensorMap(values), values)) == ["v1", "v5"]


def test_sums_on_a_gpu_are_wide() -> None:
    values = {f"v{n}": torch.full((100,), 60000.0).half() for n in range(3)}
    assert bits._device_candidates(values, torch.float32) == []


def test_negative_zero_is_a_value_like_any_other() -> None:
    assert finite([-0.0, 0.0]) == []


def test_what_to_do_about_a_dtype() -> None:
    (found,) = problems({**GOOD, "w": torch.ones(2, 3).double()})
    assert "rules.cast" in found.hint


def test_a_name_that_is_missing_is_more_likely_meant() -> None:
    plan = make_plan([recipe_row(make_slot(f"net.layer.{name}")) for name in "ab"])
    found = problems({"net.layer.a": torch.ones(2), "net.layer.aa": torch.ones(2)}, plan)
    hints = {p.subject: p.hint for p in found}
    assert hints["net.layer.aa"] == "did you mean 'net.layer.b'?"


def test_a_prefix_that_all_names_lack() -> None:
    names = [f"layers.{n}.weight" for n in range(30)]
    plan = make_plan([recipe_row(make_slot(f"net.{name}")) for name in names])
    found = problems(dict.fromkeys(names, torch.ones(2)), plan)
    hints = {p.hint for p in found if p.kind == "unexpected"}
    begin = "the model's names have the prefix 'net.': add it, or set rules.rename to "
    (hint,) = hints
    assert hint.startswith(begin)
    assert hint.endswith(r", or pass --rename '(.*)=net.\1'")
