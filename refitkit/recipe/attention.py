"""When a recording looks at what happens: in its own thread, and not while it is paused."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Attention:
    """Of one recording.

    Attributes:
        paused: Whether nothing is to be seen, whoever does it.
    """

    def __init__(self) -> None:
        """Look, in this thread."""
        self.paused = False
        self._thread = threading.get_ident()

    def turn_here(self) -> None:
        """Look in this thread from now on."""
        self._thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether what happens now, in this thread, is to be seen."""
        return threading.get_ident() == self._thread and not self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See nothing until the end of the block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before
