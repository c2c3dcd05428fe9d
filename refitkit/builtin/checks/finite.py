"""New values must be finite wherever the present ones are.

A mask may hold -inf by design; a weight that suddenly holds NaN is a broken checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import Problem
from refitkit.protocols import SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.protocols import OpenedModule, Plan, WeightSource


def problems(
    plan: Plan, module: OpenedModule, source: WeightSource, names: Iterable[str]
) -> Iterator[Problem]:
    """Entries of the source with a non-finite element where the present one is finite.

    Of entries that no row names as its source nothing present is known; engines check their slots.
    """
    slots = {n: row.slot for row in plan.data.ledger for n in row.sources}
    for name in names:
        slot = slots.get(name)
        if slot is None:
            continue
        value = source.get(name)
        if all_finite(value):
            continue
        engine = module.engines[slot.engine]
        present = engine.read(slot.name) if isinstance(engine, SupportsReadback) else None
        bad = ~_finite(value)
        if present is not None and present.shape == value.shape:
            bad &= _finite(present).to(bad.device)
        count = int(bad.sum())
        if count:
            where = tuple(int(i) for i in bad.nonzero()[0])
            found = f"{count} of {value.numel()} elements, the first at {where}"
            hint = "to allow it: check_finite=False in the config"
            yield Problem(name, "non-finite", found, "finite, as the present values are", hint)


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    ``aminmax`` reads once and allocates nothing; ``isfinite`` would write a mask of the same size.
    """
    if not (value.is_floating_point() or value.is_complex()) or not value.numel():
        return True
    if value.is_complex() or value.dtype.itemsize == 1:
        return bool(_finite(value).all())
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _finite(value: torch.Tensor) -> torch.Tensor:
    """Where elements are finite; the 8-bit floats have neither ``isfinite`` nor ``aminmax``."""
    wide = value.is_floating_point() and value.dtype.itemsize == 1
    return torch.isfinite(value.float() if wide else value)
