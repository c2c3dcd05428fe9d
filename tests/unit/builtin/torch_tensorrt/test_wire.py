"""Messages between the user's process and its workers."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from refitkit.builtin.torch_tensorrt.worker import messages
from refitkit.builtin.torch_tensorrt.worker.client import SessionClient
from refitkit.errors import CompileError, EngineError, Problem, ToolchainError

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield mine, theirs


@pytest.mark.parametrize("message", [{}, None, "ä\0", [1, 2.5, None], {"x": "y" * 5_000_000}])
def test_messages_arrive_as_they_were_sent(pair: Pair, message: object) -> None:
    sender = threading.Thread(target=messages.send, args=(pair[0], message))
    sender.start()
    assert messages.receive(pair[1]) == message
    sender.join()


@pytest.mark.parametrize("cut", [0, 1, 8, 9])
def test_an_end_in_the_middle_is_an_end(pair: Pair, cut: int) -> None:
    pair[0].sendall((5).to_bytes(8, "little") + b'"ab"'[:1])
    whole = pair[1].recv(100)
    pair[0].sendall(whole[:cut])
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        messages.receive(pair[1])


def test_typed_errors_come_out_as_they_went_in() -> None:
    error = ToolchainError("no", problems=[Problem("a", "b", "c", "d", "e")], hint="do")
    found = messages.unpack_error(messages.pack_error(error))
    assert type(found) is ToolchainError
    assert (found.message, found.problems, found.hint) == ("no", error.problems, "do")


def test_other_errors_become_typed_and_say_what_they_were() -> None:
    found = messages.unpack_error(messages.pack_error(KeyError("x")))
    assert type(found) is EngineError
    assert "KeyError: 'x'" in str(found)
    unknown = {**messages.pack_error(CompileError("no")), "kind": "OfAPlugin"}
    assert type(messages.unpack_error(unknown)) is EngineError


def test_a_session_tells_of_progress_and_answers(pair: Pair) -> None:
    told: list[str] = []
    session = SessionClient(pair[0])
    for answer in ({"progress": "one"}, {"progress": "two"}, {"result": 3}):
        messages.send(pair[1], answer)
    assert session.call("anything", told.append, x=1) == 3
    assert told == ["one", "two"]
    assert messages.receive(pair[1]) == {"method": "anything", "arguments": {"x": 1}}
    assert session.alive


def test_an_error_of_a_session_does_not_end_it(pair: Pair) -> None:
    session = SessionClient(pair[0])
    messages.send(pair[1], {"error": messages.pack_error(CompileError("no"))})
    with pytest.raises(CompileError, match="no"):
        session.call("anything")
    assert session.alive


def test_who_listens_to_progress_may_fail(pair: Pair) -> None:
    """The answer that is still to come must not be read by the next call."""
    session = SessionClient(pair[0])
    for answer in ({"progress": "one"}, {"result": "of the first call"}):
        messages.send(pair[1], answer)

    def fails(_: str) -> None:
        raise RuntimeError("as told")

    with pytest.raises(RuntimeError, match="as told"):
        session.call("first", fails)
    assert not session.alive
    with pytest.raises(EngineError, match="died before 'second'"):
        session.call("second")


def test_a_session_that_is_gone_is_an_error_once_and_known_to_be_dead(pair: Pair) -> None:
    session = SessionClient(pair[0])
    pair[1].close()
    with pytest.raises(EngineError, match="died during 'anything'"):
        session.call("anything")
    assert not session.alive
