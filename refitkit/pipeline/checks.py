"""The stage ``check``: everything that forbids the refit, in one error, before anything is staged.

New values have to be finite wherever the present ones are. ``FiniteCheck`` checks most of them as
staged bytes. So the bytes that are checked are the bytes that are committed, even if another
process writes to the source, and a file is read once. Plugins' checks leave those weights out
(``refitkit_check``, ``deferred``). ``FiniteCheck`` checks all computed values. A recipe can make
NaN of finite numbers: the root of a variance below zero, or a cast of large numbers to float16. A
plugin's strategy can do that, too.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial as bind
from typing import TYPE_CHECKING

import torch

from refitkit.errors import (
    EngineError,
    NotRefittableError,
    Problem,
    WeightMismatchError,
    raised_as,
)
from refitkit.model import CallRef
from refitkit.offered import received
from refitkit.pipeline.transform import explained
from refitkit.program.bits import all_finite, finite, newly_nonfinite, not_finite
from refitkit.protocols import (
    ChecksFinite,
    ShowsStaged,
    SupportsOverwrite,
    SupportsPartial,
    SupportsReadback,
)
from refitkit.recipe.plan import STRATEGY, is_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from refitkit.config import Config
    from refitkit.model import SlotKey
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.stage import Staged
    from refitkit.protocols import (
        Engine,
        OpenedModule,
        Plan,
        SlotValue,
        StagedRefit,
        WeightSource,
    )


def check_weights(
    context: Context,
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    *,
    partial: bool,
    unchanged: Collection[str] = (),
    deferred: Collection[str] = (),
    same_headers: bool = False,
) -> None:
    """Run the checks of all plugins; see the hook ``refitkit_check``.

    Raises:
        WeightMismatchError: A check found problems; lists those of all checks.
        PluginError: A check gave something other than a Problem; names the plugin.
    """
    found = context.host.items(
        "refitkit_check",
        plan=plan,
        module=module,
        source=source,
        partial=partial,
        unchanged=unchanged,
        deferred=deferred,
        same_headers=same_headers,
        config=context.config,
    )
    problems = [
        received(item, Problem, f"The plugin {plugin!r} (refitkit_check)") for plugin, item in found
    ]
    if problems:
        raise WeightMismatchError(
            f"{source.description} does not fit the module.",
            problems=explained(context, plan, module, source, problems, partial=partial),
        )


def check_abilities(
    module: OpenedModule, *, partial: bool, overwrite: bool, config: Config
) -> None:
    """Check that the engines support the refit, within the limits of the settings.

    Args:
        module: The opened module.
        partial: Whether slots without a value keep theirs.
        overwrite: Whether engines that can do so write over the live values.
        config: ``rollback_limit`` in bytes.

    Raises:
        NotRefittableError: They cannot; names the engines, or the setting.
    """
    if partial:
        lacking = [n for n, e in module.engines.items() if not isinstance(e, SupportsPartial)]
        if lacking:
            problems = [Problem(name, "no partial refit") for name in lacking]
            raise NotRefittableError("These engines take all weights at once.", problems=problems)
    if config.rollback_limit is None:
        return
    keeping = [
        engine
        for engine in module.engines.values()
        if not (overwrite and isinstance(engine, SupportsOverwrite))
    ]
    needed = sum(engine.memory.bytes for engine in keeping)
    if needed > config.rollback_limit:
        raise NotRefittableError(
            f"A rollback needs {needed} bytes, and rollback_limit is {config.rollback_limit}.",
            hint="Raise rollback_limit, or refit without rollback to save memory: rollback=False.",
        )


def judging_engines(module: OpenedModule, *, overwrite: bool) -> frozenset[str]:
    """Engines whose values are checked where they are staged: no plugin has to read their entries.

    ``FiniteCheck`` does that, or an engine that remembers its weights.

    Args:
        module: The opened module.
        overwrite: Whether engines that can do so write over the live values at the commit.
    """
    return _readable(module, overwrite=overwrite) | {
        name
        for name, engine in _kept_apart(module, overwrite=overwrite)
        if isinstance(engine, ChecksFinite) and engine.checks_finite
    }


class FiniteCheck:
    """Checks whether the values of one refit are finite.

    Large values are checked piece by piece on their way into the engine, while they are in the
    processor's cache. All others are checked after staging, in the staged memory.
    """

    def __init__(self, module: OpenedModule, plan: Plan, *, overwrite: bool) -> None:
        """Check nothing yet.

        Args:
            module: The opened module.
            plan: The plan that is followed.
            overwrite: Whether engines that can do so write over the live values at the commit.
        """
        self._module, self._plan = module, plan
        self._able = _readable(module, overwrite=overwrite)
        self._passed: set[SlotKey] = set()

    def watched(self, values: Mapping[SlotKey, SlotValue]) -> Mapping[SlotKey, SlotValue] | None:
        """The same values. Pieces of large values are checked when the engine reads them.

        Returns:
            The values; None if no value comes in pieces.
        """
        if not self._able or all(value.pieces is None for value in values.values()):
            return None
        return {
            key: value._replace(pieces=bind(self._pieces, key, value.pieces))
            if value.pieces is not None and key[0] in self._able and is_entry(value)
            else value
            for key, value in values.items()
        }

    def _pieces(
        self,
        key: SlotKey,
        pieces: Callable[[torch.Tensor | None], Iterator[torch.Tensor] | None],
        into: torch.Tensor | None,
    ) -> Iterator[torch.Tensor] | None:
        found = pieces(into)
        return None if found is None else self._judged_pieces(key, found)

    def _judged_pieces(
        self, key: SlotKey, pieces: Iterator[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        self._passed.discard(key)  # an engine may read a value twice
        good = True
        for piece in pieces:
            # after a bad piece the rest is not looked at: ``require`` looks at the whole value
            good = good and all_finite(piece)
            yield piece
        # a bad value is no error yet: the live value may have NaN at the same places
        if good:
            self._passed.add(key)

    def require(self, staged: Staged, values: Mapping[SlotKey, SlotValue]) -> None:
        """Check all staged values of engines that can be read.

        Engines that only remember their weights check values themselves.

        Raises:
            WeightMismatchError: Elements are not finite and the present ones are; lists the
                weights, and the slots whose values are computed.
            EngineError: An engine failed to show a value.
        """
        problems: list[Problem] = []
        judged = self._to_judge(values)
        with torch.no_grad(), raised_as(EngineError, "Staged values cannot be looked at"):
            for name, one in staged.waiting():
                engine = self._module.engines[name]
                if name in judged and isinstance(engine, SupportsReadback):
                    problems += _newly_nonfinite(engine, one, judged[name])
        if problems:
            raise WeightMismatchError(
                "New weights, or values that follow from them, are not finite where the present "
                "ones are.",
                problems=problems,
            )

    def _to_judge(self, values: Mapping[SlotKey, SlotValue]) -> Mapping[str, dict[str, SlotValue]]:
        """The values to check in the staged memory, by engine and slot."""
        found: defaultdict[str, dict[str, SlotValue]] = defaultdict(dict)
        if not self._able:
            return found
        for row in self._plan.data.ledger:
            key, value = row.slot.key, values.get(row.slot.key)
            if value is None or key[0] not in self._able or key in self._passed:
                continue
            computed = value.strategy != STRATEGY or isinstance(row.value, CallRef)
            if computed or is_entry(value):
                found[key[0]][key[1]] = value
        return found


def _readable(module: OpenedModule, *, overwrite: bool) -> frozenset[str]:
    """Engines whose staged values can be compared with the live ones."""
    return frozenset(
        name
        for name, engine in _kept_apart(module, overwrite=overwrite)
        if isinstance(engine, SupportsReadback)
    )


def _kept_apart(module: OpenedModule, *, overwrite: bool) -> Iterator[tuple[str, Engine]]:
    """Engines whose new values lie beside the live ones before the commit."""
    for name, engine in module.engines.items():
        if not (overwrite and isinstance(engine, SupportsOverwrite)):
            yield name, engine


def _newly_nonfinite(
    engine: SupportsReadback, staged: StagedRefit, values: Mapping[str, SlotValue]
) -> Iterator[Problem]:
    """A problem for each slot with elements that are not finite and were."""
    shows = staged if isinstance(staged, ShowsStaged) else None

    def new(slot: str) -> torch.Tensor:
        return values[slot].load() if shows is None else shows.staged(slot)

    # if the engine does not show staged values, each is loaded again: only entries are, because a
    # computed value would be computed twice
    some = [slot for slot, value in values.items() if shows or is_entry(value)]
    for slot in not_finite((slot, new(slot)) for slot in some):
        value = new(slot)
        present = engine.read(slot)
        bad = ~finite(value.reshape(present.shape)) & finite(present).to(value.device)
        if not bad.any():
            continue
        if is_entry(values[slot]):
            yield newly_nonfinite(values[slot].sources[0], bad)
        else:
            names = ", ".join(map(repr, values[slot].sources))
            yield newly_nonfinite(slot, bad, f"it follows from {names}; " if names else "")
