"""The strategy ``name-map``: values for the slots whose cached entry the program proves."""

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
    """Provides values for the slots whose entry in the cached map can be proved."""

    @property
    def name(self) -> str:
        """``name-map``."""
        return NAME

    @property
    def priority(self) -> int:
        """50: after ``recipe``, which maps more slots; before ``rebuild``, which takes seconds."""
        return 50

    def map(self, request: MapRequest) -> Mapped:
        """Values for slots with a proved entry, and reasons for the others. Reads maps only."""
        values: dict[tuple[str, str], SlotValue] = {}
        declined: dict[tuple[str, str], str] = {}
        maps = _maps_of(request)
        # restoring the program takes long, and without a map there is nothing to prove
        prover = _prover_for(request) if any(maps.values()) else ""
        for row in request.wanted:
            found = _slot_value(row.slot, maps[row.slot.engine], prover, request)
            if isinstance(found, SlotValue):
                values[row.slot.key] = found
            else:
                declined[row.slot.key] = found
        return Mapped(values, declined)


def _maps_of(request: MapRequest) -> dict[str, Mapping[str, Any] | None]:
    """The cached map of each engine with wanted rows; None for an engine without a map."""
    maps: dict[str, Mapping[str, Any] | None] = {}
    for name in {row.slot.engine for row in request.wanted}:
        engine = request.module.engines.get(name)
        maps[name] = engine.name_map if isinstance(engine, HasNameMap) else None
    return maps


def _slot_value(
    slot: Slot, name_map: Mapping[str, Any] | None, prover: Prover | str, request: MapRequest
) -> SlotValue | str:
    if not name_map:
        return "its engine has no cached map (only torch-tensorrt 2.11 and 2.12 store one)"
    entry = entry_of(name_map, slot.name)
    if isinstance(entry, str):
        return entry
    if isinstance(prover, str):
        return prover
    proof = prover.prove(slot, entry)
    return value_of(slot, proof, request) if isinstance(proof, SlotProof) else proof


def _prover_for(request: MapRequest) -> Prover | str:
    """A prover for the compiled program; or the reason as text, if there is no such program."""
    program = _program_of(request)
    if isinstance(program, str):
        return program
    # operands of another graph say nothing about these engines
    if facts_of(program).graph != request.plan.data.fingerprint.graph:
        return "the program is not the compiled one, so it proves nothing"
    operands = operands_of(program)
    return operands if isinstance(operands, str) else Prover(operands, request.plan.data)


def _program_of(request: MapRequest) -> ExportedProgram | str:
    if request.program is not None:
        placeholders = {leaf.fqn: _placeholder(leaf) for leaf in request.plan.data.leaves}
        try:
            return request.program.restore(TensorMap(placeholders), request.plan.pinned)
        except RefitError as exc:
            return f"the stored program cannot prove it: {exc.message}"
    if isinstance(request.source, HoldsProgram):
        return request.source.program
    return "there is no program to prove the cached map: pass a program as the weights"


def _placeholder(leaf: Leaf) -> torch.Tensor:
    """A tensor of this shape that needs almost no memory: the program is inspected, not run."""
    return torch.zeros((), dtype=dtype_of(leaf.dtype)).expand(leaf.shape)


# -- values of proved slots ----------------------------------------------------------------------

NAME = "name-map"


def value_of(slot: Slot, proof: SlotProof, request: MapRequest) -> SlotValue | str:
    """The value of a slot, computed when it is loaded.

    Args:
        slot: The slot.
        proof: The slot's proof.
        request: The mapping request with source and plan.

    Returns:
        The value; or the reason as text, if the source lacks a tensor or it does not match.
    """
    names: dict[str, str] = {}
    for role, leaf in proof.leaves.items():
        name = _name_in(request.source, leaf, request.plan.data)
        if name is None:
            return f"the source has no {leaf.fqn!r}"
        mismatch = _mismatch(request.source, name, leaf)
        if mismatch:
            return mismatch
        names[role] = name
    sources = tuple(dict.fromkeys(names.values()))
    role = proof.operand.use.role
    # only folded batch norms are computed; every other proved slot is the tensor itself
    if role not in {"scale", "shift"}:
        load = _UnchangedTensor(slot, request.source, *sources)
        return SlotValue(slot, NAME, sources, load, identity=True, formula=role)
    leaves = tuple(sorted((role, leaf.fqn) for role, leaf in proof.leaves.items()))
    return SlotValue(
        slot,
        NAME,
        sources,
        _FoldedBatchNorm(slot, request.source, names, proof),
        formula=(role, proof.operand.eps, leaves),
    )


def _name_in(source: WeightSource, leaf: Leaf, plan: PlanData) -> str | None:
    """The first of the tensor's tied names that the source has; the program's own name first."""
    tied = next((tie for tie in plan.ties if leaf.fqn in tie), ())
    available = source.names()
    return next((name for name in (leaf.fqn, *tied) if name in available), None)


def _mismatch(source: WeightSource, name: str, leaf: Leaf) -> str:
    info = source.info(name)
    if info.unusable:
        return f"the source's {name!r} is unusable: {info.unusable}"
    # values are never cast here: a cast would need a recipe
    if (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
        found, wanted = f"{info.dtype}{list(info.shape)}", f"{leaf.dtype}{list(leaf.shape)}"
        return f"the source's {name!r} is {found}, not {wanted}"
    return ""


class _UnchangedTensor:
    """Loads a tensor of the source unchanged, in the slot's shape."""

    def __init__(self, slot: Slot, source: WeightSource, fqn: str) -> None:
        self._slot, self._source, self._fqn = slot, source, fqn

    def __call__(self) -> torch.Tensor:
        return _shaped(self._source.get(self._fqn), self._slot)


class _FoldedBatchNorm:
    """Computes scale or shift of a folded batch norm.

    It repeats ``batch_norm_constant_folding`` (``dynamo/conversion/impl/normalization/ops.py``,
    2.11 to 2.14) on the CPU.
    """

    def __init__(
        self, slot: Slot, source: WeightSource, names: dict[str, str], proof: SlotProof
    ) -> None:
        self._slot, self._source, self._names = slot, source, names
        self._eps, self._role = proof.operand.eps, proof.operand.use.role

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            scale = self._get("weight", 1.0) / torch.sqrt(self._get("running_var") + self._eps)
            if self._role == "scale":
                return _shaped(scale, self._slot)
            shift = self._get("bias", 0.0) - self._get("running_mean") * scale
        return _shaped(shift, self._slot)

    def _get(self, role: str, missing: float = 0.0) -> torch.Tensor:
        """One of the four tensors; a missing one is a constant in float32, as in upstream."""
        if role in self._names:
            # the interpreter folds on the CPU, and other devices can round differently
            return self._source.get(self._names[role]).cpu()
        return torch.full((self._slot.count,), missing)


def _shaped(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    return tensor if slot.shape is None else tensor.reshape(slot.shape)
