"""What is found in plans that refitkit cannot have written, before anything of them is used."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import PlanMismatchError
from refitkit.model import (
    CallRef,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    Number,
    OpCall,
    PinnedRef,
    PlanData,
    SlotState,
    SourceRef,
    Tensor,
    TorchName,
    fingerprint_of_slots,
)
from refitkit.recipe import RefitPlan, store
from refitkit.recipe.ops import encode_literal
from refitkit.recipe.store import TensorMetadata, problems_of
from tests.fakes import call_row, make_plan, make_slot, pinned_row, recipe_row

if TYPE_CHECKING:
    from collections.abc import Callable

W, B, G = SourceRef(fqn="w"), SourceRef(fqn="b"), SourceRef(fqn="g")
W_HALF = SourceRef(fqn="h")
TABLE = PinnedRef(name="table")
W_BYTES = 2 * 3 * 4


def gives(*shape: int, dtype: str = "float32") -> tuple[Tensor, ...]:
    return (Tensor(dtype=dtype, shape=shape),)


def call(op: str, *args: Any, to: tuple[Tensor, ...] = gives(2, 3), **kwargs: Any) -> OpCall:
    literals = {name: encode_literal(value) for name, value in kwargs.items()}
    return OpCall(
        op=f"aten.{op}", args=tuple(map(encode_literal, args)), kwargs=literals, results=to
    )


def leaf(
    fqn: str, *shape: int, kind: LeafKind = LeafKind.PARAMETER, dtype: str = "float32"
) -> Leaf:
    return Leaf(fqn=fqn, kind=kind, dtype=dtype, shape=shape)


LEAVES = (
    leaf("w", 2, 3),
    leaf("v", 2, 3),
    leaf("b", 3),
    leaf("g", 2, 1),
    leaf("m", 3, kind=LeafKind.BUFFER),
)
CALLS = (
    call("mul.Tensor", W, G),
    call("add_.Tensor", CallRef(call=0), B),
    call("index_select.default", CallRef(call=1), 1, TABLE, to=gives(2, 2)),
    call("sort.default", W, 1, to=(*gives(2, 3), *gives(2, 3, dtype="int64"))),
    call(
        "_to_copy.default", CallRef(call=2), dtype=torch.bfloat16, to=gives(2, 2, dtype="bfloat16")
    ),
    call("nonzero.default", CallRef(call=3, output=1), to=gives(4, 2, dtype="int64")),
)
GUARD = Guard(value=B, sha256="0" * 64, dtype="float32", shape=(3,), reason="item()")
PLAN = make_plan(
    [
        call_row(make_slot("fused", (6,)), 1, "w", "v", "g", "b"),
        call_row(make_slot("picked", (4,), "bfloat16"), 4, "w", "v", "g", "b"),
        call_row(make_slot("order", (8,), "int64"), 5, "w", "v"),
        recipe_row(make_slot("flat", (6,)), "w", "v"),
        pinned_row(make_slot("table", (2,), "int64"), name="table"),
        LedgerRow(
            slot=make_slot("eps", (2,), "int64"), state=SlotState.FROZEN, value=TABLE, reason="x"
        ),
        LedgerRow(slot=make_slot("odd"), state=SlotState.UNMAPPED, reason="nobody knows"),
    ],
    leaves=LEAVES,
    ties=[("w", "v")],
    calls=CALLS,
    guards=[GUARD],
    pinned={"table": torch.tensor([2, 0])},
)


def found(data: PlanData) -> list[str]:
    return [f"{problem.subject}: {problem.kind}" for problem in problems_of(data)]


def with_call(number: int, new: OpCall | None = None, **changes: Any) -> PlanData:
    calls = list(PLAN.data.calls)
    calls[number] = new or calls[number].model_copy(update=changes)
    return PLAN.data.model_copy(update={"calls": tuple(calls)})


def only(
    *calls: OpCall, shape: tuple[int, ...] = (2, 3), leaves: tuple[Leaf, ...] = LEAVES
) -> PlanData:
    """A plan of these calls; its one slot is the first result of the last."""
    result = calls[-1].results[0]
    row = call_row(make_slot("s", shape, result.dtype), len(calls) - 1, "w")
    kept = {"table": torch.tensor([2, 0]), "mask": torch.tensor([True, False])}
    return make_plan([row], leaves=leaves, pinned=kept).data.model_copy(update={"calls": calls})


def tried(*calls: OpCall, leaves: tuple[Leaf, ...] = LEAVES) -> str:
    """What is wrong with these calls themselves."""
    problems = [
        p for p in problems_of(only(*calls, leaves=leaves)) if p.subject.startswith("calls")
    ]
    return "\n".join(map(str, problems))


def test_a_good_plan() -> None:
    assert found(PLAN.data) == []


def test_it_comes_back_from_a_file() -> None:
    assert RefitPlan.from_bytes(PLAN.to_bytes()).data == PLAN.data


def test_a_problem_in_a_file_is_a_typed_error() -> None:
    plan = RefitPlan(with_call(0, op="aten.rand.default"), {"table": torch.tensor([2, 0])})
    with pytest.raises(PlanMismatchError, match="is damaged, or was edited") as info:
        RefitPlan.from_bytes(plan.to_bytes())
    assert [p.subject for p in info.value.problems] == ["calls.0 (aten.rand.default)"]


def test_a_slot_whose_shape_has_another_count() -> None:
    """An engine that has no shape of its own would lay the weight out by it."""
    row = PLAN.data.ledger[0]
    slot = row.slot.model_copy(update={"shape": (7,)})
    ledger = (row.model_copy(update={"slot": slot}), *PLAN.data.ledger[1:])
    slots = [one.slot for one in ledger]
    prints = PLAN.data.fingerprint.model_copy(update={"slots": fingerprint_of_slots(slots)})
    data = PLAN.data.model_copy(update={"ledger": ledger, "fingerprint": prints})
    assert "fused: count" in found(data)


# -- calls as they are written ----------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        "aten.rand.default",
        "aten.mul.out",
        "os.system",
        "",
        "aten.resize_.default",
        "prims.add.default",
    ],
)
def test_ops_that_a_recipe_may_not_hold(op: str) -> None:
    assert [f.split(": ")[1] for f in found(with_call(0, op=op))] == [
        "not an op that recipes may hold"
    ]


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((CallRef(call=2), G), "refers to a call that does not come before it"),
        ((CallRef(call=10**9), G), "refers to a call that does not come before it"),
        ((CallRef(call=1), G), "refers to a call that does not come before it"),
        ((CallRef(call=0, output=1), G), "refers to a result that does not exist"),
        ((SourceRef(fqn="zz"), G), "unknown source"),
        ((PinnedRef(name="w"), G), "unknown pinned tensor"),
        ((W, (G, SourceRef(fqn="zz"))), "unknown source"),
        ((1, 2), "has no operand"),
        ((W, G, 1, 2, 3, 4), "arguments that the op does not take"),
    ],
)
def test_references_and_arguments_that_lead_nowhere(args: tuple[Any, ...], kind: str) -> None:
    assert found(with_call(1, call("mul.Tensor", *args))) == [f"calls.1 (aten.mul.Tensor): {kind}"]


def test_an_op_that_writes_needs_something_to_copy() -> None:
    assert "has no operand" in tried(call("add_.Tensor", 1, W))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (call("sum.dim_IntList", W, (2**63,)), "more than 64 bits"),
        (call("sum.dim_IntList", W, (0, 10**4000)), "more than 64 bits"),
        (call("mul.Tensor", W, TorchName(name="qint8")), "no constant 'qint8'"),
        (call("mul.Tensor", W, G, other=2), "arguments that the op does not take"),
        (call("mul.Tensor", W, G, alpha=2), "arguments that the op does not take"),
        (call("_to_copy.default", W, device="cuda"), "argument device"),
        (call("_to_copy.default", W, device=3), "argument device"),
        (call("_to_copy.default", W, pin_memory=True), "argument pin_memory"),
        (call("split.Tensor", W, 0), "argument split_size, found 0"),
        (
            call("native_group_norm.default", W, None, None, 2, 3, 1, 0, 1e-5),
            "argument group, found 0",
        ),
    ],
)
def test_literals_that_are_none(bad: OpCall, text: str) -> None:
    assert text in tried(bad)


@pytest.mark.parametrize("device", ["", "cuda:1", "meta", "gpu", "cpu:0", "x" * 1000])
def test_kinds_of_devices_that_are_none(device: str) -> None:
    assert "not a kind of device" in tried(
        call("neg.default", W).model_copy(update={"device": device})
    )


def test_all_literals_that_are_none_are_listed() -> None:
    bad = [call("mul.Scalar", W, Number(text=text)) for text in ("one", "two")]
    told = tried(*bad)
    assert "calls.0 (aten.mul.Scalar): argument other" in told
    assert "calls.1 (aten.mul.Scalar): argument other" in told


def test_all_calls_that_are_written_badly_are_listed() -> None:
    calls = (call("rand.default", W), call("neg.default", SourceRef(fqn="zz")), call("relu.out", W))
    assert len(tried(*calls).splitlines()) == 3


# -- calls tried without data -----------------------------------------------------------------


@pytest.mark.parametrize(
    "results",
    [
        gives(3, 2),
        gives(6),
        gives(2, 3, dtype="float64"),
        (),
        gives(2, 3) * 2,
        gives(2**61),
    ],
)
def test_results_that_are_not_what_the_op_gives(results: tuple[Tensor, ...]) -> None:
    kinds = {"cannot be run", "wrong number of results"}
    assert {f"calls.0 (aten.mul.Tensor): {kind}" for kind in kinds} & set(
        found(with_call(0, results=results))
    )


def test_statistics_may_have_another_precision_than_on_meta() -> None:
    """The results of these ops differ between devices in nothing else."""
    w = leaf("h", 2, 3, dtype="bfloat16")
    for precision, refused in (("bfloat16", False), ("float32", False), ("float64", True)):
        statistics = gives(2, 1, dtype=precision) * 2
        to = (*gives(2, 3, dtype="bfloat16"), *statistics)
        one = call("native_layer_norm.default", W_HALF, (3,), None, None, 1e-5, to=to)
        assert ("it returns" in tried(one, leaves=(w,))) is refused
    wrong = (*gives(2, 3), *gives(2, 1) * 2)
    other = call("native_layer_norm.default", W_HALF, (3,), None, None, 1e-5, to=wrong)
    assert "it returns" in tried(other, leaves=(w,))


def test_an_op_whose_results_depend_on_values_has_as_many_as_its_schema_says() -> None:
    unique = call("unique_consecutive.default", B, to=gives(3))
    assert "wrong number of results" in tried(unique)
    three = (*gives(3), *gives(3, dtype="int64"), *gives(3, dtype="int64"))
    assert tried(unique.model_copy(update={"results": three})) == ""


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (call("mm.default", W, W), "cannot be run"),
        (call("view.default", W, (7,), to=gives(7)), "invalid for input of size 6"),
        (call("as_strided.default", W, (2, 3), (3, 2), to=gives(2, 3)), "out of bounds"),
        (call("as_strided.default", W, (2, 3), (3, 1), 2**62, to=gives(2, 3)), "out of bounds"),
        (call("as_strided.default", W, (2, 3), (3, 1), -1, to=gives(2, 3)), "out of bounds"),
        (call("as_strided.default", W, (2, 3), (2**62, 1), to=gives(2, 3)), "out of bounds"),
        (call("as_strided.default", W, (2,), (-1,), 3, to=gives(2)), "cannot be run"),
        (call("as_strided_scatter.default", W, B, (3,), (2,), 2), "out of bounds"),
        (call("mul.Tensor", W, "text"), "cannot be run"),
        (call("sum.dim_IntList", W, (5,)), "Dimension out of range"),
        (call("cat.default", W, 0), "cannot be run"),
        (call("_neg_view.default", PinnedRef(name="mask"), to=gives(2, dtype="bool")), "negative"),
        (call("layer_norm.default", W, (4,), None, None, 1e-5), "cannot be run"),
    ],
)
def test_what_torch_would_refuse_is_refused_before(bad: OpCall, text: str) -> None:
    assert text in tried(bad)


def test_a_view_of_a_source_may_lie_in_memory_as_it_likes() -> None:
    """The plan does not say how, so a transposed source must not fail here or be needed."""
    transposed = call("t.default", W, to=gives(3, 2))
    assert tried(transposed, call("view.default", CallRef(call=0), (6,), to=gives(6))) == ""


def test_parts_of_memory_are_those_of_the_operand_alone() -> None:
    """Whatever else lies in the same storage, as the next tensor of a file does."""
    row = call("select.int", W, 0, 0, to=gives(3))
    inside = call("as_strided.default", CallRef(call=0), (3,), (1,), to=gives(3))
    beyond = call("as_strided.default", CallRef(call=0), (3,), (1,), 1, to=gives(3))
    zero = call("as_strided.default", CallRef(call=0), (9, 0), (7, 7), 3, to=gives(9, 0))
    assert tried(row, inside) == tried(row, zero) == ""
    assert "out of bounds" in tried(row, beyond)
    same = call("expand.default", G, (2, 3))  # of two elements in memory, and then of six
    copied = call("as_strided.default", CallRef(call=0), (6,), (1,), to=gives(6))
    assert tried(same, copied) == ""


def test_an_op_that_writes_is_judged_by_what_it_has_written() -> None:
    assert tried(call("copy_.default", W, B)) == ""
    assert tried(call("t_.default", W, to=gives(3, 2))) == ""
    assert "cannot be run" in tried(call("copy_.default", B, W, to=gives(2, 3)))


def test_what_depends_on_values_is_taken_as_the_plan_says() -> None:
    rows = call("nonzero.default", W, to=gives(5, 2, dtype="int64"))
    assert tried(rows, call("sum.default", CallRef(call=0), to=gives(dtype="int64"))) == ""
    assert "cannot be run" in tried(rows, call("sum.default", CallRef(call=0), to=gives(5)))


@pytest.mark.parametrize(
    "bomb",
    [
        [call("repeat.default", W, (10**5, 10**5), to=gives(2 * 10**5, 3 * 10**5))],
        [
            call("full_like.default", W, 1),
            call("repeat.default", CallRef(call=0), (1 << 20, 40), to=gives(2 << 20, 120)),
        ],
        [call("repeat.default", W, (1 << 20, 8), to=gives(2 << 20, 24))] * 8,
        [
            call("expand.default", G, (2, 2**40), to=gives(2, 2**40)),
            call("reshape.default", CallRef(call=0), (2**41,), to=gives(2**41)),
        ],
        [
            call("expand.default", G, (2, 2**40), to=gives(2, 2**40)),
            call("neg.default", CallRef(call=0), to=gives(2, 2**40)),
        ],
        [
            call("expand.default", G, (2, 2**40), to=gives(2, 2**40)),
            call("as_strided.default", CallRef(call=0), (3,), (1,), to=gives(3)),
        ],
        [call("nonzero.default", W, to=gives(2**40, 2, dtype="int64"))],
        [call("constant_pad_nd.default", W, (0, 2**40), to=gives(2, 3 + 2**40))],
    ],
)
def test_results_out_of_proportion_are_refused(bomb: list[OpCall]) -> None:
    assert "far more memory than all slots and leaves" in tried(*bomb)


def zeros(*sizes: int) -> list[OpCall]:
    """Calls that make so many elements each, and a last one that makes one of them."""
    made = [call("new_zeros.default", W, (size,), to=gives(size)) for size in sizes]
    return [*made, call("sum.default", CallRef(call=0), to=gives())]


def test_the_most_memory_that_results_may_take() -> None:
    """Of one, of all; in proportion to what the plan has anyway."""
    data = only(*zeros(1))
    size = store._bytes_of_plan(data, TensorMetadata(data))
    assert size == 6 * 4 + W_BYTES + 2 * 8 + 2  # its slot, its leaf, what it keeps
    one, every = ((1 << 26) + size * times for times in (16, 128))
    assert tried(*zeros(one // 4)) == ""
    assert "far more memory" in tried(*zeros(one // 4 + 1))
    two = one // 4 - 1, (every - one) // 4
    assert tried(*zeros(*two)) == ""
    assert "far more memory" in tried(*zeros(two[0], two[1] + 1))


def test_large_leaves_allow_large_results() -> None:
    leaves = (*LEAVES, leaf("large", 1 << 24))
    large = call("repeat.default", SourceRef(fqn="large"), (3,), to=gives(3 << 24))
    assert tried(large, call("sum.default", CallRef(call=0), to=gives()), leaves=leaves) == ""


@pytest.mark.parametrize(
    "bomb",
    [
        call("unbind.int", SourceRef(fqn="long"), to=gives(0)),
        call("split.Tensor", SourceRef(fqn="long"), 1, to=gives(1, 0)),
        call("unsafe_split.Tensor", SourceRef(fqn="long"), 1, to=gives(1, 0)),
        call("split_copy.Tensor", SourceRef(fqn="long"), 1, to=gives(1, 0)),
        call("chunk.default", SourceRef(fqn="long"), 2**60, to=gives(1, 0)),
        call("tensor_split.sections", SourceRef(fqn="long"), 2**60, to=gives(1, 0)),
        call("unbind.int", SourceRef(fqn="wide"), -1, to=gives(0)),
    ],
    ids=lambda one: one.op,
)
def test_a_tensor_for_each_of_many_rows_is_refused(bomb: OpCall) -> None:
    leaves = (*LEAVES, leaf("long", 2**60, 0), leaf("wide", 0, 2**60))
    start = time.monotonic()
    assert "results, but the plan states 1" in tried(bomb, leaves=leaves)
    assert time.monotonic() - start < 60  # it would take years


@pytest.mark.parametrize("count", [3, 4, 5])
def test_of_many_results_only_the_number_is_told(count: int) -> None:
    long = SourceRef(fqn="long")
    bad = call("unbind.int", long, to=gives(2) * count)
    told = tried(bad, leaves=(*LEAVES, leaf("long", count, 1)))
    shown = "5 results" if count > 4 else ", ".join(["float32 (1,)"] * count)
    assert f"it returns {shown}, but" in told


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (call("split.Tensor", W, 1, 5, to=gives(1, 3) * 2), "Dimension out of range"),
        (call("split.Tensor", W, 1, -3, to=gives(1, 3) * 2), "Dimension out of range"),
        (call("split.Tensor", W, 1, "x", to=gives(1, 3) * 2), "argument 'dim'"),
        (call("chunk.default", W, 0.5, to=gives(1, 3) * 2), "argument 'chunks'"),
    ],
    ids=str,
)
def test_torch_says_what_is_wrong_with_a_split(bad: OpCall, text: str) -> None:
    assert text in tried(bad)


def test_calls_that_are_alike_but_for_strides_are_tried_each() -> None:
    pairs = (*LEAVES, leaf("pairs", 3, 2))
    turned = call("t.default", W, to=gives(3, 2))
    good = call("view_as_complex.default", SourceRef(fqn="pairs"), to=gives(3, dtype="complex64"))
    bad = call("view_as_complex.default", CallRef(call=0), to=gives(3, dtype="complex64"))
    assert tried(turned, good, leaves=pairs) == ""
    assert "calls.2 (aten.view_as_complex.default)" in tried(turned, good, bad, leaves=pairs)


def test_no_results_and_no_device_are_fine() -> None:
    none = call("unbind.int", SourceRef(fqn="none"), to=())
    assert tried(none, call("neg.default", W), leaves=(*LEAVES, leaf("none", 0, 3))) == ""
    assert tried(call("new_zeros.default", W, (2, 3), device=None)) == ""


def test_an_op_that_writes_leaves_its_operand_as_it_was() -> None:
    """What it makes is a copy: later calls see the shape of before, and memory is counted."""
    turned = call("t_.default", W, to=gives(3, 2))
    assert tried(turned, call("add.Tensor", W, B), call("t_.default", W, to=gives(3, 2))) == ""


def test_views_take_no_memory() -> None:
    assert tried(call("expand.default", G, (2, 2**40), to=gives(2, 2**40))) == ""


def test_splits_that_are_meant() -> None:
    leaves = (*LEAVES, leaf("flat", 100_000))
    parts = gives(50_000) * 2
    flat = SourceRef(fqn="flat")
    assert tried(call("split.Tensor", flat, 50_000, to=parts), leaves=leaves) == ""
    assert tried(call("chunk.default", flat, 2, to=parts), leaves=leaves) == ""
    assert (
        tried(call("split_with_sizes.default", flat, (50_000, 50_000), to=parts), leaves=leaves)
        == ""
    )
    assert tried(call("unbind.int", W, to=gives(3) * 2)) == ""


def test_a_leaf_of_absurd_size() -> None:
    leaves = (*LEAVES, leaf("huge", *[2**61] * 40))
    assert "cannot be run" in tried(call("neg.default", SourceRef(fqn="huge")), leaves=leaves)


def test_modes_of_the_caller_have_no_part_in_it() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert found(PLAN.data) == []


def test_blocks_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of many layers has few kinds of them."""
    made: list[str] = []
    called = store._run_op

    def counted(op: Any, args: Any, kwargs: Any) -> Any:
        made.append(str(op))
        return called(op, args, kwargs)

    monkeypatch.setattr(store, "_run_op", counted)
    same = [call("neg.default", SourceRef(fqn=name)) for name in ("w", "v")]
    other = [call("neg.default", B, to=gives(3)), call("sum.dim_IntList", W, (0,), to=gives(3))]
    again = [call("sum.dim_IntList", W, (1,), to=gives(2)), call("neg.default", CallRef(call=0))]
    assert tried(*same, *other, *again) == ""
    assert made == ["aten.neg.default", "aten.neg.default", *["aten.sum.dim_IntList"] * 2]


