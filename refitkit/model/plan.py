"""The plan: for every slot of every engine, how its value follows from the model's own state.

This is also the schema of ``manifest.json`` inside a plan file (see :mod:`refitkit.recipe.store`).
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable


FORMAT: Literal["refitplan/2"] = "refitplan/2"
"""Name and version of the format. Version 1, which had no calls and no guards, is read, too."""


class LeafKind(StrEnum):
    """What a leaf of a program is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    NON_PERSISTENT_BUFFER = "non-persistent-buffer"
    CONSTANT = "constant"


class Overlap(Frozen):
    """Where one leaf lies in the memory of another one, the whole, which has no gaps.

    The elements of the whole, with its dimensions permuted to ``order``, lie one after another. The
    part is ``torch.as_strided(those elements, shape of the part, stride, offset)``.

    Attributes:
        fqn: The other leaf.
        order: Dimensions of the whole as they lie in memory, slowest first.
        stride: Strides of the part, in elements of the part's dtype.
        offset: First element of the part, counted in elements of the part's dtype.
    """

    fqn: str
    order: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    offset: Dim


class Leaf(Frozen):
    """One tensor that a program reads: a parameter, a buffer or a lifted constant.

    A leaf can share memory with another one. ``load_state_dict`` writes in place, so the model's
    own leaf follows; ``view`` and ``parts`` let an engine's slot follow in the same way.

    Attributes:
        fqn: Fully qualified name, as in the model's state_dict.
        kind: Parameter, persistent or non-persistent buffer, or constant.
        dtype: torch's name without the ``torch.``.
        shape: Sizes of all dimensions.
        device: Where the program keeps it.
        used: Whether its value can change an output or have a side effect. False for
            ``num_batches_tracked``, and for weights that only dead code reads.
        mutated: Whether the graph changes it in place.
        view: The parameter or buffer that it is a view of; None for a leaf of its own.
        parts: Parameters and buffers that are views of it, where no state_dict holds it itself.
    """

    fqn: str
    kind: LeafKind
    dtype: DtypeName
    shape: tuple[Dim, ...]
    device: str = "cpu"
    used: bool = True
    mutated: bool = False
    view: Overlap | None = None
    parts: tuple[Overlap, ...] = ()

    @property
    def persistent(self) -> bool:
        """Whether the model's state_dict holds it."""
        return self.kind in {LeafKind.PARAMETER, LeafKind.BUFFER}

    @property
    def kept(self) -> bool:
        """Whether a plan keeps its value: no state_dict holds all of it."""
        return not self.persistent and self.view is None

    @property
    def derived(self) -> bool:
        """Whether its value follows from other leaves."""
        return self.view is not None or bool(self.parts)

    @property
    def bases(self) -> tuple[str, ...]:
        """FQNs of the leaves that its value follows from."""
        return (self.view.fqn,) if self.view else tuple(part.fqn for part in self.parts)


class SlotState(StrEnum):
    """Where the value of a slot comes from."""

    RECIPE = "recipe"
    PINNED = "pinned"
    FROZEN = "frozen"
    UNMAPPED = "unmapped"


class LedgerRow(Frozen):
    """One slot and how it is served.

    Attributes:
        slot: The slot, as the engine describes it.
        state: ``recipe`` (computed from ``sources``), ``pinned`` (its value is in the plan, a
            source that has one of ``sources`` overrides it), ``frozen`` (a literal of the graph:
            never changes) or ``unmapped`` (nobody knows: stops a refit).
        value: The recipe; None where the state is ``unmapped``, or ``frozen`` and nobody needs it.
        sources: FQNs that the value follows from; of those that are one tensor (tied weights) all.
        reason: Why the slot is frozen, pinned or unmapped.
    """

    slot: Slot
    state: SlotState
    value: Value | None = None
    sources: tuple[str, ...] = ()
    reason: str = ""


class PinnedTensor(Frozen):
    """Index entry of one tensor that the plan keeps.

    Attributes:
        dtype: torch's name without the ``torch.``.
        shape: Sizes of all dimensions.
        sha256: Of its bytes, C-contiguous, little endian.
    """

    dtype: DtypeName
    shape: tuple[Dim, ...]
    sha256: str


class Fingerprint(Frozen):
    """What a plan belongs to. It never depends on values of weights.

    Attributes:
        graph: sha256 over ops, FQNs, shapes and dtypes of the program.
        slots: sha256 over all slots, sorted; see :func:`fingerprint_of_slots`.
        settings: Compilation settings, as text by name.
        versions: Versions of what made the engine, by package.
        platform: Operating system, machine and device kind.
    """

    graph: str
    slots: str
    settings: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    platform: str = ""


