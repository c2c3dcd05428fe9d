"""Record functions with a tape, and compute the plans that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import UnmappedSlotError
from refitkit.model import Fingerprint, Leaf, LeafKind, PlanData, fingerprint_of_slots
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import RefitPlan, Tape, write
from refitkit.recipe.store import index_of
from tests.fakes import BACKEND, slot_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from refitkit.model import Guard, LedgerRow

Tensors = dict[str, torch.Tensor]
REFUSED = "refused"


@dataclass(frozen=True)
class Recording:
    """The recording of one function.

    Attributes:
        tape: Tape that recorded the function.
        outputs: Results of the function, by name.
        plan: Plan of the recording, stored and loaded again.
    """

    tape: Tape
    outputs: Tensors
    plan: RefitPlan

    @property
    def rows(self) -> dict[str, LedgerRow]:
        return {row.slot.name: row for row in self.plan.ledger}

    @property
    def guards(self) -> tuple[Guard, ...]:
        return self.plan.data.guards

    @property
    def states(self) -> dict[str, str]:
        return {name: str(row.state) for name, row in self.rows.items()}

    @property
    def state(self) -> str:
        """State of the only slot."""
        (found,) = self.states.values()
        return found

    @property
    def ops(self) -> list[str]:
        """Names of the ops of all calls, without the namespace."""
        return [call.op.removeprefix("aten.") for call in self.plan.data.calls]

    def values(self, weights: Mapping[str, torch.Tensor]) -> Tensors | str:
        """Return the values of all slots for other weights, or ``REFUSED``."""
        try:
            return self.plan.materialize(dict(weights))["model"]
        except UnmappedSlotError:
            return REFUSED


def named(result: Any) -> Tensors:
    """Return the tensors in a function's result, by name."""
    if isinstance(result, torch.Tensor):
        return {"y": result}
    if isinstance(result, dict):
        return result
    return {f"y{number}": one for number, one in enumerate(result)}


def leaf_of(fqn: str, tensor: torch.Tensor, kind: LeafKind = LeafKind.PARAMETER) -> Leaf:
    return Leaf(fqn=fqn, kind=kind, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def record(
    function: Callable[..., Any],
    leaves: Mapping[str, torch.Tensor],
    *,
    ties: Sequence[tuple[str, ...]] = (),
    kinds: Mapping[str, LeafKind] | None = None,
) -> Recording:
    """Record a function of leaves, and return a plan in which each result is a slot."""
    tape = Tape(leaves)
    with tape, torch.no_grad():
        outputs = named(function(**leaves))
        origins = {name: tape.origin_of(value) for name, value in outputs.items()}
    return planned(tape, outputs, origins, leaves, ties=ties, kinds=kinds)


def planned(
    tape: Tape,
    outputs: Tensors,
    origins: Mapping[str, Any],
    leaves: Mapping[str, torch.Tensor],
    *,
    ties: Sequence[tuple[str, ...]] = (),
    kinds: Mapping[str, LeafKind] | None = None,
) -> Recording:
    """Return a plan of a recording that has ended."""
    facts = [
        leaf_of(name, value, (kinds or {}).get(name, LeafKind.PARAMETER))
        for name, value in leaves.items()
    ]
    slots = [(slot_for(name, value), origins[name], value) for name, value in outputs.items()]
    found = write(tape, slots, facts, ties, leaves)
    pinned = {
        **found.literals,
        **{leaf.fqn: leaves[leaf.fqn].clone() for leaf in facts if not leaf.persistent},
    }
    data = PlanData(
        backend=BACKEND,
        leaves=tuple(facts),
        ties=tuple(ties),
        ledger=found.rows,
        calls=found.calls,
        guards=found.guards,
        pinned=index_of(pinned),
        fingerprint=Fingerprint(
            graph="0" * 64, slots=fingerprint_of_slots(row.slot for row in found.rows)
        ),
    )
    return Recording(tape, outputs, RefitPlan.from_bytes(RefitPlan(data, pinned).to_bytes()))


def truth(function: Callable[..., Any], weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Return copies of a function's results for some weights."""
    with torch.no_grad():
        return {name: value.clone() for name, value in named(function(**weights)).items()}


def agree(found: Tensors | str, wanted: Tensors) -> bool:
    """Return whether all slots have the wanted bits."""
    return isinstance(found, dict) and all(
        same_bits(found[name].reshape(wanted[name].shape), wanted[name]) for name in wanted
    )


def like(leaves: Mapping[str, torch.Tensor], seed: int = 1) -> Tensors:
    """Return other weights with the same shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _redrawn(value, generator) for name, value in leaves.items()}


def _redrawn(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) > 0.5
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return torch.randint(0, 3, value.shape, generator=generator).to(value.dtype)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)
