"""Plans: how the value of every slot of every engine follows from the state of the model.

:class:`PlanData` is the whole. It refers to leaves (tensors of the program), to a ledger (one row
for each slot), and to recipes (calls of aten ops). The models are also the schema of
``manifest.json`` inside a plan file; see :mod:`refitkit.recipe.store`.

All recipes of a plan are one list of calls, each after the calls whose results it uses. A slot
refers to the result that is its value, so work that slots share is listed and computed once.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue

from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable


FORMAT: Literal["refitplan/2"] = "refitplan/2"
"""Name and version of the format. Version 1 had no calls and no guards; it can still be read."""


# -- leaves of a program ----------------------------------------------------------------------


class LeafKind(StrEnum):
    """The kind of a leaf of a program."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    NON_PERSISTENT_BUFFER = "non-persistent-buffer"
    CONSTANT = "constant"


class Overlap(Frozen):
    """The position of one leaf, the part, in the memory of another one, the whole.

    The whole has no gaps: its elements are contiguous once its dimensions are permuted to
    ``order``. The part is ``torch.as_strided(these elements, shape of the part, stride, offset)``.

    Attributes:
        fqn: FQN of the other leaf: the whole in ``Leaf.view``, the part in ``Leaf.parts``.
        order: Dimensions of the whole in memory order, slowest first.
        stride: Strides of the part, in elements of the part's dtype.
        offset: Index of the first element of the part, in elements of the part's dtype.
    """

    fqn: str
    order: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    offset: Dim


class Leaf(Frozen):
    """One tensor that a program reads: a parameter, a buffer or a lifted constant.

    A leaf can share memory with other leaves. In the eager model ``load_state_dict`` then changes
    all of them. ``view`` and ``parts`` make the slots of an engine follow in the same way.

    Attributes:
        fqn: Fully qualified name, as in the state_dict of the model.
        kind: Parameter, persistent or non-persistent buffer, or constant.
        dtype: Name of the dtype in torch without ``torch.``.
        shape: Sizes of all dimensions.
        device: Device of the tensor in the program.
        used: Whether the value can change an output or a side effect. False for
            ``num_batches_tracked``, and for weights that only dead code reads.
        mutated: Whether the graph writes to the tensor in place.
        view: Parameter or buffer that this leaf is a view of; None if it is not a view.
        parts: Parameters and buffers that are views of this leaf, if no state_dict contains it.
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
        """Whether the state_dict of the model contains the leaf."""
        return self.kind in {LeafKind.PARAMETER, LeafKind.BUFFER}

    @property
    def kept(self) -> bool:
        """Whether a plan stores the value, because no state_dict contains all of it."""
        return not self.persistent and self.view is None

    @property
    def derived(self) -> bool:
        """Whether the value follows from other leaves."""
        return self.view is not None or bool(self.parts)

    @property
    def bases(self) -> tuple[str, ...]:
        """FQNs of the leaves that the value follows from; empty if it is not derived."""
        return (self.view.fqn,) if self.view else tuple(part.fqn for part in self.parts)


# -- the plan ---------------------------------------------------------------------------------


class SlotState(StrEnum):
    """Where the value of a slot comes from; see ``LedgerRow.state``."""

    RECIPE = "recipe"
    PINNED = "pinned"
    FROZEN = "frozen"
    UNMAPPED = "unmapped"


class LedgerRow(Frozen):
    """One slot and the origin of its value.

    Attributes:
        slot: Slot, as the engine describes it.
        state: ``recipe``: computed from ``sources``. ``pinned``: the plan stores the value, and a
            source that has one of ``sources`` overrides it. ``frozen``: a literal of the graph,
            which never changes. ``unmapped``: unknown, which stops a refit.
        value: Recipe of the value. None if the state is ``unmapped``, or if it is ``frozen`` and
            no refit needs the value.
        sources: FQNs that the value follows from, with all names of tied weights.
        reason: Why the slot is frozen, pinned or unmapped.
        unseen: Whether the value has numbers that were made outside of torch, so that they may be
            values of a weight, and no proof by trial has shown that they are not.
    """

    slot: Slot
    state: SlotState
    value: Value | None = None
    sources: tuple[str, ...] = ()
    reason: str = ""
    unseen: bool = False


class PinnedTensor(Frozen):
    """The index entry of one tensor that the plan stores.

    Attributes:
        dtype: Name of the dtype in torch without ``torch.``.
        shape: Sizes of all dimensions.
        sha256: Digest of the bytes of the tensor, C-contiguous, little endian, as hexadecimal text.
    """

    dtype: DtypeName
    shape: tuple[Dim, ...]
    sha256: str


class Fingerprint(Frozen):
    """The identity of the program and the engines of a plan, independent of values of weights.

    Attributes:
        graph: sha256 over ops, FQNs, shapes and dtypes of the program.
        slots: sha256 over all slots; see :func:`fingerprint_of_slots`.
        settings: Compilation settings, as text by name.
        versions: Versions of the software that made the engines, by package.
        platform: Operating system, machine and device kind.
    """

    graph: str
    slots: str
    settings: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    platform: str = ""


class Need(Frozen):
    """An object of a plugin that a plan depends on.

    Attributes:
        kind: ``layer type``: layers of this type have weights of the engines. ``strategy``: it
            returned values in the proof by trial. ``transform``: it attached data to the plan.
        name: Name of the layer type, strategy or transform.
        plugin: Name of the plugin that offers it.
        distribution: Distribution of the plugin, as ``pip install`` takes it; empty if there is
            none.
        version: Version of the distribution.
        slots: ``engine/slot`` of slots that got the value of a strategy, although the plan stores a
            value for them.
    """

    kind: Literal["layer type", "strategy", "transform"]
    name: str
    plugin: str
    distribution: str = ""
    version: str = ""
    slots: tuple[str, ...] = ()


class PlanData(Frozen):
    """A plan for all engines of one module.

    Attributes:
        format: Name and version of the format; new plans have :data:`FORMAT`.
        backend: Name of the backend that compiled the engines.
        leaves: All tensors that the program reads.
        ties: Classes of FQNs that are one tensor.
        ledger: One row for every slot of every engine.
        calls: Calls of all recipes. A call refers to earlier ones only.
        guards: Values that must be equal to those at planning time.
        pinned: Index of the tensors that the plan stores, by name.
        fingerprint: Identity of the program and the engines.
        unreached: Reasons by FQN, for weights that the program uses and that reach no slot: why a
            refit does not have to change anything for them.
        needs: Objects of plugins that the plan depends on.
        attached: Data of transforms, by the transform's name.
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
    attached: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def unseen(self) -> list[str]:
        """``engine/slot`` of the slots with ``LedgerRow.unseen``."""
        return ["/".join(row.slot.key) for row in self.ledger if row.unseen]


