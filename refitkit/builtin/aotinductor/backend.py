"""The backend object: what ``refitkit.protocols.Backend`` asks for."""

from __future__ import annotations

import platform
from math import prod
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor import compiling
from refitkit.builtin.aotinductor import module as opening
from refitkit.builtin.aotinductor.engine import ENGINE
from refitkit.builtin.aotinductor.module import AOTInductorModule
from refitkit.builtin.aotinductor.names import NAME
from refitkit.errors import NotRefittableError, PlanMismatchError, Problem, UnsupportedTargetError
from refitkit.model import LeafKind, LedgerRow, PinnedRef, Slot, SlotState, SourceRef
from refitkit.program import facts_of
from refitkit.program.bits import same_bits
from refitkit.program.facts import tensors_of
from refitkit.protocols import PlanDraft
from refitkit.recipe import Draft

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

    from refitkit.builtin.aotinductor.engine import AOTInductorEngine
    from refitkit.model import Leaf
    from refitkit.protocols import OpenedModule, Tools


class AOTInductorBackend:
    """``aotinductor``: runs wherever torch runs."""

    @property
    def name(self) -> str:
        """Its name."""
        return NAME

    def compile(
        self,
        program: ExportedProgram,
        options: Mapping[str, Any],
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> AOTInductorModule:
        """Compile a program; ``options`` are those of ``torch._inductor.config``."""
        return compiling.compile_program(program, options)

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Weights as they are, views of weights, and pinned values for what no state_dict holds."""
        if not isinstance(module, AOTInductorModule):
            raise UnsupportedTargetError(
                "AOTInductor names its weights while it compiles: no plan without an engine.",
                hint="refitkit.compile makes the plan in the same pass; for an engine that exists, "
                "pass it: refitkit.plan(program, target=...).",
            )
        ours = module.files.call is not None
        ledger = Ledger(parts[ENGINE], module.engines[ENGINE], ours=ours)
        if not ours:
            module.learn(parts[ENGINE])
        return PlanDraft(
            rows=ledger.rows,
            calls=ledger.calls,
            pinned=ledger.pinned,
            settings=dict(module.files.settings),
            versions=dict(module.files.versions),
            platform=f"{platform.system()} {platform.machine()} {module.files.device}",
        )

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """What a saved file holds, without loading its library."""
        return opening.describe_file(path)

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved file keeps beside its engine, without loading its library."""
        return opening.attachments_of(path)


# MERGED ledger: How the slots of an AOTInductor engine follow from the program that was compiled.


class Ledger:
    """Rows and pinned tensors of one engine.

    Attributes:
        rows: One row for every slot.
        calls: What rows compute.
        pinned: Values of the pinned slots, and of all constants of the program.
    """

    def __init__(
        self, program: ExportedProgram, engine: AOTInductorEngine, *, ours: bool = True
    ) -> None:
        """Match a program's leaves with an engine's slots.

        Args:
            program: The program that was compiled.
            engine: Its engine.
            ours: Whether refitkit compiled it, with the options that refits rely on.

        Raises:
            NotRefittableError: The engine holds weights of the program where no refit reaches.
            PlanMismatchError: The program is not the one that was compiled.
        """
        self._engine = engine
        self._facts = facts_of(program)
        self._twins = {name: tie for tie in self._facts.ties for name in tie}
        self._leaves = {leaf.fqn: leaf for leaf in self._facts.leaves}
        self._tensors = tensors_of(program)
        self._draft = Draft(self._leaves, self._facts.ties)
        self.pinned: dict[str, torch.Tensor] = {
            leaf.fqn: self._tensors[leaf.fqn].detach().clone()
            for leaf in self._facts.leaves
            if leaf.kept
        }
        self.rows = tuple(self._row(slot) for slot in engine.slots.values())
        self.calls = tuple(self._draft.calls)
        problems = [*self._unlike(), *self._foreign()]
        if problems:
            raise PlanMismatchError(
                "The program is not the one that was compiled into this engine.", problems=problems
            )
        self._check_reachable()
        if not ours:
            self._check_single_elements()

    def _row(self, slot: Slot) -> LedgerRow:
        leaf = self._leaves.get(slot.name)
        if leaf is None:
            return self._anonymous(slot)
        names = self._twins.get(leaf.fqn, (leaf.fqn,))
        if leaf.persistent and not leaf.derived and not self._is_needed(names):
            return self._dead(slot, names)
        return self._of_leaf(slot, leaf)

    def _of_leaf(self, slot: Slot, leaf: Leaf) -> LedgerRow:
        """A slot that holds a leaf of the program."""
        value = self._draft.leaf(leaf.fqn)
        if not isinstance(value, SourceRef) or self._leaves[value.fqn].persistent:
            sources = self._draft.sources(value)
            return LedgerRow(slot=slot, state=SlotState.RECIPE, value=value, sources=sources)
        return LedgerRow(
            slot=slot,
            state=SlotState.PINNED,
            value=PinnedRef(name=leaf.fqn),
            sources=self._twins.get(leaf.fqn, (leaf.fqn,)),
            reason=f"a {leaf.kind.value.replace('-buffer', ' buffer')}: no state_dict holds it",
        )

    def _is_needed(self, names: tuple[str, ...]) -> bool:
        """Whether a source has to have a tensor: the program's results follow from it."""
        leaves = [self._leaves[name] for name in names if name in self._leaves]
        return any(leaf.used or leaf.mutated for leaf in leaves)

    def _dead(self, slot: Slot, names: tuple[str, ...]) -> LedgerRow:
        """A weight that only dead code reads, and that is a slot all the same.

        Inductor keeps unused operands of loops and branches. A source may lack it, so the plan
        has a value for it.
        """
        self.pinned[slot.name] = self._tensors[slot.name].detach().clone()
        return LedgerRow(
            slot=slot,
            state=SlotState.PINNED,
            value=PinnedRef(name=slot.name),
            sources=names,
            reason="only code without results reads it: a source may have it",
        )

    def _anonymous(self, slot: Slot) -> LedgerRow:
        """A constant that inductor named itself: its value is read off the engine."""
        live = self._engine.read(slot.name)
        same = [
            leaf.fqn
            for leaf in self._facts.leaves
            if not (leaf.persistent or leaf.mutated) and same_bits(live, self._tensors[leaf.fqn])
        ]
        follow = [fqn for fqn in same if self._follows(fqn)]
        if follow and len(same) == 1:
            return self._of_leaf(slot, self._leaves[same[0]])
        if follow:
            problems = [Problem(slot.name, "may follow from weights", ", ".join(same))]
            raise NotRefittableError(
                "Constants of the engine have equal values, and some are views of weights.",
                problems=problems,
                hint="Compile the program with refitkit.compile, which gives them names.",
            )
        self.pinned[slot.name] = live.detach().clone()
        return LedgerRow(
            slot=slot,
            state=SlotState.PINNED,
            value=PinnedRef(name=slot.name),
            sources=tuple(same) if len(same) == 1 else (),
            reason="a constant of the graph",
        )

    def _follows(self, fqn: str) -> bool:
        """Whether a leaf has the value of weights: it is a view of them, or their other name."""
        value = self._draft.leaf(fqn)
        return not isinstance(value, SourceRef) or self._leaves[value.fqn].persistent

    def _unlike(self) -> Iterator[Problem]:
        for row in self.rows:
            leaf, slot = self._leaves.get(row.slot.name), row.slot
            if leaf and (leaf.dtype, leaf.shape) != (slot.dtype, slot.shape):
                found = f"{leaf.dtype} {leaf.shape}"
                yield Problem(slot.name, "differs", found, f"{slot.dtype} {slot.shape}")

    def _foreign(self) -> Iterator[Problem]:
        """Slots that can be no constant of this program: they have names of a module's own."""
        for row in self.rows:
            name = row.slot.name
            made_by_inductor = name.startswith(("_tensor_constant", "lifted_"))
            if name not in self._leaves and not made_by_inductor and not row.sources:
                yield Problem(name, "in the engine, not in the program")

    def _check_reachable(self) -> None:
        """Every weight that the graph reads must be a slot, or a refit could not change it."""
        reached = self._engine.slots.keys() | {name for row in self.rows for name in row.sources}
        problems = [
            Problem(leaf.fqn, "folded into the engine's code")
            for leaf in self._facts.leaves
            if _matters(leaf) and not set(self._twins.get(leaf.fqn, (leaf.fqn,))) & reached
        ]
        if problems:
            raise NotRefittableError(
                "Weights of the program are not weights of the engine.",
                problems=problems,
                hint="Compile with refitkit.compile, or with always_keep_tensor_constants=True and "
                "freezing=False.",
            )

    def _check_single_elements(self) -> None:
        """Refuse weights that inductor folds by default without a trace.

        ``constant_fold_uniform_value`` in ``torch/_inductor/fx_passes/joint_graph.py`` (2.14) puts
        the value that a weight of one element had into the code; its slot may still be there.
        """
        problems = [
            Problem(leaf.fqn, "one element: may be part of the engine's code")
            for leaf in self._facts.leaves
            if leaf.used and leaf.kind is not LeafKind.CONSTANT and prod(leaf.shape) == 1
        ]
        if problems:
            raise NotRefittableError(
                "AOTInductor folds such weights unless joint_graph_constant_folding=False, and "
                "nobody can see from outside whether it did.",
                problems=problems,
                hint="Compile the program with refitkit.compile, which sets that option.",
            )


def _matters(leaf: Leaf) -> bool:
    """Whether a refit must reach it; inductor drops tensors without elements."""
    return leaf.used and leaf.persistent and 0 not in leaf.shape