class Need(Frozen):
    """Something of a plugin's without which a plan cannot be relied on.

    Attributes:
        kind: ``layer type``: its layers hold weights of the engines. ``strategy``: it gave values
            in the proof by trial.
        name: Its name.
        plugin: Name of the plugin that offers it.
        distribution: What brings the plugin, as ``pip install`` takes it; empty where nothing does.
        version: Version of that.
        slots: ``engine/slot`` of the slots that a strategy served though the plan keeps a value for
            them.
    """

    kind: Literal["layer type", "strategy"]
    name: str
    plugin: str
    distribution: str = ""
    version: str = ""
    slots: tuple[str, ...] = ()


class PlanData(Frozen):
    """A whole plan: the ledgers of all engines of one model.

    Attributes:
        format: Always :data:`FORMAT`.
        backend: Name of the backend that made the engines.
        leaves: Everything that the program reads.
        ties: Classes of FQNs that are one tensor.
        ledger: One row for every slot of every engine.
        calls: What recipes compute; each call refers to earlier ones only.
        guards: Values that must be what they were when the plan was made.
        pinned: Index of the tensors that the plan keeps.
        fingerprint: What the plan belongs to.
        unreached: Weights that the program uses and that reach no slot, by FQN, each with the
            reason why a refit need not change anything for them.
        needs: What plugins have to offer where the plan is used.
    """

    format: Literal["refitplan/1", "refitplan/2"] = FORMAT
    backend: str
    leaves: tuple[Leaf, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    ledger: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    pinned: dict[str, PinnedTensor] = Field(default_factory=dict)
    fingerprint: Fingerprint
    unreached: dict[str, str] = Field(default_factory=dict)
    needs: tuple[Need, ...] = ()


def fingerprint_of_slots(slots: Iterable[Slot]) -> str:
    """sha256 over engine, name, dtype and count of all slots, in sorted order."""
    rows = sorted((slot.engine, slot.name, slot.dtype, slot.count) for slot in slots)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


# MERGED recipe: Recipes: how slot values follow from the model's own state, as plain data.
#
# All recipes of a plan are one list of calls of aten ops, in an order in which each refers to
# earlier ones only; a slot refers to the result that is its value. So what two slots have in
# common is computed once. The list is part of ``manifest.json`` (see
# :mod:`refitkit.recipe.store`).


class SourceRef(Frozen):
    """A tensor of the weight source.

    Of what no state_dict holds the plan keeps a value, for sources that have none.
    """

    kind: Literal["source"] = "source"
    fqn: str


class PinnedRef(Frozen):
    """A tensor that is kept in the plan, under this name."""

    kind: Literal["pinned"] = "pinned"
    name: str


class CallRef(Frozen):
    """A result of an earlier call.

    Attributes:
        call: Position of the call in the plan's list.
        output: Which of its results.
    """

    kind: Literal["call"] = "call"
    call: Dim
    output: Dim = 0


Value = Annotated[SourceRef | PinnedRef | CallRef, Field(discriminator="kind")]
"""Where a tensor comes from."""


class TorchName(Frozen):
    """A constant of torch: ``torch.float32``, ``torch.strided``, ``torch.contiguous_format``.

    Devices do not occur: a recipe runs where its operands are, or where it was recorded.
    """

    kind: Literal["torch"] = "torch"
    name: str


class Number(Frozen):
    """A number that JSON has no way to write: ``inf``, ``-inf``, ``nan``, complex ones."""

    kind: Literal["number"] = "number"
    text: str


Atom = SourceRef | PinnedRef | CallRef | TorchName | Number | bool | int | float | str | None
"""One argument of a call that is no list."""

Argument = Atom | tuple[Atom, ...]
"""One argument of a call. Lists are not nested: no schema of aten has a list of lists."""


class Tensor(Frozen):
    """What a call gives: dtype and shape."""

    dtype: DtypeName
    shape: tuple[Dim, ...]


class OpCall(Frozen):
    """One call of an aten op. It changes nothing: an op that writes does so to a copy.

    Attributes:
        op: Name of the overload, as torch writes it: ``aten.mul.Tensor``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        results: Dtype and shape of each result; for an op that writes, of what it has written.
        device: Kind of device on which it was recorded: ``cpu``, ``cuda``.
    """

    op: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = Field(default_factory=dict)
    results: tuple[Tensor, ...]
    device: str = "cpu"


class Guard(Frozen):
    """A value that decided, while the plan was made, what the engines are or what a slot holds.

    Where it is another one now, recipes say nothing any more.

    Attributes:
        value: The value.
        sha256: Of its bytes, C-contiguous, little endian.
        dtype: Its dtype.
        shape: Its shape.
        shown: The value as text, where it is small.
        reason: How it was used.
    """

    value: Value
    sha256: str
    dtype: DtypeName
    shape: tuple[Dim, ...]
    shown: str = ""
    reason: str = ""
