"""The client: starts the server once, and opens sessions that plan and build.

``SERVER`` is the only instance of :class:`Server` in a process. ``SERVER.session`` returns a
:class:`SessionClient`, which calls the methods of a ``server.WorkerSession``.
"""

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
from refitkit.builtin.torch_tensorrt.worker.messages import receive, send, unpack_error
from refitkit.errors import EngineError, ToolchainError

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVER_MODULE = "refitkit.builtin.torch_tensorrt.worker.server"


class Server:
    """The process that sessions are forked from. It starts at the first request."""

    def __init__(self) -> None:
        """Create a client without a process."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._owner = 0
        self._sessions: weakref.WeakSet[SessionClient] = weakref.WeakSet()
        self._hooks_registered = False

    def session(self, progress: Callable[[str], None]) -> SessionClient:
        """Start a new session.

        Args:
            progress: Called with one line of text, if the server has to start.

        Raises:
            ToolchainError: torch_tensorrt is not installed, or cannot be imported.
            EngineError: The server has ended.
        """
        with self._lock:
            channel = self._running_channel(progress)
            own_end, worker_end = socket.socketpair()
            try:
                socket.send_fds(channel, [b"f"], [worker_end.fileno()])
            except OSError as exc:
                self._stop()
                raise EngineError(f"The planning process has ended: {exc}. Try again.") from exc
            finally:
                worker_end.close()
            session = SessionClient(own_end)
            self._sessions.add(session)
        return session

    def _running_channel(self, progress: Callable[[str], None]) -> socket.socket:
        alive = self._process is not None and self._process.poll() is None
        if self._channel is not None and alive:
            return self._channel
        self._stop()
        if not upstream.is_installed():
            upstream.import_headless()  # raises an error with the packages to install
        progress("starting the planning process (it imports torch_tensorrt)")
        try:
            self._start()
            answer = self._first_answer()
        except BaseException:
            self._stop()  # after an interrupt, its late answer would be read as the next one
            raise
        if "error" in answer:
            self._stop()
            raise unpack_error(answer["error"])
        return self._current_channel()

    def _start(self) -> None:
        if not self._hooks_registered:
            atexit.register(self._stop)
            os.register_at_fork(after_in_child=self._reset_after_fork)
            self._hooks_registered = True
        self._channel, worker_end = socket.socketpair()
        self._owner = os.getpid()
        with worker_end:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: without it, modules in the working directory could shadow installed ones
                [sys.executable, "-P", "-m", _SERVER_MODULE, str(worker_end.fileno())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # output of libraries; results go through the socket
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # so that Ctrl-C reaches only the user's process
            )

    def _first_answer(self) -> Any:
        channel = self._current_channel()
        try:
            send(channel, sys.path)
            return receive(channel)
        except (EOFError, OSError) as exc:
            raise ToolchainError(
                "The process that imports torch_tensorrt died.",
                hint="Run `python -c 'import torch_tensorrt'` to see the reason.",
            ) from exc

    def _current_channel(self) -> socket.socket:
        if self._channel is None:
            raise EngineError("The planning process has ended. Try again.")
        return self._channel

    def _stop(self) -> None:
        channel, process = self._channel, self._process
        self._channel = self._process = None
        if self._owner != os.getpid():  # a forked process must not kill its parent's server
            return
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()  # it has no data, and its sessions continue without it
            process.wait()

    def _reset_after_fork(self) -> None:
        """Forget the server and the sessions of the parent, in a forked process.

        Open descriptors here would hide from the workers that the parent has ended, so this closes
        them.
        """
        self._lock = threading.Lock()  # another thread of the parent may have held the old one
        for session in self._sessions:
            session.close()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.returncode = 0  # otherwise its destructor warns about a running child
        self._channel = self._process = None


class SessionClient:
    """The client of one session, a process that has the networks of one program."""

    def __init__(self, channel: socket.socket) -> None:
        """Use ``Server.session`` instead."""
        self._channel = channel
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, channel.close)

    @property
    def alive(self) -> bool:
        """Whether the session can be called, as far as this process knows."""
        return self._finalizer.alive

    def call(
        self, method: str, progress: Callable[[str], None] = lambda _: None, **arguments: Any
    ) -> Any:
        """Call a method of the session, and wait for its result.

        Args:
            method: Name of a method of ``server.WorkerSession``.
            progress: Called with one line of text for each step.
            arguments: Keyword arguments of the method, as JSON data.

        Raises:
            RefitError: The session raised this error.
            EngineError: The session died, or belongs to the parent of this forked process.
        """
        if self._owner != os.getpid():
            raise EngineError(
                "The process with the networks belongs to the parent of this forked process.",
                hint="Load or compile the module in this process.",
            )
        with self._lock:
            if not self.alive:
                raise EngineError(f"The process with the networks died before {method!r}.")
            try:
                send(self._channel, {"method": method, "arguments": arguments})
                answer = receive(self._channel)
                while "progress" in answer:
                    progress(answer["progress"])
                    answer = receive(self._channel)
            except (EOFError, OSError) as exc:
                self.close()
                raise EngineError(
                    f"The process with the networks died during {method!r}.",
                    hint="Memory may have run out, or TensorRT crashed; see its log. "
                    "Try again: refitkit starts another process.",
                ) from exc
            except BaseException:
                self.close()  # its late answer would be read as that of the next call
                raise
        if "error" in answer:
            raise unpack_error(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the session."""
        self._finalizer()


SERVER = Server()
"""The server of this process. It starts nothing before the first request."""
