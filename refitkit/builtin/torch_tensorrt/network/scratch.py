"""Files of one module, and the session that builds with them."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

from refitkit.errors import EngineError
from refitkit.processes import ForkedLock
from refitkit.temporary import TemporaryFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from refitkit.builtin.torch_tensorrt.worker.client import SessionClient


class Scratch:
    """A folder that is gone with the object, and files in it.

    They are those of the process that made them: in a fork of it they can only be read.
    """

    def __init__(self) -> None:
        """Make the folder."""
        self._folder = TemporaryFolder()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)

    def new(self, suffix: str) -> Path:
        """Where a new file can be written.

        Raises:
            EngineError: This process was forked from the one that made the module.
        """
        if os.getpid() != self._owner:
            raise EngineError(
                "The module was made in the process that this one was forked from, and can only be "
                "refitted there.",
                hint="Load or compile it in this process.",
            )
        return self._folder.path / f"{next(self._numbers)}.{suffix}"

    def remove(self, *paths: Path | None) -> None:
        """Delete files, if they are this process's; what is mapped stays readable."""
        if os.getpid() == self._owner:
            for path in filter(None, paths):
                path.unlink(missing_ok=True)


class Builder:
    """Builds parts with given values, in a session that is replaced when it has died.

    Sessions keep nothing of a build, so one that is new is as good as the old.
    """

    def __init__(self, session: SessionClient, again: Callable[[], SessionClient]) -> None:
        """Take a session.

        Args:
            session: Holds the networks.
            again: Makes another one with the same networks.
        """
        self._session, self._again = session, again
        self._lock = ForkedLock()

    def build(self, part: str, weights: Path, engine: Path) -> None:
        """Write the engine bytes of a part with these values.

        Raises:
            CompileError: TensorRT refused it.
            EngineError: The session died during this very build.
        """
        with self._lock.held:
            if not self._session.alive:
                self._session = self._again()
            session = self._session
        session.call("build", engine=part, path=str(engine), weights=str(weights))
