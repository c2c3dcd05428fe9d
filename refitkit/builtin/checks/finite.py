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

from refitkit.model import CallRef
from refitkit.program.finite import all_finite, finite, has_finite_sum, has_floats, spoilt
from refitkit.protocols import GivesPieces, SupportsReadback
from refitkit.recipe.reads import reads_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.errors import Problem
    from refitkit.model import LedgerRow
    from refitkit.protocols import OpenedModule, Plan, WeightSource

_SMALL = 1 << 16  # bytes; tensors of the host up to this size are looked at together
_TOGETHER = 1 << 20  # bytes of such tensors that are looked at at once


def problems(
    plan: Plan, module: OpenedModule, source: WeightSource, names: Iterable[str]
) -> Iterator[Problem]:
    """Entries of the source with a non-finite element where the present one is finite.

    Of entries that no row names as its source nothing present is known; engines check their slots.
    """
    sources = reads_of(plan).sources
    for name in _not_finite(source, [name for name in names if name in sources]):
        rows = [row for row in plan.data.ledger if name in row.sources]
        yield from _spoilt(name, source.get(name), _Present(plan, module, name, rows))


def _not_finite(source: WeightSource, names: Iterable[str]) -> list[str]:
    """Entries with an element that is not finite.

    Those on a GPU are asked all at once, as each answer waits for the device, and small ones in
    groups. A large one of the host is looked at on its own and forgotten: a source may make it.
    """
    names, elsewhere, small = list(names), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    pieces = source.pieces if isinstance(source, GivesPieces) else _no_pieces
    spoilt: set[str] = set()
    held = 0
    for name in names:
        parts = pieces(name)
        if parts is not None:
            spoilt |= set() if all(map(all_finite, parts)) else {name}
            continue
        value = source.get(name)
        if value.is_cpu and value.nbytes > _SMALL:
            spoilt |= set() if all_finite(value) else {name}
        elif has_floats(value):
            (small if value.is_cpu else elsewhere)[name] = value
            held += value.nbytes if value.is_cpu else 0
        del value  # so that two large ones are not in memory
        if held > _TOGETHER:
            spoilt |= _spoilt_of(small)
            small, held = {}, 0
    spoilt |= _spoilt_of(small) | _spoilt_of(elsewhere)
    return [name for name in names if name in spoilt]


def _no_pieces(_name: str) -> None:
    """What a source gives that has no pieces."""


def _spoilt_of(values: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors with an element that is not finite; asks few questions if there is none."""
    return {name for name in _suspects(values) if not all_finite(values[name])}


def _suspects(values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names of tensors that may have an element that is not finite: few, or a whole group.

    A sum is finite only if all of its terms are; it may also be too large, so it accuses some
    wrongly. On a GPU the magnitudes of many tensors are summed by a single launch, on the host they
    are laid end to end, which for small ones costs less than a sum of each.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, value in values.items():
        if value.is_complex() or value.dtype.itemsize == 1:
            yield name
        else:
            groups[value.device, value.dtype].append(name)
    for (device, dtype), names in groups.items():
        wide = dtype if dtype is torch.float64 else torch.float32
        if device.type == "cpu":
            whole = torch.cat([values[name].reshape(-1) for name in names])
            yield from [] if has_finite_sum(whole) else names
        else:
            yield from _suspects_there({name: values[name] for name in names}, wide)


def _suspects_there(values: Mapping[str, torch.Tensor], wide: torch.dtype) -> list[str]:
    """The same for tensors of one dtype on a GPU, where each answer waits for the device.

    Args:
        values: The tensors.
        wide: What sums are computed in.
    """
    sums = torch.stack(torch._foreach_norm(list(values.values()), 1, dtype=wide))  # noqa: SLF001
    if has_finite_sum(sums):
        return []
    told = torch.isfinite(sums).tolist()
    return [name for name, good in zip(values, told, strict=True) if not good]


def _spoilt(name: str, value: torch.Tensor, present: _Present) -> Iterator[Problem]:
    """A problem, unless the present values are not finite either."""
    alike = present.alike(value.shape)
    bad = ~finite(value)
    if alike is not None:
        bad &= finite(alike).to(bad.device)
    elif present.derived_not_finite():
        return
    if bad.any():
        yield spoilt(name, bad)


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
