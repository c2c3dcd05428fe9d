"""Values of proved slots, from a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from refitkit.builtin.torch_tensorrt.name_map.proof import Proved
    from refitkit.model import Leaf, PlanData, Slot
    from refitkit.protocols import MapRequest, WeightSource

NAME = "name-map"


def value_of(slot: Slot, proved: Proved, request: MapRequest) -> SlotValue | str:
    """The value of a slot, not yet computed; or why the source does not give it."""
    names: dict[str, str] = {}
    for role, leaf in proved.leaves.items():
        name = _name_in(request.source, leaf, request.plan.data)
        if name is None:
            return f"the source has no {leaf.fqn!r}"
        misfit = _misfit(request.source, name, leaf)
        if misfit:
            return misfit
        names[role] = name
    sources = tuple(dict.fromkeys(names.values()))
    if proved.operand.use.role not in {"scale", "shift"}:
        return SlotValue(slot, NAME, sources, _Same(slot, request.source, *sources), identity=True)
    return SlotValue(slot, NAME, sources, _Folded(slot, request.source, names, proved))


def _name_in(source: WeightSource, leaf: Leaf, plan: PlanData) -> str | None:
    """Under which of its names the source has a tensor; the program's own first."""
    twins = next((tie for tie in plan.ties if leaf.fqn in tie), ())
    have = source.names()
    return next((name for name in (leaf.fqn, *twins) if name in have), None)


def _misfit(source: WeightSource, name: str, leaf: Leaf) -> str:
    info = source.info(name)
    if info.unusable:
        return f"the source's {name!r} is unusable: {info.unusable}"
    if (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
        found, wanted = f"{info.dtype}{list(info.shape)}", f"{leaf.dtype}{list(leaf.shape)}"
        return f"the source's {name!r} is {found}, not {wanted}"
    return ""


class _Same:
    """Loads a source's tensor as it is."""

    def __init__(self, slot: Slot, source: WeightSource, fqn: str) -> None:
        self._slot, self._source, self._fqn = slot, source, fqn

    def __call__(self) -> torch.Tensor:
        return _shaped(self._source.get(self._fqn), self._slot)


class _Folded:
    """Loads scale or shift of a batch norm.

    As ``batch_norm_constant_folding`` of ``dynamo/conversion/impl/normalization/ops.py`` (2.11 to
    2.14) has it, on the CPU, where the interpreter takes all weights.
    """

    def __init__(
        self, slot: Slot, source: WeightSource, names: dict[str, str], proved: Proved
    ) -> None:
        self._slot, self._source, self._names = slot, source, names
        self._eps, self._role = proved.operand.eps, proved.operand.use.role

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            scale = self._get("weight", 1.0) / torch.sqrt(self._get("running_var") + self._eps)
            if self._role == "scale":
                return _shaped(scale, self._slot)
            shift = self._get("bias", 0.0) - self._get("running_mean") * scale
        return _shaped(shift, self._slot)

    def _get(self, role: str, missing: float = 0.0) -> torch.Tensor:
        """One of the four; layers without weight and bias fold with float32 ones and zeros."""
        if role in self._names:
            return self._source.get(self._names[role]).cpu()
        return torch.full((self._slot.count,), missing)


def _shaped(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    return tensor if slot.shape is None else tensor.reshape(slot.shape)
