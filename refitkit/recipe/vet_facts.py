"""What a plan says of the tensors that its recipes refer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import CallRef, PinnedRef, SourceRef, Tensor
from refitkit.recipe.operands import Followed

if TYPE_CHECKING:
    from refitkit.model import PlanData, Value


class Facts:
    """It, for those who judge the plan and those who show it."""

    def __init__(self, data: PlanData) -> None:
        """Know them; nothing is checked.

        Args:
            data: The plan.
        """
        self._calls = data.calls
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._pinned = data.pinned
        self._followed = Followed(data.calls, data.ties)

    def missing(self, value: Value, before: int | None = None) -> tuple[str, str] | None:
        """Why a reference leads nowhere, and where it leads; None if it is good.

        Args:
            value: The reference.
            before: Only calls before this one are there.
        """
        if isinstance(value, SourceRef):
            return None if value.fqn in self._leaves else ("unknown source", value.fqn)
        if isinstance(value, PinnedRef):
            return None if value.name in self._pinned else ("unknown pinned tensor", value.name)
        last = len(self._calls) if before is None else before
        if value.call >= last:
            return "refers to a call that does not come before it", str(value.call)
        if value.output >= len(self._calls[value.call].results):
            return "refers to a result that does not exist", f"{value.call}.{value.output}"
        return None

    def tensor(self, value: Value) -> Tensor:
        """Dtype and shape; only of references that lead somewhere."""
        if isinstance(value, CallRef):
            return self._calls[value.call].results[value.output]
        found = (
            self._leaves[value.fqn] if isinstance(value, SourceRef) else self._pinned[value.name]
        )
        return Tensor(dtype=found.dtype, shape=found.shape)

    def sources(self, value: Value) -> frozenset[str]:
        """All names of all leaves that a value follows from."""
        return self._followed.by(value)
