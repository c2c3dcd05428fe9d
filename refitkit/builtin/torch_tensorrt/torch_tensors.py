"""The tensors that a part holds which torch runs."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from refitkit.model import Slot
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import GraphModule

    from refitkit.recipe import Tape
    from refitkit.recipe.origins import Origin


class TorchTensors:
    """Parameters, buffers and constants of one part.

    Attributes:
        scanned: Their values by name; flat and contiguous.
        origins: Where they come from, if a recording ran.
        layer_types: Always empty: it has no layers.
    """

    layer_types: frozenset[str] = frozenset()

    def __init__(self, name: str, module: GraphModule, tape: Tape | None = None) -> None:
        """Read a part."""
        self._name = name
        held = tensors_in(module)
        self.origins: dict[str, Origin] = (
            {} if tape is None else {name: tape.origin_of(value) for name, value in held.items()}
        )
        self._shapes = {target: tuple(tensor.shape) for target, tensor in held.items()}
        self.scanned: dict[str, torch.Tensor] = {
            target: tensor.detach().contiguous().reshape(-1) for target, tensor in held.items()
        }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of them as slots."""
        return tuple(
            Slot(
                engine=self._name,
                name=name,
                dtype=dtype_name(value.dtype),
                shape=self._shapes[name],
                count=value.numel(),
                readable=True,
            )
            for name, value in self.scanned.items()
        )

    def point(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take other values, without a copy."""
        self.scanned.update(values)


def tensor_in(module: GraphModule, name: str) -> torch.Tensor:
    """One of ``tensors_in``: its name is a path of attributes, and no graph has to be walked.

    Raises:
        KeyError: There is none of this name.
    """
    try:
        value = attrgetter(name)(module)
    except AttributeError:  # a hook of the module's state_dict may have names of its own
        return tensors_in(module)[name]
    if not isinstance(value, torch.Tensor):
        raise KeyError(name)
    return value


def tensors_in(module: GraphModule) -> dict[str, torch.Tensor]:
    """Tensors that the graph of a module reads, by name, and those of its state_dict."""
    found: dict[str, torch.Tensor] = dict(module.state_dict())
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(node.target)(module)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found