def fingerprint_of_slots(slots: Iterable[Slot]) -> str:
    """Return the sha256 over engine, name, dtype and count of all slots, sorted."""
    # without shape and device: an engine may not know the shape, and a module can move
    rows = sorted((slot.engine, slot.name, slot.dtype, slot.count) for slot in slots)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


# -- recipes ----------------------------------------------------------------------------------


class SourceRef(Frozen):
    """A reference to a tensor of the weight source.

    For a leaf that no state_dict contains, the plan stores a value, which is used if the source
    lacks the leaf.
    """

    kind: Literal["source"] = "source"
    fqn: str


class PinnedRef(Frozen):
    """A reference to a tensor that the plan stores, by its name in the plan."""

    kind: Literal["pinned"] = "pinned"
    name: str


class CallRef(Frozen):
    """A reference to a result of an earlier call.

    Attributes:
        call: Index of the call in ``PlanData.calls``.
        output: Index of the result.
    """

    kind: Literal["call"] = "call"
    call: Dim
    output: Dim = 0


Value = Annotated[SourceRef | PinnedRef | CallRef, Field(discriminator="kind")]
"""The origin of a tensor."""


class TorchName(Frozen):
    """A constant of torch: ``torch.float32``, ``torch.strided``, ``torch.contiguous_format``.

    It is never a device. A recipe runs on the device of its operands, or where it was recorded.
    """

    kind: Literal["torch"] = "torch"
    name: str


class Number(Frozen):
    """A number that JSON cannot represent: ``inf``, ``-inf``, ``nan`` or a complex number."""

    kind: Literal["number"] = "number"
    text: str


Atom = SourceRef | PinnedRef | CallRef | TorchName | Number | bool | int | float | str | None
"""One argument of a call, except for lists."""

Argument = Atom | tuple[Atom, ...]
"""One argument of a call. Lists are not nested, because no schema of aten has a list of lists."""


class Tensor(Frozen):
    """Dtype and shape of one result of a call."""

    dtype: DtypeName
    shape: tuple[Dim, ...]


class OpCall(Frozen):
    """One call of an aten op, without side effects: an op that writes in place gets a copy.

    Attributes:
        op: Name of the overload, as torch writes it: ``aten.mul.Tensor``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        results: Dtype and shape of each result. An op that writes in place has the written tensors
            as results.
        device: Device kind of the recording: ``cpu``, ``cuda``.
    """

    op: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = Field(default_factory=dict)
    results: tuple[Tensor, ...]
    device: str = "cpu"


class Guard(Frozen):
    """A value that decided at planning time which engines are built or which values slots get.

    If the new weights give another value, the recipes of the plan do not hold.

    Attributes:
        value: Reference to the value.
        sha256: Digest of its bytes at planning time, C-contiguous, little endian.
        dtype: Dtype of the value.
        shape: Shape of the value.
        shown: Value at planning time as text, if it is small.
        reason: How the value was used.
    """

    value: Value
    sha256: str
    dtype: DtypeName
    shape: tuple[Dim, ...]
    shown: str = ""
    reason: str = ""
