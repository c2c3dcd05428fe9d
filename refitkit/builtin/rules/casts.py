"""Entries of another dtype than the program's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from refitkit.program.bits import same_bits
from refitkit.program.dtypes import are_alike, dtype_of, is_lossless
from refitkit.protocols import Made, WeightGroup
from refitkit.recipe.reads import kept_leaves, reads_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from refitkit.model import Leaf, TensorInfo
    from refitkit.protocols import TransformRequest, WeightSource


class Casts:
    """Casts entries to the dtype that the program has them in.

    Never those that no state_dict holds, such as the frequencies of rotary embeddings: the plan
    keeps them as the program had them, and a cast would lose bits of that.
    """

    name = "casts"
    priority = 30

    def __init__(self, *, any_cast: bool) -> None:
        """Cast what stays what it is, or all between numbers of one kind."""
        self._any = any_cast

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """One for each entry that is cast; others are left for the checks to refuse."""
        reads = reads_of(request.plan)
        read = reads.used | reads.of_slots
        # a view that the state_dict names is compared with its weight, which is cast
        leaves = {n: leaf for n, leaf in reads.leaves.items() if n in read or leaf.view is not None}
        kept = kept_leaves(request.plan)
        for name in request.source.names():
            leaf = leaves.get(name)
            info = request.source.info(name)
            if leaf is None or info.unusable or info.dtype == leaf.dtype:
                continue
            before, after = dtype_of(info.dtype), dtype_of(leaf.dtype)
            if name in kept:
                if _is_planned(request, leaf, info):
                    yield WeightGroup((name,), {}, lambda: Made({}))
            elif is_lossless(before, after) or (self._any and are_alike(before, after)):
                yield _cast(request.source, name, info, leaf.dtype)


def _is_planned(request: TransformRequest, leaf: Leaf, info: TensorInfo) -> bool:
    """Whether an entry is what the plan keeps anyway, in another dtype, or state of a program."""
    name = leaf.fqn
    if leaf.mutated and not info.persistent:
        return True
    if name not in request.plan.data.pinned:
        return False
    planned = request.plan.pinned(name).to(dtype_of(info.dtype))
    return same_bits(planned, request.source.get(name))


def _cast(source: WeightSource, name: str, info: TensorInfo, dtype: str) -> WeightGroup:
    gives = {name: info.model_copy(update={"dtype": dtype})}
    make = partial(_as, source, name, dtype_of(dtype))
    return WeightGroup((name,), gives, make, formula=("cast", dtype))


def _as(source: WeightSource, name: str, dtype: torch.dtype) -> Made:
    return Made({name: source.get(name).to(dtype)})
