"""The stage ``stage``: new values beside the live ones, in every engine."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from refitkit.errors import EngineError, RefitError
from refitkit.protocols import SupportsPartial

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import Engine, OpenedModule, SlotValue, StagedRefit


def stage(
    module: OpenedModule, values: Mapping[tuple[str, str], SlotValue], *, partial: bool
) -> list[tuple[str, StagedRefit]]:
    """Stage all engines that have something to stage; on a failure none stays staged.

    Raises:
        EngineError: An engine failed; the live weights are untouched.
    """
    by_engine: dict[str, list[SlotValue]] = defaultdict(list)
    for (engine, _), value in values.items():
        by_engine[engine].append(value)
    staged: list[tuple[str, StagedRefit]] = []
    try:
        for name, some in by_engine.items():
            staged.append((name, _stage(module.engines[name], some, partial=partial)))
    except BaseException as exc:
        discard(staged)
        if isinstance(exc, RefitError) or not isinstance(exc, Exception):
            raise
        raise EngineError(f"Staging failed: {type(exc).__name__}: {exc}") from exc
    return staged


def discard(staged: list[tuple[str, StagedRefit]]) -> None:
    """Forget what is staged. The live weights were never touched, so failures do not matter."""
    for _, one in staged:
        try:
            one.discard()
        except Exception:  # noqa: BLE001, S112 - what is staged is not in use
            continue


def _stage(engine: Engine, values: list[SlotValue], *, partial: bool) -> StagedRefit:
    if partial and isinstance(engine, SupportsPartial):
        return engine.stage_partial(values)
    return engine.stage(values)
