"""Copies of what slots hold, made before they are written, within the limits that were set."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from refitkit.errors import EngineError, raised_as
from refitkit.pipeline.changes import live_value
from refitkit.pipeline.history import History, Record
from refitkit.protocols import HoldsPrevious

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from refitkit.config import Config
    from refitkit.model import SlotKey
    from refitkit.pipeline.held import WeightState
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

GIVEN_UP = "a refit with rollback=False wrote over them"
OFF = "no copies are kept of them"


class SnapshotBuilder:
    """What a refit keeps of the weights before it. Made before anything is written.

    Attributes:
        history: What is kept of earlier refits.
    """

    def __init__(
        self,
        module: OpenedModule,
        before: WeightState,
        written: Iterable[SlotKey],
        config: Config,
        *,
        with_base: bool,
    ) -> None:
        """Copy what has to be copied.

        Args:
            module: The module, with its weights from before.
            before: What is known of those.
            written: Slots that will be written.
            config: How much is kept.
            with_base: Whether the values of version 0 are.

        Raises:
            EngineError: An engine failed to tell what it holds.
        """
        self._module, self._before, self._config = module, before, config
        in_order = tuple(written)
        self._written = frozenset(in_order)
        self._copies: dict[SlotKey, torch.Tensor] = {}
        self._keepers = {n for n, e in module.engines.items() if isinstance(e, HoldsPrevious)}
        self.history = _unbroken(before.history, config.keep_versions)
        self._base = self._missing_in_base() if with_base else self._lose_base(OFF)
        self._own = self._not_in_engines()
        if self._base or self._own:
            self._fit()
        with raised_as(EngineError, "An engine failed to tell what it holds"):
            self._copy(self._base | self._own)
            kept = self._kept
            undone = in_order if config.keep_versions else ()
            self._lent = self._will_be_lent([key for key in undone if key not in kept])

    def _missing_in_base(self) -> frozenset[SlotKey]:
        """Slots of which the values of version 0 have to be copied now."""
        if self.history.base_lost:
            return frozenset()
        return self._written - self.history.base.keys()

    def _not_in_engines(self) -> frozenset[SlotKey]:
        """Slots of which the values before this refit have to be copied, so that it can be undone.

        What engines hold anyway suffices until the next refit.
        """
        depth = self._config.keep_versions
        if depth != 1:
            return self._written if depth else frozenset()
        return frozenset(key for key in self._written if key[0] not in self._keepers)

    def _will_be_lent(self, keys: Collection[SlotKey]) -> bool:
        """Whether the engines will have what slots hold now: they know it, and keep it."""
        engines = self._module.engines
        tells = {name: live_value(engines[name]) for name in {name for name, _ in keys}}
        if not self._keepers.issuperset(tells):
            return False
        return all((tell := tells[name]) and tell(slot) is not None for name, slot in keys)

    def _fit(self) -> None:
        """Keep less where it would be more than is allowed: the oldest goes first."""
        limit = self._config.keep_limit
        while limit is not None and self._size() > limit and self.history.records:
            self.history = replace(self.history, records=self.history.records[1:])
        if limit is not None and self._size() > limit:
            self._own = frozenset()
        if limit is not None and self._size() > limit:
            why = f"they take {self._size()} bytes, and keep_limit is {limit}"
            self._base = self._lose_base(why)

    def _lose_base(self, why: str) -> frozenset[SlotKey]:
        """Values of version 0 are not kept any more: none of them has to be copied."""
        why = self.history.base_lost or why
        self.history = replace(self.history, base={}, base_lost=why)
        return frozenset()

    def _size(self) -> int:
        engines = self._module.engines
        new = self._base | self._own
        return self.history.nbytes + sum(engines[name].slots[slot].nbytes for name, slot in new)

    def _copy(self, keys: Collection[SlotKey]) -> None:
        values = present(self._module, keys)
        unknown = next((key for key in values if values[key] is None and key in self._base), None)
        if unknown is not None:
            self._base = self._lose_base(f"the engine {unknown[0]!r} cannot tell what it held")
        for key in sorted(self._base | self._own):
            value = values[key]
            if value is not None:
                self._copies[key] = value.detach().to("cpu", copy=True)

    @property
    def _kept(self) -> dict[SlotKey, torch.Tensor]:
        return {key: self._copies[key] for key in self._own if key in self._copies}

    def copy_mutable(self) -> None:
        """Copy again what calls may have changed since. Called when no call runs any more."""
        engines = self._module.engines
        mutable = [key for key in self._copies if engines[key[0]].slots[key[1]].mutable]
        for key, value in present(self._module, mutable).items():
            if value is not None:
                self._copies[key].copy_(value.detach())

    def after(self, version: int, plan: RefitPlan) -> History:
        """The history once the refit is committed.

        Args:
            version: Number of the weights that it brings.
            plan: The plan that it follows.
        """
        base = {**self.history.base, **{key: self._copies[key] for key in self._base}}
        record = Record(
            version=version,
            written=self._written,
            kept=self._kept,
            source=self._before.source,
            live=self._before.live,
            overridden=self._before.overridden,
            lent=self._lent,
        )
        depth = self._config.keep_versions
        records = (*self.history.records, record)[-depth:] if depth else ()
        written = self.history.written | self._written
        return replace(self.history, base=base, records=records, written=written, plan=plan)


def present(module: OpenedModule, keys: Collection[SlotKey]) -> dict[SlotKey, torch.Tensor | None]:
    """What slots hold, where their engines can tell: aliases, in the order of their names.

    What an engine is able to do is asked once: that takes longer than reading a slot.
    """
    names = dict.fromkeys(name for name, _ in keys)
    tells = {name: live_value(module.engines[name]) for name in names}
    found: dict[SlotKey, torch.Tensor | None] = {}
    for engine, slot in sorted(keys):
        tell = tells[engine]
        found[engine, slot] = None if tell is None else tell(slot)
    return found


def _unbroken(history: History, depth: int) -> History:
    """What is left of a history when one refit more is coming.

    What only engines have of the newest refit is overwritten, and then no older one can be undone.
    """
    records = history.records[1 - depth :] if depth > 1 else ()
    gaps = [number for number, record in enumerate(records) if not record.whole]
    return replace(history, records=records[gaps[-1] + 1 :] if gaps else records)
