"""Progress, as values. Bars, logs and metrics listen to these through ``refitkit_event``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Anything worth telling while a pipeline works.

    Attributes:
        verb: What the user asked for: ``compile``, ``load``, ``plan``, ``refit``, ``save``.
    """

    verb: str


@dataclass(frozen=True, slots=True)
class StageStarted(Event):
    """A stage begins.

    Attributes:
        stage: Its name.
        total: Number of steps to come; None where nobody knows.
    """

    stage: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Step(Event):
    """A stage came a step further. Sent for things that take long, never once per tensor.

    Attributes:
        stage: Its name.
        text: What was just done.
    """

    stage: str
    text: str


@dataclass(frozen=True, slots=True)
class StageFinished(Event):
    """A stage is over, well.

    Attributes:
        stage: Its name.
        seconds: Wall-clock time.
    """

    stage: str
    seconds: float
