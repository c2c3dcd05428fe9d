"""Whether recipes give, of the weights that were recorded, the values that were recorded.

Not every way to change a tensor can be watched (:mod:`refitkit.recipe.escapes`): a library in C
that knows its address needs no op for it. What such a library did to a value shows here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import PlanMismatchError
from refitkit.model import Fingerprint, PinnedTensor, PlanData, SlotState
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.plan import RefitPlan
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from refitkit.model import Leaf, LedgerRow, OpCall
    from refitkit.protocols import SlotValue

_COMPUTED = {SlotState.RECIPE, SlotState.PINNED}


def unlike(
    rows: Sequence[LedgerRow],
    calls: Sequence[OpCall],
    leaves: Sequence[Leaf],
    tensors: Mapping[str, torch.Tensor],
    literals: Mapping[str, torch.Tensor],
    values: Mapping[tuple[str, str], torch.Tensor],
) -> Iterator[tuple[str, str]]:
    """Keys of slots whose recipe gives other bits than were recorded, or cannot be computed.

    Values are computed one after another: they never lie in memory all at once.

    Args:
        rows: The slots.
        calls: What recipes compute.
        leaves: All leaves of the program.
        tensors: Their values, by FQN.
        literals: Tensors that the plan keeps, beside leaves.
        values: What was recorded, by slot.
    """
    data = PlanData(
        backend="",
        leaves=tuple(leaves),
        ledger=tuple(rows),
        calls=tuple(calls),
        pinned={name: _index_of(tensor) for name, tensor in literals.items()},
        fingerprint=Fingerprint(graph="", slots=""),
    )
    computed = [row for row in rows if row.state in _COMPUTED]
    found = RefitPlan(data, literals).values_of(computed, TensorMap(tensors))
    for key, value in found.items():
        if isinstance(value, str) or not _gives(value, values[key]):
            yield key


def _index_of(tensor: torch.Tensor) -> PinnedTensor:
    """An index entry that no file will hold: nobody asks for its digest."""
    return PinnedTensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256="")


def _gives(value: SlotValue, wanted: torch.Tensor) -> bool:
    try:
        found = value.load()
    except PlanMismatchError:
        return False
    dense = found.is_contiguous() and wanted.is_contiguous()
    if dense and found.dtype == wanted.dtype and found.data_ptr() == wanted.data_ptr():
        return found.numel() == wanted.numel()
    return same_bits(wanted.reshape(-1), found.reshape(-1))
