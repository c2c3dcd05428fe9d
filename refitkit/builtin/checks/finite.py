"""New values must be finite wherever the present ones are.

A mask may hold -inf by design; a weight that suddenly holds NaN is a broken checkpoint. Where a
slot is computed from entries nobody can say which elements of them its own come from: an entry may
then be non-finite if the slot is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem
from refitkit.model import CallRef
from refitkit.protocols import SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.model import LedgerRow
    from refitkit.protocols import OpenedModule, Plan, WeightSource


def problems(
    plan: Plan, module: OpenedModule, source: WeightSource, names: Iterable[str]
) -> Iterator[Problem]:
    """Entries of the source with a non-finite element where the present one is finite.

    Of entries that no row names as its source nothing present is known; engines check their slots.
    """
    rows: dict[str, list[LedgerRow]] = defaultdict(list)
    for row in plan.data.ledger:
        for name in row.sources:
            rows[name].append(row)
    for name in _not_finite(source, [name for name in names if name in rows]):
        present = _Present(plan, module, name, rows[name])
        yield from _spoilt(name, source.get(name), present)


def _not_finite(source: WeightSource, names: Iterable[str]) -> list[str]:
    """Entries with an element that is not finite.

    Of those on a GPU all answers are fetched at once: each fetch waits for the device.
    """
    found: dict[str, bool] = {}
    pending: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for name in names:
        value = source.get(name)
        found[name] = value.device.type == "cpu" and not all_finite(value)
        if value.device.type != "cpu" and _can_spoil(value):
            pending[value.device][name] = _finite_on_device(value)
    for answers in pending.values():
        told = torch.stack(list(answers.values())).tolist()
        found.update((name, not finite) for name, finite in zip(answers, told, strict=True))
    return [name for name, spoilt in found.items() if spoilt]


def _spoilt(name: str, value: torch.Tensor, present: _Present) -> Iterator[Problem]:
    """A problem, unless the present values are not finite either."""
    alike = present.alike(value.shape)
    bad = ~_finite(value)
    if alike is not None:
        bad &= _finite(alike).to(bad.device)
    elif present.derived_not_finite():
        return
    count = int(bad.sum())
    if count:
        where = tuple(int(i) for i in bad.nonzero()[0])
        found = f"{count} of {value.numel()} elements, the first at {where}"
        hint = "to allow it: check_finite=False in the config"
        yield Problem(name, "non-finite", found, "finite, as the present values are", hint)


@dataclass(frozen=True)
class _Present:
    """What is known of the values that a module holds now of one entry of a source."""

    plan: Plan
    module: OpenedModule
    name: str
    rows: list[LedgerRow]

    def alike(self, shape: torch.Size) -> torch.Tensor | None:
        """A value to compare element by element: of a slot that holds the entry as it is.

        Where no such slot can be read, the one that the plan keeps of what no state_dict holds.
        """
        for row in self.rows:
            present = None if isinstance(row.value, CallRef) else self._read(row)
            if present is not None and present.shape == shape:
                return present
        kept = self.plan.pinned(self.name) if self.name in self.plan.data.pinned else None
        return kept if kept is not None and kept.shape == shape else None

    def derived_not_finite(self) -> bool:
        """Whether a slot that is computed from the entry, among others, is not finite itself."""
        derived = (self._read(row) for row in self.rows if isinstance(row.value, CallRef))
        return any(present is not None and not all_finite(present) for present in derived)

    def _read(self, row: LedgerRow) -> torch.Tensor | None:
        engine = self.module.engines[row.slot.engine]
        return engine.read(row.slot.name) if isinstance(engine, SupportsReadback) else None


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    ``aminmax`` reads once and allocates nothing; ``isfinite`` would write a mask of the same size.
    """
    return not _can_spoil(value) or bool(_finite_on_device(value))


def _can_spoil(value: torch.Tensor) -> bool:
    return bool(value.numel()) and (value.is_floating_point() or value.is_complex())


def _finite_on_device(value: torch.Tensor) -> torch.Tensor:
    """Whether all elements are finite, still where the value is."""
    if value.is_complex() or value.dtype.itemsize == 1:
        return _finite(value).all()
    low, high = torch.aminmax(value)
    return torch.isfinite(low) & torch.isfinite(high)


def _finite(value: torch.Tensor) -> torch.Tensor:
    """Where elements are finite; the 8-bit floats have neither ``isfinite`` nor ``aminmax``."""
    wide = value.is_floating_point() and value.dtype.itemsize == 1
    return torch.isfinite(value.float() if wide else value)
