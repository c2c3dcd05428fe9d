"""Outputs of an engine get the structure that the model gives them, as torch's function does it."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils import _pytree as pytree

from refitkit.builtin.aotinductor.module import structuring


@pytest.mark.parametrize(
    "outputs",
    [
        1,
        (1,),
        [1],
        (1, 2),
        [1, 2],
        (),
        [],
        {},
        {"a": 1, "b": 2},
        ((1, 2), ()),
        [1, (2,)],
        ([1], [2]),
        None,
        (None, 1),
    ],
    ids=repr,
)
def test_outputs_get_their_structure(outputs: Any) -> None:
    leaves, spec = pytree.tree_flatten(outputs)
    spec = pytree.treespec_loads(pytree.treespec_dumps(spec))
    found, given = structuring(spec)(leaves), list(leaves)
    assert found == outputs
    assert type(found) is type(outputs)
    assert found is not leaves
    for wrong in ([*given, 3], given[:-1]):
        if len(wrong) != len(given):
            with pytest.raises(ValueError, match="leaves"):
                structuring(spec)(wrong)
