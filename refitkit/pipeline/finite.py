"""New values of slots have to be finite, where the present ones are: judged where they are staged.

So the bytes that are found finite are the bytes that are committed, whoever writes to a source
meanwhile; and a file is read once. Weights that become a slot as they are, in engines that can be
read, are left to this by the check of all weights (``refitkit_check``, ``deferred``). Values that
are computed on the way are judged here in any case: a recipe can make NaN of finite numbers (the
root of a variance below zero, a cast to float16 of what is too large), and so can a plugin's
strategy.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from refitkit.errors import EngineError, WeightMismatchError, raised_as
from refitkit.model import CallRef
from refitkit.program.bits import all_finite, finite, not_finite, spoilt
from refitkit.protocols import ShowsStaged, SupportsOverwrite, SupportsReadback
from refitkit.recipe.plan import STRATEGY
from refitkit.recipe.sources import LARGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.errors import Problem
    from refitkit.model import SlotKey
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import OpenedModule, Plan, SlotValue, StagedRefit




def judged_where_staged(values: Mapping[SlotKey, SlotValue], module: OpenedModule, *, overwrite: bool) -> frozenset[str]:
    """Names of entries that are judged here and need no reading before.

    Args:
        values: What will be staged.
        module: The opened target.
        overwrite: Whether engines that can write new values over the live ones, at the commit.
    """
    able = _readable(module, overwrite=overwrite)
    return frozenset(
        value.sources[0] for key, value in values.items() if key[0] in able and _as_it_is(value)
    )


class FiniteCheck:
    """Judges the values of one refit.

    Large values are looked at piece by piece on their way into the engine, while they are in the
    cache of the processor; all others where they are staged.
    """

    def __init__(self, module: OpenedModule, plan: Plan, *, overwrite: bool) -> None:
        """Look at nothing yet.

        Args:
            module: The opened target.
            plan: The plan that is followed.
            overwrite: See ``judged_where_staged``.
        """
        self._module, self._plan = module, plan
        self._able = _readable(module, overwrite=overwrite)
        self._passed: set[SlotKey] = set()

    def watched(self, values: Mapping[SlotKey, SlotValue]) -> Mapping[SlotKey, SlotValue]:
        """The same values; pieces are looked at when the engine reads them."""
        return {
            key: value._replace(pieces=partial(self._pieces, key, value.pieces))
            if value.pieces is not None
            and key[0] in self._able
            and value.slot.nbytes >= LARGE
            and _as_it_is(value)
            else value
            for key, value in values.items()
        }

    def _pieces(
        self, key: SlotKey, pieces: Callable[[], Iterator[torch.Tensor] | None]
    ) -> Iterator[torch.Tensor] | None:
        found = pieces()
        return None if found is None else self._looked_at(key, found)

    def _looked_at(self, key: SlotKey, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        self._passed.discard(key)
        good = True
        for piece in pieces:
            good = good and all_finite(piece)
            yield piece
        if good:
            self._passed.add(key)

    def require(self, staged: Staged, values: Mapping[SlotKey, SlotValue]) -> None:
        """Check all staged values of engines that can be read.

        Engines that only remember their weights look at them themselves.

        Raises:
            WeightMismatchError: Elements are not finite where the present ones are; lists weights,
                and slots whose values are computed.
            EngineError: An engine failed to show a value.
        """
        problems: list[Problem] = []
        judged = self._judged(values)
        with torch.no_grad(), raised_as(EngineError, "Staged values cannot be looked at"):
            for name, one in staged.waiting():
                engine = self._module.engines[name]
                if name in judged and isinstance(engine, SupportsReadback):
                    problems += _spoilt(engine, one, judged[name])
        if problems:
            raise WeightMismatchError(
                "New weights, or values that follow from them, are not finite where the present "
                "ones are.",
                problems=problems,
            )

    def _judged(self, values: Mapping[SlotKey, SlotValue]) -> Mapping[str, dict[str, SlotValue]]:
        """Values that are looked at where they are staged, by engine and slot."""
        found: defaultdict[str, dict[str, SlotValue]] = defaultdict(dict)
        for row in self._plan.data.ledger:
            key, value = row.slot.key, values.get(row.slot.key)
            if value is None or key[0] not in self._able or key in self._passed:
                continue
            made = value.strategy != STRATEGY or isinstance(row.value, CallRef)
            if made or _as_it_is(value):
                found[key[0]][key[1]] = value
        return found


def _readable(module: OpenedModule, *, overwrite: bool) -> frozenset[str]:
    """Engines whose staged values can be held against the live ones."""
    return frozenset(
        name
        for name, engine in module.engines.items()
        if isinstance(engine, SupportsReadback)
        and not (overwrite and isinstance(engine, SupportsOverwrite))
    )


def _as_it_is(value: SlotValue) -> bool:
    """Whether a value is a weight of the source, as it is."""
    return value.identity and not value.pinned and value.strategy == STRATEGY


def _spoilt(
    engine: SupportsReadback, staged: StagedRefit, values: Mapping[str, SlotValue]
) -> Iterator[Problem]:
    """A problem for each of these slots of an engine that would become worse."""
    shows = staged if isinstance(staged, ShowsStaged) else None

    def new(slot: str) -> torch.Tensor:
        return values[slot].load() if shows is None else shows.staged(slot)

    some = [slot for slot, value in values.items() if shows or _as_it_is(value)]
    for slot in not_finite((slot, new(slot)) for slot in some):
        value = new(slot)
        present = engine.read(slot)
        bad = ~finite(value.reshape(present.shape)) & finite(present).to(value.device)
        if not bad.any():
            continue
        if _as_it_is(values[slot]):
            yield spoilt(values[slot].sources[0], bad)
        else:
            names = ", ".join(map(repr, values[slot].sources))
            yield spoilt(slot, bad, f"it follows from {names}; " if names else "")
