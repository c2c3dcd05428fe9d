"""Values that are written over live ones, without a way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable


class Overwriting:
    """A staged refit that writes when it is committed; see ``protocols.SupportsOverwrite``."""

    def __init__(self, write: Callable[[], None]) -> None:
        """Write nothing yet.

        Args:
            write: Reads the values and writes them over the live ones.
        """
        self._write = write
        self._begun = False

    def commit(self) -> None:
        """Write."""
        self._begun = True
        self._write()

    def rollback(self) -> None:
        """Refuse, once anything may have been written.

        Raises:
            EngineError: It may have been.
        """
        if self._begun:
            raise EngineError("The weights from before were given up: rollback=False.")

    def discard(self) -> None:
        """Leave all as it is: nothing was written."""

    def changed(self) -> None:
        """Nobody has compared: the values are read when they are written."""
