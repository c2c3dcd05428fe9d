"""Ops that are made for many tensors at once: what they give does not depend on where it lies."""

from __future__ import annotations

import random

import pytest
import torch

from refitkit.model import CallRef
from refitkit.program.bits import same_bits
from refitkit.recipe import RefitPlan, ops
from refitkit.recipe.calls import _MAX_RESULT_ELEMENTS, BATCHED, Calls
from tests.fakes import call_row, make_plan, make_slot, op_call

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(BATCHED))
def test_pieces_have_the_bits_of_the_whole(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chance = random.Random(0)  # noqa: S311 - which pieces are compared
    op = ops.overload(name)
    count = 1 if op is torch.ops.aten.neg.default or op is torch.ops.aten.sqrt.default else 2
    operands = [(torch.rand(1 << 15) * 3 + 0.001).to(dtype) for _ in range(count)]
    whole = op(*operands)
    for _ in range(200):
        size = chance.randrange(1, 700)
        start = chance.randrange(0, len(whole) - size)
        alone = [operand[start : start + size].clone() for operand in operands]
        assert same_bits(op(*alone), whole[start : start + size].clone()), (start, size)


def chained(count: int, width: int) -> tuple[RefitPlan, dict[str, torch.Tensor]]:
    """Many small weights, each negated, then multiplied by itself and by that."""
    calls, rows = [], []
    for number in range(count):
        at = 2 * number
        calls += [
            op_call("neg.default", f"@w{number}", shape=(width,)),
            op_call("mul.Tensor", CallRef(call=at), f"@w{number}", shape=(width,)),
        ]
        rows.append(call_row(make_slot(f"s{number}", (width,)), at + 1, f"w{number}"))
    plan = make_plan(rows, calls=calls)
    return plan, {f"w{number}": torch.randn(width) for number in range(count)}


@pytest.mark.parametrize(
    ("count", "width", "sizes"),
    [
        (3, 8, []),  # too few
        (4, 8, [4]),
        (70, 8, [70]),
        (32, _MAX_RESULT_ELEMENTS // 8, [8, 8, 8, 8]),
        (11, _MAX_RESULT_ELEMENTS // 8, [8]),  # and three that are made one by one
        (13, _MAX_RESULT_ELEMENTS // 8, [8, 5]),
        (9, _MAX_RESULT_ELEMENTS // 4, [4, 4]),
        (9, _MAX_RESULT_ELEMENTS // 4 + 1, []),  # too large
        (9, 0, []),
    ],
)
def test_a_batch_is_not_larger_than_may_lie_in_memory(
    count: int, width: int, sizes: list[int]
) -> None:
    plan, weights = chained(count, width)
    found = {id(batch): batch for batch in Calls(plan.data).batches.values()}.values()
    negated, multiplied = ([b for b in found if b.members[0] % 2 == odd] for odd in (0, 1))
    for batches in (negated, multiplied):
        assert [len(batch.members) for batch in batches] == sizes
        assert all(sum(batch.sizes) <= _MAX_RESULT_ELEMENTS for batch in batches)
    assert all(batch.reuses_batch == (False,) for batch in negated)
    assert all(batch.reuses_batch == (True, False) for batch in multiplied)
    for name, value in plan.materialize(weights)["model"].items() if width else ():
        weight = weights[f"w{name[1:]}"]
        assert same_bits(value, weight.neg() * weight)


def test_results_of_two_batches_are_not_taken_for_one() -> None:
    """Laid end to end in another order than they were made in."""
    plan, weights = chained(8, 4)
    turned = [*range(4, 8), *range(4)]
    calls = [call for number, call in enumerate(plan.data.calls) if number % 2 == 0]
    calls += [op_call("mul.Tensor", CallRef(call=n), "@w0", shape=(4,)) for n in turned]
    rows = [
        call_row(make_slot(f"s{at}", (4,)), 8 + at, f"w{number}", "w0")
        for at, number in enumerate(turned)
    ]
    plan = make_plan(rows, leaves=plan.data.leaves, calls=calls)
    for at, value in enumerate(plan.materialize(weights)["model"].values()):
        assert same_bits(value, weights[f"w{turned[at]}"].neg() * weights["w0"])
