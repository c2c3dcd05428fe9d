"""The user's end: starting the server once, and sessions that plan and build."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.worker import wire
from refitkit.errors import EngineError, ToolchainError

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVER = "refitkit.builtin.torch_tensorrt.worker.server"


class Server:
    """The process that sessions are forked from; there is one, started when it is first needed."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._owner = 0

    def session(self, tell: Callable[[str], None]) -> SessionClient:
        """A new session.

        Raises:
            ToolchainError: torch_tensorrt is not installed, or cannot be imported.
        """
        with self._lock:
            channel = self._ready(tell)
            mine, theirs = socket.socketpair()
            try:
                socket.send_fds(channel, [b"f"], [theirs.fileno()])
            except OSError as exc:
                self._stop()
                raise EngineError(f"The planning process is gone: {exc}. Try again.") from exc
            finally:
                theirs.close()
        return SessionClient(mine)

    def _ready(self, tell: Callable[[str], None]) -> socket.socket:
        alive = self._process is not None and self._process.poll() is None
        if self._channel is not None and alive and self._owner == os.getpid():
            return self._channel
        if not upstream.is_installed():
            upstream.import_headless()  # raises, and says what to install
        tell("starting a process that plans (it imports torch_tensorrt)")
        mine, theirs = socket.socketpair()
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", _SERVER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print there is no result of ours
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        theirs.close()
        self._channel, self._owner = mine, os.getpid()
        atexit.register(self._stop)
        try:
            wire.send(mine, sys.path)
            answer = wire.receive(mine)
        except (EOFError, OSError) as exc:
            self._stop()
            raise ToolchainError(
                "The process that imports torch_tensorrt died.",
                hint="`python -c 'import torch_tensorrt'` may show why.",
            ) from exc
        if "error" in answer:
            self._stop()
            raise wire.unpack_error(answer["error"])
        return mine

    def _stop(self) -> None:
        channel, process = self._channel, self._process
        self._channel = self._process = None
        if self._owner != os.getpid():
            return
        if channel is not None:
            channel.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
            process.wait()


class SessionClient:
    """One session: a process that holds the networks of one program."""

    def __init__(self, channel: socket.socket) -> None:
        """Made by ``Server.session``."""
        self._channel = channel
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, channel.close)

    def call(
        self, method: str, tell: Callable[[str], None] = lambda _: None, **arguments: Any
    ) -> Any:
        """Have the session do something; waits.

        Args:
            method: Name of a method of ``session.Session``.
            tell: Tells of progress.
            arguments: What JSON can hold.

        Raises:
            RefitError: As the session raised it.
            EngineError: The session died.
        """
        with self._lock:
            try:
                wire.send(self._channel, {"method": method, "arguments": arguments})
                answer = wire.receive(self._channel)
                while "tell" in answer:
                    tell(answer["tell"])
                    answer = wire.receive(self._channel)
            except (EOFError, OSError) as exc:
                raise EngineError(
                    f"The process that holds the networks died during {method!r}.",
                    hint="Memory may have run out, or TensorRT crashed: its log says more.",
                ) from exc
        if "error" in answer:
            raise wire.unpack_error(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the session."""
        self._finalizer()


SERVER = Server()
"""The one server of this process; it starts nothing until it is asked."""
