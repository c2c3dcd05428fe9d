"""Progress on stderr, hung on the hook ``refitkit_event``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from refitkit.cli.text import duration, shown
from refitkit.hookspecs import hookimpl
from refitkit.model import StageFinished, StageStarted, Step

if TYPE_CHECKING:
    from rich.status import Status

    from refitkit.model import Event


class Progress:
    """A plugin that shows what a pipeline is at, and remembers how long it took.

    Attributes:
        name: Its name among the plugins.
        finished: All stages that ended well, in order.
        verbose: Whether to print a line for every stage, terminal or not.
    """

    name = "cli-progress"

    def __init__(self) -> None:
        """Show nothing before the first event."""
        self.finished: list[StageFinished] = []
        self.verbose = False
        self._status: Status | None = None

    @hookimpl
    def refitkit_event(self, event: Event) -> None:
        """Follow one event."""
        if isinstance(event, StageStarted):
            self.say(f"{event.verb}: {event.stage}")
        elif isinstance(event, Step):
            self.say(f"{event.verb}: {event.stage}: {event.text}")
        elif isinstance(event, StageFinished):
            self.finished.append(event)
            self._log(f"{event.verb}: {event.stage} took {duration(event.seconds)}")

    def say(self, text: str) -> None:
        """Show a text beside a spinner, until the next one or ``stop``."""
        if self.verbose or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.text import Text

        line = Text(shown(text))
        if self._status is None:
            self._status = Console(stderr=True).status(line)
            self._status.start()
        self._status.update(line)

    def stop(self) -> None:
        """Clear the line, so that others can write."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _log(self, text: str) -> None:
        if self.verbose:
            sys.stderr.write(f"{shown(text)}\n")
