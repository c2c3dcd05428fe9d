"""Sources that tell what was read of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.protocols import HoldsProgram
from refitkit.testing import oracles

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource


class Watched:
    """A source that notes which tensors are read. It has the program of one that holds one.

    Attributes:
        read: Names of what was read.
    """

    def __init__(self, source: WeightSource) -> None:
        """Stand before a source."""
        self.read: list[str] = []
        self._source = source

    @property
    def description(self) -> str:
        """The source's own."""
        return self._source.description

    def names(self) -> Collection[str]:
        """The source's own."""
        return self._source.names()

    def info(self, fqn: str) -> TensorInfo:
        """The source's own."""
        return self._source.info(fqn)

    def get(self, fqn: str) -> torch.Tensor:
        """The source's own, noted."""
        self.read.append(fqn)
        return self._source.get(fqn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def state_of_program(source: WeightSource) -> dict[str, oracles.Bits]:
    """Bits of the tensors of the program that a source holds; nothing where it holds none."""
    if not isinstance(source, HoldsProgram):
        return {}
    state = source.program.state_dict
    return {f"program {name}": oracles.bits(tensor) for name, tensor in state.items()}
