"""The process that imports torch_tensorrt once and forks a session for whoever asks.

It makes no network and builds nothing itself: what is forked from it starts clean.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.worker import wire
from refitkit.builtin.torch_tensorrt.worker.session import Session
from refitkit.builtin.torch_tensorrt.worker.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator


def main() -> None:
    """Serve on the socket whose descriptor is the first argument, until its other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # sessions that end leave no zombies
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = wire.receive(channel)
    try:
        with _quietly():
            upstream.import_headless()
            with contextlib.suppress(Exception):  # sessions will fail alike, and tell it
                warm_up()
    except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
        wire.send(channel, {"error": wire.pack_error(exc)})
        return
    gc.collect()
    gc.freeze()  # or the first collection in each session would copy all of torch's objects
    wire.send(channel, {"ready": os.getpid()})
    while True:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            channel.close()
            _serve(descriptors[0])
        os.close(descriptors[0])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what libraries print, which all warn that there is no GPU, unless they fail."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(kept, aside.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _serve(descriptor: int) -> None:
    """Be a session, and never return."""
    code = 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with socket.socket(fileno=descriptor) as channel, contextlib.suppress(EOFError, OSError):
            Session(channel).serve()
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
