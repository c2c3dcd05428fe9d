"""Stages tell when they start and end, and how long they took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from refitkit.model import StageFinished, StageStarted, StageTime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.host import Host


class StageClock:
    """Times the stages of one verb and emits their events."""

    def __init__(self, host: Host, verb: str) -> None:
        """Start with no stages."""
        self._host, self._verb = host, verb
        self._stages: list[StageTime] = []

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """What was timed so far."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. One that raises is timed, and does not finish."""
        self._host.emit(StageStarted(self._verb, name))
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages.append(StageTime(stage=name, seconds=time.perf_counter() - start))
        self._host.emit(StageFinished(self._verb, name, self._stages[-1].seconds))
