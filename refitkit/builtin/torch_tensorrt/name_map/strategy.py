"""The strategy ``name-map``: values for the slots whose cached entries the program proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.name_map.entries import HasNameMap, entry_of
from refitkit.builtin.torch_tensorrt.name_map.operands import operands_of
from refitkit.builtin.torch_tensorrt.name_map.proof import Proved, Prover
from refitkit.builtin.torch_tensorrt.name_map.values import NAME, value_of
from refitkit.errors import RefitError
from refitkit.program import facts_of
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import HoldsProgram, Mapped, SlotValue
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Leaf, Slot
    from refitkit.protocols import MapRequest


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
    return value_of(slot, proved, request) if isinstance(proved, Proved) else proved


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
