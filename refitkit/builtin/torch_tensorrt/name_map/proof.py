"""Entries of the cached map against the program; see the package for what a proof is."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refitkit.builtin.torch_tensorrt.name_map.uses import Use, use_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.name_map.entries import Entry
    from refitkit.builtin.torch_tensorrt.name_map.operands import Operand
    from refitkit.model import Leaf, PlanData, Slot

Kind = tuple[Use, str, int]
"""Use, dtype and count: what one operand and one slot must have for themselves alone."""


@dataclass(frozen=True)
class Proved:
    """Where the value of a slot comes from, beyond doubt.

    Attributes:
        operand: The operand that the slot is.
        leaves: What it is made of, by role.
    """

    operand: Operand
    leaves: Mapping[str, Leaf]


class Prover:
    """Holds what the program and the plan say; asked for one slot after another."""

    def __init__(self, operands: Sequence[Operand], plan: PlanData) -> None:
        """Sort the operands and slots by what tells them apart.

        Args:
            operands: All operands of the program that was compiled.
            plan: The plan, whose ledger has all slots of all engines.
        """
        self._operands: dict[Kind, list[Operand]] = defaultdict(list)
        for operand in operands:
            self._operands[operand.use, operand.dtype, operand.count].append(operand)
        self._slots = _count_kinds(row.slot for row in plan.ledger)
        self._leaves = {leaf.fqn: leaf for leaf in plan.leaves}
        self._twins = {name: frozenset(tie) for tie in plan.ties for name in tie}

    def prove(self, slot: Slot, entry: Entry) -> Proved | str:
        """The proof for one entry; or what is missing."""
        use = use_of(slot.name)
        if use is None:
            return "its name does not tell which operand it is unchanged"
        operand = self._only_operand(use, slot)
        if isinstance(operand, str):
            return operand
        if operand.fqns is None:
            return f"{use} is computed, not a parameter itself"
        leaves = self._constant_leaves(operand.fqns, slot)
        if isinstance(leaves, str):
            return leaves
        wrong = self._contradiction(entry, operand.fqns, slot)
        return wrong or Proved(operand, leaves)

    def _only_operand(self, use: Use, slot: Slot) -> Operand | str:
        kind = (use, slot.dtype, slot.count)
        found = self._operands.get(kind, [])
        what = f"{slot.count} elements of {slot.dtype}"
        if not found:
            return f"the program has nothing of {what} as {use}"
        if any((one.fqns, one.eps) != (found[0].fqns, found[0].eps) for one in found):
            return f"the program has {len(found)} candidates of {what} for {use}"
        if self._slots[kind] > len(found):
            return f"{self._slots[kind]} slots of {what} could be {use}"
        if any(_is_inside(use, kind, other) for other in self._operands):
            return f"modules inside have candidates of {what} too for {use}"
        return found[0]

    def _constant_leaves(self, fqns: Mapping[str, str], slot: Slot) -> dict[str, Leaf] | str:
        leaves = {role: self._leaves[fqn] for role, fqn in fqns.items() if fqn in self._leaves}
        for role, fqn in fqns.items():
            leaf = leaves.get(role)
            if leaf is None:
                return f"the plan does not know {fqn!r}"
            if leaf.mutated:
                return f"the program changes {fqn!r}"
            if leaf.dtype != slot.dtype:  # one of the four of a batch norm
                return f"{fqn!r} is {leaf.dtype}{list(leaf.shape)}, unlike the slot"
        return leaves

    def _contradiction(self, entry: Entry, fqns: Mapping[str, str], slot: Slot) -> str:
        if entry.dtype != slot.dtype:
            return f"the cached map has it as {entry.dtype}, the engine as {slot.dtype}"
        for fqn in fqns.values():
            if not self._twins.get(fqn, frozenset((fqn,))) & set(entry.fqns):
                claimed = ", ".join(map(repr, entry.fqns))
                return f"the cached map says {claimed}, the program {fqn!r}"
        return ""


def _count_kinds(slots: Iterable[Slot]) -> Counter[Kind]:
    kinds: Counter[Kind] = Counter()
    for slot in slots:
        use = use_of(slot.name)
        if use is not None:
            kinds[use, slot.dtype, slot.count] += 1
    return kinds


def _is_inside(use: Use, kind: Kind, other: Kind) -> bool:
    """Whether another operand could have got this name: alike, and in a module inside."""
    inner = other[0]
    alike = (inner.op, inner.role, *other[1:]) == (use.op, use.role, *kind[1:])
    prefix = f"{use.module}." if use.module else ""
    return alike and inner.module != use.module and inner.module.startswith(prefix)
