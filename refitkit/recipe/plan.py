"""A plan in memory: read it, bind it to engines, compute slot values with it, store it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from refitkit.errors import (
    PlanMismatchError,
    Problem,
    SourceError,
    UnmappedSlotError,
    WeightMismatchError,
    raise_if_resource,
    resources,
)
from refitkit.model import (
    LedgerRow,
    PlanData,
    Slot,
    SlotState,
)
from refitkit.program.ambient import in_plain_state, plain, verb
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import SlotValue, WeightSource
from refitkit.recipe import store
from refitkit.recipe.archive import saying_why
from refitkit.recipe.sources import TensorMap
from refitkit.recipe.ties import broken_ties, broken_views
from refitkit.recipe.values import Values
from refitkit.replacing import replacing

if TYPE_CHECKING:
    import torch

    from refitkit.model import SlotKey

Opener: TypeAlias = Callable[[Any, "RefitPlan"], WeightSource]
"""Turns anything that a user calls weights into a source of what a plan's program reads."""

_DEVICES = frozenset({"cpu", "cuda"})
"""Kinds of devices with which platforms in fingerprints end."""


class RefitPlan:
    """How every slot of every engine of one model follows from the model's own state.

    Attributes:
        data: Everything but the pinned tensors, as a frozen value.
    """

    def __init__(
        self,
        data: PlanData,
        pinned: Mapping[str, torch.Tensor],
        opener: Opener | None = None,
    ) -> None:
        """Plans are made by ``refitkit.plan`` and ``refitkit.compile``, or loaded.

        Args:
            data: Ledger, leaves, ties and fingerprint.
            pinned: The tensors that the plan keeps.
            opener: What turns anything that a user calls weights into a source for a plan.
        """
        self.data = data
        self._pinned = dict(pinned)
        self._opener = opener
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._values = Values(data, self._pinned)
        self._fitted: tuple[str, tuple[Slot, ...]] | None = None

    @property
    def ledger(self) -> tuple[LedgerRow, ...]:
        """One row for every slot, always complete."""
        return self.data.ledger

    @property
    def backend(self) -> str:
        """Name of the backend that it is for."""
        return self.data.backend

    def pinned(self, name: str) -> torch.Tensor:
        """A tensor that the plan keeps. Not to be written to.

        Raises:
            KeyError: There is none of this name.
        """
        return self._pinned[name]

    def noting(self, **fields: Any) -> RefitPlan:
        """This plan with other fields of its data; tensors are shared."""
        return RefitPlan(self.data.model_copy(update=fields), self._pinned, self._opener)

    # -- values -----------------------------------------------------------------------------

    def values_of(
        self, rows: Sequence[LedgerRow], source: WeightSource
    ) -> dict[SlotKey, SlotValue | str]:
        """Values of rows from a source, not yet computed; or why there is none, by slot.

        What several of them need is computed once, if each is read once.
        """
        return self._values.of(rows, source)

    def value_of(self, row: LedgerRow, source: WeightSource) -> SlotValue | str:
        """The same of one row."""
        return self._values.of((row,), source)[row.slot.key]

    def lacking(self, row: LedgerRow, source: WeightSource) -> tuple[str, ...]:
        """Leaves that a row needs and that the source has under none of their names.

        Leaves that no state_dict holds are not among them: the plan keeps their values.
        """
        return self._values.lacking(row, source)

    def broken_guards(self, source: WeightSource) -> list[Problem]:
        """Guards whose value is another one with this source, or cannot be told."""
        return self._values.broken_guards(source)

    def iter_slots(
        self, weights: Any, device: str | None = None
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Values of all slots, one after another; of frozen ones where the plan has them.

        Identity values are the source's own tensors, not copies: read them only.

        Args:
            weights: A weight source, a state_dict, or anything the pipeline that made this plan
                can open.
            device: Where values shall be, as torch writes it; None: where they come to be.

        Yields:
            The slot and its value: dtype and shape of the slot, any layout.

        Raises:
            SourceError: The weights cannot be read.
            UnmappedSlotError: Slots have no value; lists all of them, before the first is given.
            WeightMismatchError: Values do not fit their slots, or names of one tensor have several;
                lists all of them, likewise.
        """
        for value in self._filling(weights):  # none is kept here while the next one is computed
            yield value.slot, in_plain_state(partial(_loaded, value, device))

    @plain
    def _filling(self, weights: Any) -> list[SlotValue]:
        """Values of all slots, not yet computed; see ``iter_slots`` for what is raised."""
        source = self._open(weights)
        rows = [row for row in self.ledger if row.state is not SlotState.FROZEN or row.value]
        values = self.values_of(rows, source)
        problems = [
            Problem(r.slot.name, "no value", hint=v)
            for r in rows
            if isinstance(v := values[r.slot.key], str)
        ]
        problems += self.broken_guards(source) if not problems else []
        if problems:
            raise UnmappedSlotError(
                f"{source.description} does not fill all slots.", problems=problems
            )
        wanted = [value for value in values.values() if isinstance(value, SlotValue)]
        names = self._values.read_of(wanted, source)
        problems = list(self._misfits(names, source)) or [
            *broken_ties(self.data.ties, names, source),
            *broken_views(self._leaves, source.names(), source),
        ]
        if problems:
            message = f"{source.description} does not fit the plan."
            raise WeightMismatchError(message, problems=problems)
        return wanted

    def materialize(
        self, weights: Any, device: str | None = None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """All values at once: ``{engine: {slot: tensor}}``; see ``iter_slots``."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        for slot, tensor in self.iter_slots(weights, device):
            result.setdefault(slot.engine, {})[slot.name] = tensor
        return result

    def _misfits(self, names: Iterable[str], source: WeightSource) -> Iterator[Problem]:
        """Entries of the source that are not what the program had under these names."""
        if isinstance(source, TensorMap):
            names = source.doubtful(names, self._wanted)
        for fqn in names:
            info, leaf = source.info(fqn), self._leaves.get(fqn)
            found = f"{info.dtype} {info.shape}"
            if info.unusable:
                yield Problem(fqn, "unusable", info.unusable)
            elif leaf and (info.dtype, info.shape) != (leaf.dtype, leaf.shape):
                yield Problem(fqn, "value", found, f"{leaf.dtype} {leaf.shape}")

    @cached_property
    def _wanted(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What each leaf has to be."""
        return {leaf.fqn: (dtype_of(leaf.dtype), leaf.shape) for leaf in self.data.leaves}

    def _open(self, weights: Any) -> WeightSource:
        if self._opener is not None:
            return self._opener(weights, self)
        if isinstance(weights, WeightSource):
            return weights
        if isinstance(weights, Mapping):
            return TensorMap(weights)
        raise SourceError(
            f"A plan on its own cannot open a {type(weights).__name__}.",
            hint="Pass a state_dict, or open it first: refitkit.Pipeline().open_weights(weights).",
        )

    # -- binding ----------------------------------------------------------------------------

    def check_engines(self, backend: str, slots: Iterable[Slot]) -> None:
        """Check that this plan is for exactly these engines.

        Raises:
            PlanMismatchError: Names, dtypes or counts of slots differ; lists every difference.
        """
        engines = backend, tuple(slots)
        if engines == self._fitted:  # mostly the very objects of the refit before
            return
        problems = list(self._differences(backend, {slot.key: slot for slot in engines[1]}))
        if problems:
            raise PlanMismatchError(
                "The plan was made for another engine.",
                problems=problems,
                hint="Plan from the program that was compiled: refitkit.plan(program, target=...).",
            )
        self._fitted = engines

    def _differences(self, backend: str, slots: dict[tuple[str, str], Slot]) -> Iterator[Problem]:
        if backend != self.backend:
            yield Problem("backend", "differs", self.backend, backend)
        yield from self._another_device(slots.values())
        mine = {row.slot.key: row.slot for row in self.ledger}
        for key in sorted(mine.keys() | slots.keys()):
            name = "/".join(key)
            if key not in slots:
                yield Problem(name, "in the plan, not in the engine")
            elif key not in mine:
                yield Problem(name, "in the engine, not in the plan")
            else:
                found, wanted = mine[key], slots[key]
                if (found.dtype, found.count) != (wanted.dtype, wanted.count):
                    yield Problem(name, "differs", _short(found), _short(wanted))

    def _another_device(self, slots: Iterable[Slot]) -> Iterator[Problem]:
        """Whether it was recorded on another kind of device than the engines are on.

        Names, dtypes and counts can then be the same and values not: of a Llama that was planned on
        a CPU, all 258 slots had the names of the CUDA engine's, and 48 had other bits.
        """
        recorded = self.data.fingerprint.platform.rpartition(" ")[2]
        there = {slot.device.partition(":")[0] for slot in slots}
        if recorded in _DEVICES and there and recorded not in there:
            hint = "slots of one name may hold other values there"
            yield Problem("device", "differs", recorded, ", ".join(sorted(there)), hint)

    # -- storage ----------------------------------------------------------------------------

    @plain
    def to_bytes(self) -> bytes:
        """The bytes of a plan file."""
        return store.encode(self.data, self._pinned)

    @classmethod
    @verb("A plan cannot be read")
    def from_bytes(
        cls,
        content: bytes,
        what: str = "This plan",
        opener: Opener | None = None,
    ) -> RefitPlan:
        """A plan from the bytes of a plan file.

        Raises:
            PlanMismatchError: It is not a plan, is damaged or of another version.
        """
        data, pinned = store.decode(content, what)
        return cls(data, pinned, opener)

    @resources("A plan cannot be written")
    def save(self, path: str | Path) -> None:
        """Write a plan file: beside ``path``, then renamed.

        Raises:
            RefitError: It cannot be written there; says why.
        """
        path = Path(path)
        with saying_why(path), replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    @resources("A plan cannot be read")
    def load(cls, path: str | Path) -> RefitPlan:
        """Read a plan file. Nothing in it is run.

        Raises:
            PlanMismatchError: It is missing, not a plan, damaged or of another version.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as exc:
            raise_if_resource(exc, f"The plan {str(path)!r} cannot be read")
            raise PlanMismatchError(f"The plan {str(path)!r} cannot be read: {exc}.") from exc
        return cls.from_bytes(content, f"{str(path)!r}")


def _loaded(value: SlotValue, device: str | None) -> torch.Tensor:
    tensor = value.load()
    return tensor if device is None else tensor.to(device)


def _short(slot: Slot) -> str:
    return f"{slot.dtype} x {slot.count}"