# -- rows, guards, leaves ---------------------------------------------------------------------

EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "call that is not there": (
        lambda d: d["ledger"][0]["value"].update(call=6),
        "fused: refers to a call",
    ),
    "result that is not there": (
        lambda d: d["ledger"][0]["value"].update(output=1),
        "fused: refers to a result",
    ),
    "call of another count": (
        lambda d: d["ledger"][0]["value"].update(call=2),
        "fused: differs from its recipe",
    ),
    "call of another dtype": (
        lambda d: d["ledger"][1]["value"].update(call=2),
        "picked: differs from its recipe",
    ),
    "too few sources": (
        lambda d: d["ledger"][0].update(sources=["w", "v", "g"]),
        "fused: its sources are not",
    ),
    "too many sources": (
        lambda d: d["ledger"][0].update(sources=["w", "v", "g", "b", "m"]),
        "fused: its sources are not",
    ),
    "a twin is lacking": (
        lambda d: d["ledger"][0].update(sources=["w", "g", "b"]),
        "fused: its sources are not",
    ),
    "a twin of its own name is lacking": (
        lambda d: d["ledger"][3].update(sources=["w"]),
        "flat: its sources are not",
    ),
    "a source twice": (
        lambda d: d["ledger"][0]["sources"].append("w"),
        "fused: its sources are not",
    ),
    "another source": (
        lambda d: d["calls"][1]["args"][1].update(fqn="m"),
        "fused: its sources are not",
    ),
    "frozen with a recipe": (
        lambda d: d["ledger"][0].update(state="frozen"),
        "fused: value does not fit",
    ),
    "unmapped with a recipe": (
        lambda d: d["ledger"][0].update(state="unmapped"),
        "fused: value does not fit",
    ),
    "kept as a recipe": (
        lambda d: d["ledger"][4].update(state="recipe"),
        "table: value does not fit",
    ),
    "kept of another dtype": (
        lambda d: d["ledger"][5]["value"].update(name="w"),
        "eps: unknown pinned",
    ),
    "override that is unlike": (
        lambda d: d["ledger"][4].update(sources=["m"]),
        "table: differs from its recipe",
    ),
    "override that is not there": (
        lambda d: d["ledger"][4].update(sources=["zz"]),
        "table: unknown source",
    ),
    "guard of nothing": (
        lambda d: d["guards"][0]["value"].update(fqn="zz"),
        "guards.0: unknown source",
    ),
    "guard of a constant": (
        lambda d: d["guards"][0].update(
            value={"kind": "pinned", "name": "table"}, dtype="int64", shape=[2]
        ),
        "guards.0: depends on no leaf",
    ),
    "guard of another shape": (lambda d: d["guards"][0].update(shape=[4]), "guards.0: differs"),
    "guard of another dtype": (
        lambda d: d["guards"][0].update(dtype="float16"),
        "guards.0: differs",
    ),
    "guard without a digest": (
        lambda d: d["guards"][0].update(sha256="x"),
        "guards.0: is not a sha256",
    ),
    "tie of unlike leaves": (
        lambda d: d.update(ties=[["w", "v"], ["b", "g"]]),
        "b = g: tied, but of different",
    ),
    "two ties of one name": (
        lambda d: d.update(ties=[["w", "v"], ["v", "w"]]),
        "w: tied name listed twice",
    ),
    "kept, and unlike the leaf": (
        lambda d: d["leaves"].append({**d["leaves"][4], "fqn": "table"}),
        "table: pinned tensor differs",
    ),
    "shape of another count": (
        lambda d: d["ledger"][0]["slot"].update(shape=[7]),
        "fused: count",
    ),
    "tie of what is no leaf": (
        lambda d: d["ties"][0].append("zz"),
        "zz: tied, but not a leaf",
    ),
    "no slot needed for what is no leaf": (
        lambda d: d["unreached"].update(zz="dead"),
        "zz: listed as needing no slot",
    ),
    "a strategy that served what is no slot": (
        lambda d: d["needs"].append(
            {"kind": "strategy", "name": "s", "plugin": "p", "slots": ["model/zz"]}
        ),
        "model/zz: filled by 's'",
    ),
    "sources of what never changes": (
        lambda d: d["ledger"][5].update(sources=["m"]),
        "eps: has sources, but its value never changes",
    ),
    "version 1 with guards": (
        lambda d: d.update(format="refitplan/1", calls=[], ledger=d["ledger"][4:]),
        "format: allows no calls",
    ),
    "version 1 with calls": (lambda d: d.update(format="refitplan/1"), "format: allows no calls"),
}


