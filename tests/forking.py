"""Children that a test forks off, and their answers."""

from __future__ import annotations

import atexit
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60
"""Seconds after which a child that hangs is ended; only turns a hang into a failure."""


class KilledError(AssertionError):
    """A child was ended by a signal."""


class Child:
    """A forked child that does something and ends."""

    def __init__(self, do: Callable[[], Any], *, exits: bool = False) -> None:
        """Fork.

        Args:
            do: What it does; the result has to be one that ``pickle`` takes.
            exits: Whether it ends like ``sys.exit``, with what is registered at ``atexit``;
                otherwise like the children of ``multiprocessing``, with ``os._exit``.
        """
        reading, writing = os.pipe()
        self._crash = tempfile.TemporaryFile()  # noqa: SIM115 - closed once it was read
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is the test
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            faulthandler.enable(self._crash)
            _work(do, writing, exits=exits)
        os.close(writing)
        self._reading = reading

    def answer(self) -> Any:
        """Wait for it; what it returned."""
        with os.fdopen(self._reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        with self._crash as file:
            file.seek(0)
            where = file.read().decode()
        if os.WIFSIGNALED(status):
            raise KilledError(f"the child died of signal {os.WTERMSIG(status)}\n{where}")
        kind, value = pickle.loads(answer)  # noqa: S301 - of our own child
        assert kind == "returned", value
        return value


def forked(do: Callable[[], Any], *, exits: bool = False) -> Any:
    """What a forked child returns, when it has ended; see ``Child``."""
    return Child(do, exits=exits).answer()


def raised_by(do: Callable[[], Any]) -> str:
    """Name of the type of what it raises; empty if it returns."""
    try:
        do()
    except Exception as exc:  # noqa: BLE001 - its type is the answer
        return type(exc).__name__
    return ""


def _work(do: Callable[[], Any], writing: int, *, exits: bool) -> None:
    sys.settrace(None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        try:
            answer = ("returned", do())
        except BaseException:  # noqa: BLE001 - the parent reports it
            answer = ("raised", traceback.format_exc())
        if exits:
            atexit._run_exitfuncs()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)
