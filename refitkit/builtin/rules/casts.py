"""The transform that casts entries whose dtype is not the program's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from refitkit.program.bits import same_bits
from refitkit.program.dtypes import are_alike, dtype_of, is_lossless
from refitkit.protocols import Made, WeightGroup
from refitkit.recipe.foreign import info_of
from refitkit.recipe.reads import kept_leaves, reads_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from refitkit.model import Leaf, TensorInfo
    from refitkit.protocols import TransformRequest, WeightSource


class CastTransform:
    """Casts entries to the dtype that they have in the program.

    It never casts tensors that no state_dict holds, such as the frequencies of rotary embeddings:
    the plan keeps their exact values, and a cast value has lost bits.

    Attributes:
        name: Name of the transform in reports.
        priority: Place in the order of transforms: after names and packing.
    """

    name = "casts"
    priority = 30

    def __init__(self, *, any_cast: bool) -> None:
        """Create a transform.

        Args:
            any_cast: Whether floats are cast to any float dtype, and integers to any integer dtype.
                If False, only casts that keep every value are done.
        """
        self._any = any_cast

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """Yield a group for each entry that is cast. The checks refuse other wrong dtypes."""
        reads = reads_of(request.plan)
        read = reads.used | reads.of_slots
        # A checkpoint may have a view of a weight, too. The checks compare it with that weight, so
        # it must be cast as the weight is.
        leaves = {n: leaf for n, leaf in reads.leaves.items() if n in read or leaf.view is not None}
        kept = kept_leaves(request.plan)
        for name in request.source.names():
            leaf = leaves.get(name)
            info = info_of(request.source, name)
            if leaf is None or info.unusable or info.dtype == leaf.dtype:
                continue
            before, after = dtype_of(info.dtype), dtype_of(leaf.dtype)
            # The plan's value is used, so the entry is taken out rather than refused for its dtype.
            if name in kept:
                if _keeps_planned_value(request, leaf, info):
                    yield WeightGroup((name,), {}, lambda: Made({}))
            elif is_lossless(before, after) or (self._any and are_alike(before, after)):
                yield _cast(request.source, name, info, leaf.dtype)


def _keeps_planned_value(request: TransformRequest, leaf: Leaf, info: TensorInfo) -> bool:
    """Return whether an entry can be left out, because the plan's value is used instead.

    That is so if the entry is the plan's value in another dtype, or a non-persistent buffer that
    the program writes.
    """
    name = leaf.fqn
    if leaf.mutated and not info.persistent:
        return True
    if name not in request.plan.data.pinned:
        return False
    planned = request.plan.pinned(name).to(dtype_of(info.dtype))
    return same_bits(planned, request.source.get(name))


def _cast(source: WeightSource, name: str, info: TensorInfo, dtype: str) -> WeightGroup:
    gives = {name: info.model_copy(update={"dtype": dtype})}
    make = partial(_read_as, source, name, dtype_of(dtype))
    return WeightGroup((name,), gives, make, formula=("cast", dtype))


def _read_as(source: WeightSource, name: str, dtype: torch.dtype) -> Made:
    return Made({name: source.get(name).to(dtype)})
