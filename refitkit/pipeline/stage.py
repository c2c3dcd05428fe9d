"""The stage ``stage``: new values beside the live ones, in every engine."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from refitkit.errors import EngineError, raised_as
from refitkit.model import EngineMemory
from refitkit.pipeline.blame import require_sound
from refitkit.protocols import SupportsOverwrite, SupportsPartial

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.protocols import OpenedModule, SlotValue, StagedRefit


class Staged:
    """All engines of a module that have something staged.

    Each of them is either handed out by ``take``, to be committed, or forgotten by ``discard``.
    """

    def __init__(self, module: OpenedModule) -> None:
        """Start with nothing staged."""
        self._module = module
        self._waiting: list[tuple[str, StagedRefit]] = []
        self._without: set[str] = set()  # engines without a way back

    def fill(
        self,
        values: Mapping[tuple[str, str], SlotValue],
        *,
        partial: bool,
        overwrite: bool = False,
    ) -> None:
        """Stage all engines that there are values for.

        Args:
            values: Values by ``(engine, slot)``.
            partial: Whether slots without a value keep theirs.
            overwrite: Whether engines that can are written to at the commit only, over what is
                live, without a way back.

        Raises:
            EngineError: One failed; names it.
            PluginError: A strategy's value failed; names the strategy and the slot.
        """
        by_engine: dict[str, list[SlotValue]] = defaultdict(list)
        for (engine, _), value in values.items():
            by_engine[engine].append(value)
        for name, some in by_engine.items():
            with raised_as(EngineError, f"The engine {name!r} failed to stage"):
                try:
                    staged = self._stage(name, some, partial=partial, overwrite=overwrite)
                except Exception as exc:
                    require_sound(some, exc)
                    raise
            self._waiting.append((name, staged))

    def _stage(
        self, name: str, values: list[SlotValue], *, partial: bool, overwrite: bool
    ) -> StagedRefit:
        engine = self._module.engines[name]
        if overwrite and isinstance(engine, SupportsOverwrite):
            self._without.add(name)
            return engine.stage_over(values)
        if partial and isinstance(engine, SupportsPartial):
            return engine.stage_partial(values)
        return engine.stage(values)

    def changed(self) -> bool | None:
        """Whether any engine would change; None where one cannot tell and no other would."""
        answers: list[bool | None] = []
        for name, staged in self._waiting:
            with raised_as(EngineError, f"The engine {name!r} failed to compare"):
                answers.append(staged.changed())
        if any(answers):
            return True
        return None if None in answers else False

    def waiting(self) -> tuple[tuple[str, StagedRefit], ...]:
        """Names of engines, and what is staged in each."""
        return tuple(self._waiting)

    def memory(self) -> tuple[EngineMemory, ...]:
        """What the way back costs each engine of the module."""
        with raised_as(EngineError, "An engine failed to tell its memory"):
            return tuple(
                EngineMemory(engine=name, kind="none", bytes=0)
                if name in self._without
                else engine.memory
                for name, engine in self._module.engines.items()
            )

    def take(self) -> Iterator[tuple[str, StagedRefit]]:
        """Hand out one after another; what was handed out is no longer discarded here."""
        while self._waiting:
            yield self._waiting.pop(0)

    def discard(self) -> None:
        """Forget what is still here. Live weights were never touched, so failures do not matter."""
        for _, staged in self.take():
            try:
                staged.discard()
            except BaseException:  # noqa: BLE001, S112 - the others must be tried, interrupted too
                continue
