"""The strategy ``name-map``: values for the slots whose cached entries the program proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.name_map.proof import (
    HasNameMap,
    Prover,
    SlotProof,
    entry_of,
    operands_of,
)
from refitkit.errors import RefitError
from refitkit.program import facts_of
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import HoldsProgram, Mapped, SlotValue
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Leaf, PlanData, Slot
    from refitkit.protocols import MapRequest, WeightSource


class NameMapStrategy:
    """Serves the slots whose entry in the cached map can be proved."""

    @property
    def name(self) -> str:
        """``name-map``."""
        return NAME

    @property
    def priority(self) -> int:
        """Tried after ``recipe``, which has more; before ``rebuild``, which takes seconds."""
        return 50

    def map(self, request: MapRequest) -> Mapped:
        """Values for the rows with a proved entry. Takes nothing out of the maps."""
        values: dict[tuple[str, str], SlotValue] = {}
        declined: dict[tuple[str, str], str] = {}
        maps = _maps_of(request)
        prover = _prover_for(request) if any(maps.values()) else ""
        for row in request.wanted:
            found = _value(row.slot, maps[row.slot.engine], prover, request)
            if isinstance(found, SlotValue):
                values[row.slot.key] = found
            else:
                declined[row.slot.key] = found
        return Mapped(values, declined)


def _maps_of(request: MapRequest) -> dict[str, Mapping[str, Any] | None]:
    """The cached map of each engine that has wanted rows; one without has no say in the others."""
    maps: dict[str, Mapping[str, Any] | None] = {}
    for name in {row.slot.engine for row in request.wanted}:
        engine = request.module.engines.get(name)
        maps[name] = engine.name_map if isinstance(engine, HasNameMap) else None
    return maps


def _value(
    slot: Slot, name_map: Mapping[str, Any] | None, prover: Prover | str, request: MapRequest
) -> SlotValue | str:
    if not name_map:
        return "its engine has no cached map (only torch-tensorrt 2.11 and 2.12 store one)"
    entry = entry_of(name_map, slot.name)
    if isinstance(entry, str):
        return entry
    if isinstance(prover, str):
        return prover
    proved = prover.prove(slot, entry)
    return value_of(slot, proved, request) if isinstance(proved, SlotProof) else proved


def _prover_for(request: MapRequest) -> Prover | str:
    """What the compiled program proves; or why there is no such program."""
    program = _program_of(request)
    if isinstance(program, str):
        return program
    if facts_of(program).graph != request.plan.data.fingerprint.graph:
        return "the program at hand is not the one that was compiled, so it proves nothing"
    operands = operands_of(program)
    return operands if isinstance(operands, str) else Prover(operands, request.plan.data)


def _program_of(request: MapRequest) -> ExportedProgram | str:
    if request.program is not None:
        blanks = {leaf.fqn: _blank(leaf) for leaf in request.plan.data.leaves}
        try:
            return request.program.restore(TensorMap(blanks), request.plan.pinned)
        except RefitError as exc:
            return f"the kept program cannot prove it: {exc.message}"
    if isinstance(request.source, HoldsProgram):
        return request.source.program
    return "the cached map alone proves nothing, and there is no program: pass one as the weights"


def _blank(leaf: Leaf) -> torch.Tensor:
    """A tensor of this shape and next to no memory: the program is read, not run."""
    return torch.zeros((), dtype=dtype_of(leaf.dtype)).expand(leaf.shape)


# MERGED values: Values of proved slots, from a source.

NAME = "name-map"


def value_of(slot: Slot, proved: SlotProof, request: MapRequest) -> SlotValue | str:
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
        self, slot: Slot, source: WeightSource, names: dict[str, str], proved: SlotProof
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
