"""The strategy ``rebuild``: the interpreter computes all values from a program.

It needs a program with the new weights. That is the source itself if the source is a program, else
the program that the module kept, with the weights of the source. One run computes all slots. The
run lowers, partitions and converts the whole program, as torch_tensorrt's own refit does each time.
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
    """Gives a value for every slot if the module can be rebuilt, else for none."""

    @property
    def name(self) -> str:
        """``rebuild``."""
        return NAME

    @property
    def priority(self) -> int:
        """Last of the built-in strategies: it is exact, and slow."""
        return 90

    def map(self, request: MapRequest) -> Mapped:
        """Map all wanted rows. The interpreter runs once, when the first value is loaded."""
        module = request.module
        if not isinstance(module, Rebuilds):
            reason = "the module's backend has no interpreter"
            return Mapped({}, {row.slot.key: reason for row in request.wanted})
        found = program_with(request.source, request.program, request.plan)
        if isinstance(found, str):
            return Mapped({}, {row.slot.key: found for row in request.wanted})
        run = _InterpreterRun(lambda: module.rebuilt(found(), request.tools))
        values = {
            row.slot.key: SlotValue(row.slot, NAME, (), _LoadSlot(run, row.slot))
            for row in request.wanted
        }
        return Mapped(values)


def program_with(
    source: WeightSource, kept: BindableProgram | None, plan: Plan
) -> Callable[[], ExportedProgram] | str:
    """How to get a program with the weights of a source, or why there is none.

    Args:
        source: The new weights.
        kept: The program that the module kept; None if there is none.
        plan: Plan of the module: its leaves, ties and pinned tensors.

    Returns:
        A function that returns the program, or the reason why there is none. The caller may change
        the program, but not the source and its tensors.
    """
    if isinstance(source, HoldsProgram):
        return lambda: source.program
    if kept is None:
        return "the module was opened without a program, so there is none to rebuild"
    names = set(source.names())
    # a source may name a tied weight by any of its names
    ties = {name: tie for tie in plan.data.ties for name in tie}
    missing = [
        leaf.fqn
        for leaf in plan.data.leaves
        if leaf.used
        and leaf.persistent
        # a derived leaf is computed from the leaves that it shares memory with
        and not leaf.derived
        and not names & {leaf.fqn, *ties.get(leaf.fqn, ())}
    ]
    if missing:
        shown = ", ".join(map(repr, missing[:3]))
        return f"the source lacks {len(missing)} weights of the program, for example {shown}"
    return lambda: kept.restore(source, plan.pinned)


class _InterpreterRun:
    """One run of the interpreter, shared by all slots."""

    def __init__(self, run: Callable[[], Mapping[str, Mapping[str, torch.Tensor]]]) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._values: Mapping[str, Mapping[str, torch.Tensor]] | None = None

    def value(self, slot: Slot) -> torch.Tensor:
        """The value of a slot, in its shape or flat if the shape is unknown.

        Raises:
            PlanMismatchError: The program has no such weight.
            EngineError: The weight has another number of elements.
        """
        with self._lock:  # slots may be loaded by several threads
            if self._values is None:
                self._values = self._run()
        found = self._values.get(slot.engine, {}).get(slot.name)
        if found is None:
            raise PlanMismatchError(
                "The engines of the program have other weights than the plan.",
                problems=[Problem(f"{slot.engine}/{slot.name}", "no such weight")],
            )
        if found.numel() != slot.count:
            raise EngineError(
                f"Rebuilding gave {found.numel()} elements for {slot.name!r}, not {slot.count}."
            )
        return found if slot.shape is None else found.reshape(slot.shape)


class _LoadSlot:
    """Returns the value of one slot; see ``SlotValue.load``."""

    def __init__(self, run: _InterpreterRun, slot: Slot) -> None:
        self._run, self._slot = run, slot

    def __call__(self) -> torch.Tensor:
        return self._run.value(self._slot)
