"""The user's end: starting the server once, and sessions that plan and build."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.worker import messages
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
        self._sessions: weakref.WeakSet[SessionClient] = weakref.WeakSet()
        self._hooked = False

    def session(self, progress: Callable[[str], None]) -> SessionClient:
        """A new session.

        Raises:
            ToolchainError: torch_tensorrt is not installed, or cannot be imported.
        """
        with self._lock:
            channel = self._ready(progress)
            mine, theirs = socket.socketpair()
            try:
                socket.send_fds(channel, [b"f"], [theirs.fileno()])
            except OSError as exc:
                self._stop()
                raise EngineError(f"The planning process is gone: {exc}. Try again.") from exc
            finally:
                theirs.close()
            session = SessionClient(mine)
            self._sessions.add(session)
        return session

    def _ready(self, progress: Callable[[str], None]) -> socket.socket:
        alive = self._process is not None and self._process.poll() is None
        if self._channel is not None and alive:
            return self._channel
        self._stop()
        if not upstream.is_installed():
            upstream.import_headless()  # raises, and says what to install
        progress("starting a process that plans (it imports torch_tensorrt)")
        try:
            self._start()
            answer = self._first_answer()
        except BaseException:
            self._stop()  # interrupted, it would take what comes next for what it waits for
            raise
        if "error" in answer:
            self._stop()
            raise messages.unpack_error(answer["error"])
        return self._running()

    def _start(self) -> None:
        if not self._hooked:
            atexit.register(self._stop)
            os.register_at_fork(after_in_child=self._forget)
            self._hooked = True
        self._channel, theirs = socket.socketpair()
        self._owner = os.getpid()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: modules of the working directory are nobody's to import
                [sys.executable, "-P", "-m", _SERVER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print there is no result of ours
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # Ctrl-C in a terminal is for the user's process
            )

    def _first_answer(self) -> Any:
        channel = self._running()
        try:
            messages.send(channel, sys.path)
            return messages.receive(channel)
        except (EOFError, OSError) as exc:
            raise ToolchainError(
                "The process that imports torch_tensorrt died.",
                hint="`python -c 'import torch_tensorrt'` may show why.",
            ) from exc

    def _running(self) -> socket.socket:
        if self._channel is None:
            raise EngineError("The planning process is gone. Try again.")
        return self._channel

    def _stop(self) -> None:
        channel, process = self._channel, self._process
        self._channel = self._process = None
        if self._owner != os.getpid():
            return
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()  # it holds nothing; sessions live on without it
            process.wait()

    def _forget(self) -> None:
        """In a fork of the user's process: leave what is the parent's to the parent.

        A descriptor that stays open here would hide from the other ends that the parent is gone.
        """
        self._lock = threading.Lock()
        for session in self._sessions:
            session.close()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.returncode = 0  # or its end would warn of a child that still runs
        self._channel = self._process = None


class SessionClient:
    """One session: a process that holds the networks of one program."""

    def __init__(self, channel: socket.socket) -> None:
        """Made by ``Server.session``."""
        self._channel = channel
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, channel.close)

    @property
    def alive(self) -> bool:
        """Whether it can be asked: nothing has ended it that is known here."""
        return self._finalizer.alive

    def call(
        self, method: str, progress: Callable[[str], None] = lambda _: None, **arguments: Any
    ) -> Any:
        """Have the session do something; waits.

        Args:
            method: Name of a method of ``session.Session``.
            progress: Called with one line of text for each step.
            arguments: What JSON can hold.

        Raises:
            RefitError: As the session raised it.
            EngineError: The session died, or is another process's.
        """
        if self._owner != os.getpid():
            raise EngineError(
                "The process that holds the networks belongs to the one that this was forked from.",
                hint="Load or compile the module in this process.",
            )
        with self._lock:
            if not self.alive:
                raise EngineError(f"The process that holds the networks died before {method!r}.")
            try:
                messages.send(self._channel, {"method": method, "arguments": arguments})
                answer = messages.receive(self._channel)
                while "tell" in answer:
                    progress(answer["tell"])
                    answer = messages.receive(self._channel)
            except (EOFError, OSError) as exc:
                self.close()
                raise EngineError(
                    f"The process that holds the networks died during {method!r}.",
                    hint="Memory may have run out, or TensorRT crashed: its log says more. "
                    "Try again: another one is started.",
                ) from exc
            except BaseException:
                self.close()  # its late answer would be taken for that of the next call
                raise
        if "error" in answer:
            raise messages.unpack_error(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the session."""
        self._finalizer()


SERVER = Server()
"""The one server of this process; it starts nothing until it is asked."""
