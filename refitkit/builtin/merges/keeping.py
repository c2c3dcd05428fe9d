"""What a merge has made, kept for the time of one refit, which looks at it several times."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class Made:
    """Tensors that were made, up to a number of bytes.

    A refit looks at all of them in turn, several times over: those that came first are kept, as
    what came last would always be what the next look needs last.
    """

    def __init__(self, limit: int | None) -> None:
        """Keep nothing yet.

        Args:
            limit: Most bytes that are kept; None: no limit.
        """
        self._limit = limit
        self._tensors: dict[str, torch.Tensor] = {}
        self._nbytes = 0

    def get(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was made under this name, or is made now.

        What lies on a GPU is not kept: memory is dear there, and sums are quick.
        """
        found = self._tensors.get(name)
        if found is None:
            found = make()
            whole = self._nbytes + found.nbytes
            if found.is_cpu and (self._limit is None or whole <= self._limit):
                self._tensors[name] = found
                self._nbytes = whole
        return found

    def like(self) -> Made:
        """Another one with the same limit, of other tensors."""
        return Made(self._limit)
