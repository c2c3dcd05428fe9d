"""A plan in memory: read it, bind it to engines, compute slot values with it, store it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.errors import (
    PlanMismatchError,
    Problem,
    SourceError,
    UnmappedSlotError,
    WeightMismatchError,
)
from refitkit.model import LedgerRow, PinnedRef, PlanData, Slot, SlotState, SourceRef
from refitkit.protocols import SlotValue, WeightSource
from refitkit.recipe import store
from refitkit.recipe.archive import replacing
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    import torch

STRATEGY = "recipe"
"""Name of the strategy that serves slots from a plan."""


class RefitPlan:
    """How every slot of every engine of one model follows from the model's own state.

    Attributes:
        data: Everything but the pinned tensors, as a frozen value.
    """

    def __init__(
        self,
        data: PlanData,
        pinned: Mapping[str, torch.Tensor],
        opener: Callable[[Any], WeightSource] | None = None,
    ) -> None:
        """Plans are made by ``refitkit.plan`` and ``refitkit.compile``, or loaded.

        Args:
            data: Ledger, leaves, ties and fingerprint.
            pinned: The tensors that the plan keeps.
            opener: What turns anything that a user calls weights into a source.
        """
        self.data = data
        self._pinned = dict(pinned)
        self._opener = opener
        self._twins = {name: tie for tie in data.ties for name in tie}

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

    # -- values -----------------------------------------------------------------------------

    def value_of(self, row: LedgerRow, source: WeightSource) -> SlotValue | str:
        """The value of one row from a source, not yet computed; or why there is none."""
        if row.state in {SlotState.UNMAPPED, SlotState.FROZEN}:
            return row.reason or f"its state is {row.state}"
        for fqn in self._candidates(row):
            if fqn in source.names():
                load = _Load(source, fqn)
                return SlotValue(row.slot, STRATEGY, (fqn,), load, identity=True)
        if isinstance(row.value, PinnedRef):
            tensor = self._pinned[row.value.name]
            return SlotValue(row.slot, STRATEGY, (), lambda: tensor, identity=True, pinned=True)
        return f"the source has no {' or '.join(map(repr, row.sources))}"

    def iter_slots(self, weights: Any) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Values of all slots but the frozen ones, one after another.

        Identity values are the source's own tensors, not copies: read them only.

        Args:
            weights: A weight source, a state_dict, or anything the pipeline that made this plan
                can open.

        Yields:
            The slot and its value: dtype and shape of the slot, any layout.

        Raises:
            SourceError: The weights cannot be read.
            UnmappedSlotError: Slots have no value; lists all of them, before the first is given.
            WeightMismatchError: Values do not fit their slots; lists all of them, likewise.
        """
        source = self._open(weights)
        rows = [row for row in self.ledger if row.state is not SlotState.FROZEN]
        values = [(row, self.value_of(row, source)) for row in rows]
        problems = [
            Problem(r.slot.name, "no value", hint=v) for r, v in values if isinstance(v, str)
        ]
        if problems:
            raise UnmappedSlotError(
                f"{source.description} does not fill all slots.", problems=problems
            )
        wanted = [value for _, value in values if isinstance(value, SlotValue)]
        misfits = list(_misfits(wanted, source))
        if misfits:
            message = f"{source.description} does not fit the plan."
            raise WeightMismatchError(message, problems=misfits)
        for value in wanted:
            yield value.slot, value.load()

    def materialize(self, weights: Any) -> dict[str, dict[str, torch.Tensor]]:
        """All values at once: ``{engine: {slot: tensor}}``; see ``iter_slots``."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        for slot, tensor in self.iter_slots(weights):
            result.setdefault(slot.engine, {})[slot.name] = tensor
        return result

    def _candidates(self, row: LedgerRow) -> tuple[str, ...]:
        if isinstance(row.value, SourceRef):
            first = row.value.fqn
            return (first, *(n for n in self._twins.get(first, ()) if n != first))
        return row.sources

    def _open(self, weights: Any) -> WeightSource:
        if self._opener is not None:
            return self._opener(weights)
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
        problems = list(self._differences(backend, {slot.key: slot for slot in slots}))
        if problems:
            raise PlanMismatchError(
                "The plan was made for another engine.",
                problems=problems,
                hint="Plan from the program that was compiled: refitkit.plan(program, target=...).",
            )

    def _differences(self, backend: str, slots: dict[tuple[str, str], Slot]) -> Iterator[Problem]:
        if backend != self.backend:
            yield Problem("backend", "differs", self.backend, backend)
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

    # -- storage ----------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The bytes of a plan file."""
        return store.encode(self.data, self._pinned)

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        what: str = "This plan",
        opener: Callable[[Any], WeightSource] | None = None,
    ) -> RefitPlan:
        """A plan from the bytes of a plan file.

        Raises:
            PlanMismatchError: It is not a plan, is damaged or of another version.
        """
        data, pinned = store.decode(content, what)
        return cls(data, pinned, opener)

    def save(self, path: str | Path) -> None:
        """Write a plan file: beside ``path``, then renamed."""
        with replacing(Path(path)) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> RefitPlan:
        """Read a plan file. Nothing in it is run.

        Raises:
            PlanMismatchError: It is missing, not a plan, damaged or of another version.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as exc:
            raise PlanMismatchError(f"The plan {str(path)!r} cannot be read: {exc}.") from exc
        return cls.from_bytes(content, f"{str(path)!r}")


class _Load:
    """Reads one tensor of a source when it is called."""

    def __init__(self, source: WeightSource, fqn: str) -> None:
        self._source, self._fqn = source, fqn

    def __call__(self) -> torch.Tensor:
        return self._source.get(self._fqn)


def _misfits(values: list[SlotValue], source: WeightSource) -> Iterator[Problem]:
    for value in values:
        slot = value.slot
        for info in map(source.info, value.sources):
            found = f"{info.dtype} {info.shape}"
            if info.unusable:
                yield Problem(slot.name, "unusable", info.unusable)
            elif (info.dtype, info.shape) != (slot.dtype, slot.shape or info.shape):
                yield Problem(slot.name, "value", found, f"{slot.dtype} {slot.shape}")


def _short(slot: Slot) -> str:
    return f"{slot.dtype} x {slot.count}"