@pytest.mark.parametrize("name", EDITS)
def test_contradictions(name: str) -> None:
    edit, expected = EDITS[name]
    data = json.loads(PLAN.data.model_dump_json())
    edit(data)
    slots = [row.slot for row in PLAN.ledger]
    data["fingerprint"]["slots"] = fingerprint_of_slots(slots)
    problems = found(PlanData.model_validate_json(json.dumps(data)))
    assert any(problem.startswith(expected) for problem in problems), problems


@pytest.mark.parametrize("kind", ["format", "count"])
def test_slots_and_plans_that_are_right_are_left_alone(kind: str) -> None:
    """Nobody need know a slot's shape; a plan of the first version has neither calls nor guards."""
    slot = make_slot("w", (6,)).model_copy(update={"shape": None} if kind == "count" else {})
    plan = make_plan([recipe_row(slot)], leaves=[leaf("w", 2, 3)])
    old = {"format": "refitplan/1"} if kind == "format" else {}
    assert found(plan.data.model_copy(update=old)) == []


def test_sources_that_are_not_what_a_row_follows_from_are_told_in_full() -> None:
    for sources, shown in (((), "none"), (("w", "m"), "'m', 'w'")):
        row = PLAN.ledger[0].model_copy(update={"sources": sources})
        data = PLAN.data.model_copy(update={"ledger": (row, *PLAN.ledger[1:])})
        (problem,) = problems_of(data)
        assert (problem.found, problem.wanted) == (shown, "'b', 'g', 'v', 'w'")


def test_a_value_that_follows_from_no_leaf_is_no_recipe() -> None:
    """Else it would look as if it changed with the weights."""
    row = call_row(make_slot("s", (2,), "int64"), 0)
    neg = call("neg.default", TABLE, to=gives(2, dtype="int64"))
    data = make_plan([row], calls=[neg], pinned={"table": torch.tensor([2, 0])}).data
    assert found(data) == ["s: depends on no leaf"]


def test_a_slot_may_have_another_shape_than_its_source_but_no_other_count() -> None:
    good = make_plan([recipe_row(make_slot("w", (6,)))], leaves=[leaf("w", 2, 3)])
    assert found(good.data) == []
    bad = make_plan([recipe_row(make_slot("w", (5,)))], leaves=[leaf("w", 2, 3)])
    assert found(bad.data) == ["w: differs from its recipe"]


def test_a_long_chain_of_calls_does_not_nest() -> None:
    calls = [call("neg.default", W)]
    calls += [call("neg.default", CallRef(call=n)) for n in range(5000)]
    row = call_row(make_slot("s", (2, 3)), 5000, "w", "v")
    plan = make_plan([row], leaves=LEAVES, ties=[("w", "v")], calls=calls)
    assert found(plan.data) == []
