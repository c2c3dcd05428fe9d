"""Messages between the user's process and its workers: a length, then JSON.

Both ends are ours and no other process can reach the socket; tensors go through files.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from refitkit.errors import EngineError, Problem, RefitError, resource_error

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_LENGTH = struct.Struct("<Q")


def send(channel: socket.socket, message: Any) -> None:
    """Send one message: anything that JSON can hold."""
    content = json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(content)) + content)


def receive(channel: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError: The other end is gone.
    """
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    return json.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def pack_error(exc: BaseException) -> dict[str, Any]:
    """An exception as a message."""
    if not isinstance(exc, RefitError):
        what = "The planning process failed"
        refused = resource_error(exc, what)
        return pack_error(refused or EngineError(f"{what}: {type(exc).__name__}: {exc}"))
    return {
        "kind": type(exc).__name__,
        "message": exc.message,
        "problems": [problem.as_dict() for problem in exc.problems],
        "hint": exc.hint,
    }


def unpack_error(packed: dict[str, Any]) -> RefitError:
    """The exception that was packed."""
    kind = {one.__name__: one for one in _kinds(RefitError)}.get(packed["kind"], EngineError)
    problems = [Problem(**problem) for problem in packed["problems"]]
    error: RefitError = kind(packed["message"], problems=problems, hint=packed["hint"])
    return error


def _kinds(root: type[RefitError]) -> Iterator[type[RefitError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)
