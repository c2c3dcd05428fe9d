"""Copies of what slots hold, made before they are written, within the limits that were set."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from refitkit.errors import EngineError, raised_as
from refitkit.pipeline.changes import live_value
from refitkit.pipeline.history import History, Key, Record
from refitkit.protocols import HoldsPrevious

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from refitkit.config import Config
    from refitkit.pipeline.held import Held
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

GIVEN_UP = "a refit with rollback=False wrote over them"
OFF = "no copies are kept of them"


class Keeping:
    """What a refit keeps of the weights before it. Made before anything is written.

    Attributes:
        history: What is kept of earlier refits.
    """

    def __init__(
        self,
        module: OpenedModule,
        before: Held,
        written: Iterable[Key],
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
        self._written = frozenset(written)
        self._copies: dict[Key, torch.Tensor] = {}
        self.history = _unbroken(before.history, config.keep_versions)
        self._base = self._missing_in_base() if with_base else self._lose_base(OFF)
        self._own = self._not_in_engines()
        if self._base or self._own:
            self._fit()
        with raised_as(EngineError, "An engine failed to tell what it holds"):
            self._copy(self._base | self._own)
            undone = self._written if config.keep_versions else frozenset()
            others = sorted(undone - self._kept.keys())
            self._lent = all(self._is_lent(key) for key in others)

    def _missing_in_base(self) -> frozenset[Key]:
        """Slots of which the values of version 0 have to be copied now."""
        if self.history.base_lost:
            return frozenset()
        return self._written - self.history.base.keys()

    def _not_in_engines(self) -> frozenset[Key]:
        """Slots of which the values before this refit have to be copied, so that it can be undone.

        What engines hold anyway suffices until the next refit.
        """
        depth = self._config.keep_versions
        if depth != 1:
            return self._written if depth else frozenset()
        engines = self._module.engines
        return frozenset(k for k in self._written if not isinstance(engines[k[0]], HoldsPrevious))

    def _is_lent(self, key: Key) -> bool:
        """Whether an engine will have what a slot holds now: it knows it, and keeps it."""
        keeps = isinstance(self._module.engines[key[0]], HoldsPrevious)
        return keeps and present(self._module, key) is not None

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

    def _lose_base(self, why: str) -> frozenset[Key]:
        """Values of version 0 are not kept any more: none of them has to be copied."""
        why = self.history.base_lost or why
        self.history = replace(self.history, base={}, base_lost=why)
        return frozenset()

    def _size(self) -> int:
        engines = self._module.engines
        new = self._base | self._own
        return self.history.nbytes + sum(engines[name].slots[slot].nbytes for name, slot in new)

    def _copy(self, keys: Iterable[Key]) -> None:
        values = {key: present(self._module, key) for key in sorted(keys)}
        unknown = next((key for key in values if values[key] is None and key in self._base), None)
        if unknown is not None:
            self._base = self._lose_base(f"the engine {unknown[0]!r} cannot tell what it held")
        for key in sorted(self._base | self._own):
            value = values[key]
            if value is not None:
                self._copies[key] = value.detach().to("cpu", copy=True)

    @property
    def _kept(self) -> dict[Key, torch.Tensor]:
        return {key: self._copies[key] for key in self._own if key in self._copies}

    def copy_mutable(self) -> None:
        """Copy again what calls may have changed since. Called when no call runs any more."""
        for key, kept in self._copies.items():
            if self._module.engines[key[0]].slots[key[1]].mutable:
                value = present(self._module, key)
                if value is not None:
                    kept.copy_(value.detach())

    def after(self, version: int, plan: RefitPlan) -> History:
        """The history once the refit is committed.

        Args:
            version: Number of the weights that it brings.
            plan: The plan that it follows.
        """
        base = {key: self._copies[key] for key in self._base}
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
        base = {**self.history.base, **base}
        written = self.history.written | self._written
        return replace(self.history, base=base, records=records, written=written, plan=plan)


def present(module: OpenedModule, key: Key) -> torch.Tensor | None:
    """What a slot holds, where the engine can tell: an alias."""
    tell = live_value(module.engines[key[0]])
    return None if tell is None else tell(key[1])


def _unbroken(history: History, depth: int) -> History:
    """What is left of a history when one refit more is coming.

    What only engines have of the newest refit is overwritten, and then no older one can be undone.
    """
    records = history.records[1 - depth :] if depth > 1 else ()
    gaps = [number for number, record in enumerate(records) if not record.whole]
    return replace(history, records=records[gaps[-1] + 1 :] if gaps else records)
