"""The backend object, and the plan of its engines.

``AOTInductorBackend`` implements ``refitkit.protocols.Backend``. ``Ledger`` finds out how each slot
of an engine follows from the program that was compiled.
"""

from __future__ import annotations

import platform
from math import prod
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor import compiling
from refitkit.builtin.aotinductor.engine import ENGINE
from refitkit.builtin.aotinductor.module import AOTInductorModule
from refitkit.builtin.aotinductor.names import NAME
from refitkit.builtin.aotinductor.opening import attachments_of, describe_file
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
    """Compiles programs with AOTInductor, for CPUs and NVIDIA GPUs."""

    @property
    def name(self) -> str:
        """Name that users write: ``aotinductor``."""
        return NAME

    def compile(
        self,
        program: ExportedProgram,
        options: Mapping[str, Any],
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> AOTInductorModule:
        """Compile a program.

        Args:
            program: Program to compile.
            options: Options of ``torch._inductor.config``.
            tools: Unused.

        Raises:
            ConfigError: Options do not exist, or refitkit sets them. The error lists all of them.
            NotRefittableError: Options would make the engine unfit for refits.
            ToolchainError: A C++ compiler or openssl is missing.
            CompileError: AOTInductor cannot compile the program.
        """
        return compiling.compile_program(program, options)

    def draft(
        self,
        parts: Mapping[str, Any],
        module: OpenedModule | None,
        tools: Tools,  # noqa: ARG002 - the protocol's
    ) -> PlanDraft:
        """Return how each slot follows from the program.

        A slot holds a weight or a view of weights, or a pinned value that no state_dict has.

        Args:
            parts: The program, by the name of the only engine.
            module: Module that was compiled from it.
            tools: Unused.

        Raises:
            UnsupportedTargetError: There is no module.
            PlanMismatchError: The module was not compiled from this program.
            NotRefittableError: The engine holds weights that a refit cannot write.
        """
        if not isinstance(module, AOTInductorModule):
            raise UnsupportedTargetError(
                "AOTInductor names weights while it compiles, so a plan needs an engine.",
                hint="refitkit.compile makes the plan in the same pass; for an engine that exists, "
                "pass it: refitkit.plan(program, target=...).",
            )
        # Only refitkit records how to call an engine.
        by_refitkit = module.files.call is not None
        ledger = Ledger(parts[ENGINE], module.engines[ENGINE], by_refitkit=by_refitkit)
        # after the ledger, which refuses a program that was not compiled into this engine
        if not by_refitkit:
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
        """Return the manifest of a saved file, without loading its library."""
        return describe_file(path)

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """Return the attachments of a saved file, without loading its library."""
        return attachments_of(path)


class Ledger:
    """How the slots of an engine follow from the program that was compiled.

    Attributes:
        rows: A row for each slot.
        calls: Operations that recipes of rows refer to.
        pinned: Values of pinned slots, and of all leaves that no state_dict holds, by name.
    """

    def __init__(
        self, program: ExportedProgram, engine: AOTInductorEngine, *, by_refitkit: bool = True
    ) -> None:
        """Match the leaves of a program with the slots of an engine.

        Args:
            program: The program that was compiled.
            engine: The engine that it was compiled into.
            by_refitkit: Whether refitkit compiled it, with the options that refits rely on.

        Raises:
            NotRefittableError: The engine holds weights of the program that a refit cannot write.
            PlanMismatchError: The program is not the one that was compiled.
        """
        self._engine = engine
        self._facts = facts_of(program)
        self._tied = {name: tie for tie in self._facts.ties for name in tie}
        self._leaves = {leaf.fqn: leaf for leaf in self._facts.leaves}
        self._tensors = tensors_of(program)
        self._draft = Draft(self._leaves, self._facts.ties)
        # Copies: the program belongs to the user, who may change its tensors.
        self.pinned: dict[str, torch.Tensor] = {
            leaf.fqn: self._tensors[leaf.fqn].detach().clone()
            for leaf in self._facts.leaves
            if leaf.kept
        }
        self.rows = tuple(self._row(slot) for slot in engine.slots.values())
        # after the rows, which add their calls to the draft
        self.calls = tuple(self._draft.calls)
        problems = [*self._differing_slots(), *self._unknown_slots()]
        if problems:
            raise PlanMismatchError(
                "The program is not the one that was compiled into this engine.", problems=problems
            )
        self._check_reachable()
        if not by_refitkit:
            self._check_single_elements()

    # -- rows ---------------------------------------------------------------------------------

    def _row(self, slot: Slot) -> LedgerRow:
        """Return the row of a slot; may add to ``pinned``."""
        leaf = self._leaves.get(slot.name)
        if leaf is None:
            return self._constant_row(slot)
        names = self._tied.get(leaf.fqn, (leaf.fqn,))
        if leaf.persistent and not leaf.derived and not self._is_needed(names):
            return self._dead_code_row(slot, names)
        return self._leaf_row(slot, leaf)

    def _leaf_row(self, slot: Slot, leaf: Leaf) -> LedgerRow:
        """Return the row of a slot that holds a leaf of the program."""
        value = self._draft.leaf(leaf.fqn)
        if not isinstance(value, SourceRef) or self._leaves[value.fqn].persistent:
            sources = self._draft.sources(value)
            return LedgerRow(slot=slot, state=SlotState.RECIPE, value=value, sources=sources)
        return LedgerRow(
            slot=slot,
            state=SlotState.PINNED,
            value=PinnedRef(name=leaf.fqn),
            sources=self._tied.get(leaf.fqn, (leaf.fqn,)),
            reason=f"a {leaf.kind.value.replace('-buffer', ' buffer')}: no state_dict holds it",
        )

    def _is_needed(self, names: tuple[str, ...]) -> bool:
        """Return whether the program's results depend on a tensor, so a source must have it."""
        leaves = [self._leaves[name] for name in names if name in self._leaves]
        return any(leaf.used or leaf.mutated for leaf in leaves)

    def _dead_code_row(self, slot: Slot, names: tuple[str, ...]) -> LedgerRow:
        """Return the row of a weight that only dead code reads.

        It is a slot because inductor keeps unused operands of loops and branches. A source may lack
        it, so the plan keeps a value for it.
        """
        self.pinned[slot.name] = self._tensors[slot.name].detach().clone()
        return LedgerRow(
            slot=slot,
            state=SlotState.PINNED,
            value=PinnedRef(name=slot.name),
            sources=names,
            reason="only dead code reads it: a source may have it",
        )

    def _constant_row(self, slot: Slot) -> LedgerRow:
        """Return the row of a constant that inductor has named.

        Only its value shows which leaf of the program it is.

        Raises:
            NotRefittableError: It may be a view of weights, or another leaf of equal value.
        """
        live = self._engine.read(slot.name)
        # Inductor names weights and state after the program, so this can only be another leaf.
        same = [
            leaf.fqn
            for leaf in self._facts.leaves
            if not (leaf.persistent or leaf.mutated) and same_bits(live, self._tensors[leaf.fqn])
        ]
        from_weights = [fqn for fqn in same if self._is_from_weights(fqn)]
        if from_weights and len(same) == 1:
            return self._leaf_row(slot, self._leaves[same[0]])
        if from_weights:
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

    def _is_from_weights(self, fqn: str) -> bool:
        """Return whether a leaf is a view of weights, or another name of one."""
        value = self._draft.leaf(fqn)
        return not isinstance(value, SourceRef) or self._leaves[value.fqn].persistent

    # -- checks -------------------------------------------------------------------------------

    def _differing_slots(self) -> Iterator[Problem]:
        """Yield slots whose dtype or shape is not that of the leaf of their name."""
        for row in self.rows:
            leaf, slot = self._leaves.get(row.slot.name), row.slot
            if leaf and (leaf.dtype, leaf.shape) != (slot.dtype, slot.shape):
                found = f"{leaf.dtype} {leaf.shape}"
                yield Problem(slot.name, "differs", found, f"{slot.dtype} {slot.shape}")

    def _unknown_slots(self) -> Iterator[Problem]:
        """Yield slots whose names are neither leaves of this program nor made by inductor."""
        # Inductor's names for constants that the graph creates or lifts.
        for row in self.rows:
            name = row.slot.name
            made_by_inductor = name.startswith(("_tensor_constant", "lifted_"))
            if name not in self._leaves and not made_by_inductor and not row.sources:
                yield Problem(name, "in the engine, not in the program")

    def _check_reachable(self) -> None:
        """Check that every weight that the graph reads is in a slot.

        Raises:
            NotRefittableError: Weights are part of the engine's code, which no refit can change.
        """
        # One name of a tied weight is enough: all of them are the same slot.
        reached = self._engine.slots.keys() | {name for row in self.rows for name in row.sources}
        problems = [
            Problem(leaf.fqn, "folded into the engine's code")
            for leaf in self._facts.leaves
            if _needs_slot(leaf) and not set(self._tied.get(leaf.fqn, (leaf.fqn,))) & reached
        ]
        if problems:
            raise NotRefittableError(
                "Weights of the program are not weights of the engine.",
                problems=problems,
                hint="Compile with refitkit.compile, or with always_keep_tensor_constants=True and "
                "freezing=False.",
            )

    def _check_single_elements(self) -> None:
        """Check that there are no weights that inductor may have folded without a trace.

        By default ``constant_fold_uniform_value`` in ``torch/_inductor/fx_passes/joint_graph.py``
        (2.14) puts the value of a weight with one element into the code. Its slot may still exist.

        Raises:
            NotRefittableError: There are some. The error lists them.
        """
        problems = [
            Problem(leaf.fqn, "one element: may be part of the engine's code")
            for leaf in self._facts.leaves
            if leaf.used and leaf.kind is not LeafKind.CONSTANT and prod(leaf.shape) == 1
        ]
        if problems:
            raise NotRefittableError(
                "AOTInductor may have folded weights into code: it does unless "
                "joint_graph_constant_folding=False, and the engine does not show it.",
                problems=problems,
                hint="Compile the program with refitkit.compile, which sets that option.",
            )


def _needs_slot(leaf: Leaf) -> bool:
    """Return whether a leaf is a weight that the graph reads."""
    # Inductor drops tensors without elements.
    return leaf.used and leaf.persistent and 0 not in leaf.shape
