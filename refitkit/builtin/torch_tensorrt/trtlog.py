"""What TensorRT says, kept to be told in an error instead of on stderr."""

from __future__ import annotations

import gc
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAKING = ForkedLock()
_KEPT = 20
_NOISE = "differs from one already registered"
"""Said of every logger but a process's first, as torch_tensorrt's is."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector off while a refitter or a runtime is made.

    TensorRT holds a lock of the whole process while it makes one, and calls our logger under it.
    A collection that starts in the logger can free another refitter or runtime that was garbage.
    Its destructor takes the same lock, so the thread would wait for itself for ever.
    """
    with _MAKING.held:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


class Listener:
    """Hears what one refitter or runtime has to say.

    Attributes:
        logger: A ``tensorrt.ILogger`` to make it with.
        recorder: A ``tensorrt.IErrorRecorder`` to assign to it: with one, errors come here even
            where TensorRT prefers another logger. Both have to live as long as it does.
    """

    def __init__(self, trt: Any) -> None:
        """Make both. TensorRT demands subclasses, of classes that exist only once it is imported.

        Args:
            trt: The package ``tensorrt``.
        """
        self._said: deque[str] = deque(maxlen=_KEPT)
        self.logger: Any = _logger_class(trt)(self._said)
        self.recorder: Any = _recorder_class(trt)(self._said)

    def take(self) -> tuple[str, ...]:
        """What was said since the last time."""
        said = tuple(self._said)
        self._said.clear()
        return said

    def quote(self) -> str:
        """What was said, as the end of a sentence."""
        said = self.take()
        return f"; TensorRT says: {' | '.join(said)}" if said else "; TensorRT gives no reason"


def _logger_class(trt: Any) -> type:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class Logger(trt.ILogger):  # type: ignore[misc] # of a package without types
        def __init__(self, said: deque[str]) -> None:
            trt.ILogger.__init__(self)
            self._said = said

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe and _NOISE not in msg:
                self._said.append(msg)

    return Logger


def _recorder_class(trt: Any) -> type:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc] # of a package without types
        def __init__(self, said: deque[str]) -> None:
            trt.IErrorRecorder.__init__(self)
            self._said = said

        def report_error(self, code: Any, desc: str) -> bool:  # noqa: ARG002 - TensorRT's
            self._said.append(desc)
            return True

        def num_errors(self) -> int:
            return len(self._said)

        def get_error_desc(self, index: int) -> str:
            return self._said[index]

        def get_error_code(self, index: int) -> Any:  # noqa: ARG002 - TensorRT's
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._said.clear()

    return Recorder
