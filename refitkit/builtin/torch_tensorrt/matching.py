"""Whether a program is cut into the parts that were compiled, and what differs if it is not."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from refitkit.errors import PlanMismatchError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.parts import Structure
    from refitkit.model import Slot


def check_structures(found: Sequence[Structure], wanted: Sequence[Structure]) -> None:
    """Compare the parts of a program with those that were compiled.

    Raises:
        PlanMismatchError: Names, ops, shapes, dtypes, inputs or outputs differ; lists what does.
    """
    problems = list(_differences({s.name: s for s in found}, {s.name: s for s in wanted}))
    if problems:
        raise PlanMismatchError(
            "The program is not the one that was compiled: it makes other engines.",
            problems=problems,
            hint="Export the same model with the same inputs and dynamic shapes; only its weights "
            "may differ.",
        )


def check_slots(found: Mapping[str, Sequence[Slot]], wanted: Mapping[str, Sequence[Slot]]) -> None:
    """Compare the slots of the parts of a program with those that were compiled.

    Raises:
        PlanMismatchError: There are others, or they have other dtypes or shapes; lists them.
    """
    here, there = _by_key(found), _by_key(wanted)
    problems = [
        Problem("/".join(key), "slot", _slot_text(here.get(key)), _slot_text(there.get(key)))
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if problems:
        raise PlanMismatchError("The networks have other weights.", problems=problems)


def _by_key(slots: Mapping[str, Sequence[Slot]]) -> dict[tuple[str, str], Slot]:
    return {(part, slot.name): slot for part, some in slots.items() for slot in some}


def _slot_text(slot: Slot | None) -> str:
    return "none" if slot is None else f"{slot.dtype} {slot.shape or f'of {slot.count} elements'}"


def _differences(found: dict[str, Structure], wanted: dict[str, Structure]) -> Iterator[Problem]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            yield Problem(name, "no part for this engine", wanted=_kind(wanted[name]))
        elif name not in wanted:
            yield Problem(name, "no engine for this part", _kind(found[name]))
        else:
            yield from _within(found[name], wanted[name])


def _kind(structure: Structure) -> str:
    return f"{'an engine' if structure.accelerated else 'torch'} with {len(structure.ops)} ops"


def _within(found: Structure, wanted: Structure) -> Iterator[Problem]:
    name = wanted.name
    if found.accelerated != wanted.accelerated:
        yield Problem(name, "runs elsewhere", _kind(found), _kind(wanted))
    for number, (mine, theirs) in enumerate(zip_longest(found.ops, wanted.ops, fillvalue="none")):
        if mine != theirs:
            yield Problem(name, f"op {number}", mine, theirs)
            return
    if found.inputs != wanted.inputs:
        yield Problem(name, "inputs", ", ".join(found.inputs), ", ".join(wanted.inputs))
    elif found.outputs != wanted.outputs:
        yield Problem(name, "outputs", str(found.outputs), str(wanted.outputs))
    elif found.graph != wanted.graph:
        yield Problem(name, "shapes, dtypes or arguments of its ops")
