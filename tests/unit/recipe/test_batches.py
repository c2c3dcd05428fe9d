"""Ops that are made for many tensors at once: what they give does not depend on where it lies."""

from __future__ import annotations

import random

import pytest
import torch

from refitkit.program.bits import same_bits
from refitkit.recipe import ops
from refitkit.recipe.batches import BATCHED

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
