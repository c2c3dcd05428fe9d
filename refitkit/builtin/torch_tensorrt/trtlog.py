"""What TensorRT says, kept to be told in an error instead of on stderr."""

from __future__ import annotations

from collections import deque
from typing import Any

_KEPT = 20


def make_log(trt: Any) -> Any:
    """A ``tensorrt.ILogger`` that keeps warnings and errors.

    TensorRT demands a subclass of its own class, which exists only once it is imported. The logger
    has to live as long as what was made with it.

    Args:
        trt: The package ``tensorrt``.

    Returns:
        A logger whose ``take()`` returns what was said since the last time, and forgets it.
    """
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class Log(trt.ILogger):  # type: ignore[misc] # of a package without types
        """Keeps the latest few messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._said: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, msg: str) -> None:
            """Called by TensorRT, from any thread."""
            if severity in severe:
                self._said.append(msg)

        def take(self) -> tuple[str, ...]:
            """What was said."""
            said = tuple(self._said)
            self._said.clear()
            return said

    return Log()


def quoted(said: tuple[str, ...]) -> str:
    """Messages as the end of a sentence."""
    return f"; TensorRT says: {' | '.join(said)}" if said else "; TensorRT gives no reason"
