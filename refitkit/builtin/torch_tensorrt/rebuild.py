"""The strategy ``rebuild``: values as the interpreter makes them of a program.

It needs a program with the new weights: the source itself where that is one, or the program that
the module kept, bound to the source. What it costs is a whole lowering, cutting and conversion, as
the reference pays at each refit; all slots are served by one run.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from refitkit.errors import EngineError, PlanMismatchError, Problem
from refitkit.protocols import HoldsProgram, Mapped, Rebuilds, SlotValue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch.export import ExportedProgram

    from refitkit.model import Slot
    from refitkit.protocols import BindableProgram, MapRequest, Plan, WeightSource

NAME = "rebuild"


class RebuildStrategy:
    """Serves every slot of a module that can be rebuilt, or none."""

    @property
    def name(self) -> str:
        """``rebuild``."""
        return NAME

    @property
    def priority(self) -> int:
        """It is tried last: exact, and slow."""
        return 90

    def map(self, request: MapRequest) -> Mapped:
        """One run of the interpreter for all wanted rows, when the first value is asked for."""
        module = request.module
        if not isinstance(module, Rebuilds):
            reason = "the module's backend has no interpreter"
            return Mapped({}, {row.slot.key: reason for row in request.wanted})
        found = program_with(request.source, request.program, request.plan)
        if isinstance(found, str):
            return Mapped({}, {row.slot.key: found for row in request.wanted})
        run = _Run(lambda: module.rebuilt(found(), request.tools))
        values = {
            row.slot.key: SlotValue(row.slot, NAME, (), _Load(run, row.slot))
            for row in request.wanted
        }
        return Mapped(values)


def program_with(
    source: WeightSource, kept: BindableProgram | None, plan: Plan
) -> Callable[[], ExportedProgram] | str:
    """What gives a program with the source's weights; or why there is none.

    The program may be changed by whoever gets it; the source and its tensors may not.
    """
    if isinstance(source, HoldsProgram):
        return lambda: source.program
    if kept is None:
        return "there is no program to put the weights into: the module was opened without one"
    names = set(source.names())
    twins = {name: tie for tie in plan.data.ties for name in tie}
    lacking = [
        leaf.fqn
        for leaf in plan.data.leaves
        if leaf.used
        and leaf.persistent
        and not leaf.derived
        and not names & {leaf.fqn, *twins.get(leaf.fqn, ())}
    ]
    if lacking:
        shown = ", ".join(map(repr, lacking[:3]))
        return f"the source lacks {len(lacking)} weights of the program, such as {shown}"
    return lambda: kept.restore(source, plan.pinned)


class _Run:
    """One run of the interpreter, shared by all slots."""

    def __init__(self, run: Callable[[], Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._values: Mapping[str, Mapping[str, torch.Tensor]] | None = None

    def value(self, slot: Slot) -> torch.Tensor:
        with self._lock:
            if self._values is None:
                self._values = self._run()
        found = self._values.get(slot.engine, {}).get(slot.name)
        if found is None:
            raise PlanMismatchError(
                "The program makes engines with other weights.",
                problems=[Problem(f"{slot.engine}/{slot.name}", "no such weight")],
            )
        if found.numel() != slot.count:
            raise EngineError(f"The rebuild gave {found.numel()} elements for {slot.name!r}.")
        return found if slot.shape is None else found.reshape(slot.shape)


class _Load:
    """Reads one slot of a run."""

    def __init__(self, run: _Run, slot: Slot) -> None:
        self._run, self._slot = run, slot

    def __call__(self) -> torch.Tensor:
        return self._run.value(self._slot)
