"""What tests of merges need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.pipeline import Pipeline
from refitkit.recipe import TensorMap
from refitkit.testing.oracles import bits

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

PIPELINE = Pipeline()


class Known(TensorMap):
    """A state_dict with revisions."""

    def revision(self, fqn: str) -> Hashable | None:
        if fqn not in self.names():
            raise KeyError(fqn)
        return bits(self.get(fqn))


def opened(merge: object) -> Any:
    return PIPELINE.open_weights(merge)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def problems_of(error: Any) -> set[tuple[str, str]]:
    return {(problem.subject, problem.kind) for problem in error.value.problems}
