"""Sessions that die, are interrupted, or fail to build: the module is as before, and goes on."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import CompileError, EngineError, ResourceError
from refitkit.builtin.torch_tensorrt.worker import client, messages
from refitkit.builtin.torch_tensorrt.worker.client import SERVER, SessionClient
from tests.tensorrt.helpers import (
    CASES,
    bytes_of,
    children_of,
    compiled_from,
    needs_torch_tensorrt,
    sessions,
    values_of,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_torch_tensorrt
REBUILDING = refitkit.Pipeline({"strategies": ("rebuild",)})
CASE = CASES["transposed"]
"""Of one output: TensorRT-RTX orders several by chance, and bytes are compared here."""


@pytest.fixture(scope="module")
def scratch_bytes() -> list[dict[str, bytes]]:
    """Engines from scratch of two seeds."""
    return [bytes_of(compiled_from(CASE, seed)) for seed in (0, 1)]


def compiled_with_session(seed: int = 0) -> tuple[refitkit.CompiledModule, int]:
    """A module, and the process of its session."""
    gc.collect()
    before = sessions()
    compiled = compiled_from(CASE, seed)
    (session,) = sessions() - before
    return compiled, session


def weights(seed: int) -> dict[str, torch.Tensor]:
    return CASE.model(seed).state_dict()


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    wait_for_end(process)


def test_a_session_that_dies_between_calls_is_replaced(
    scratch_bytes: list[dict[str, bytes]],
) -> None:
    compiled, session = compiled_with_session()
    held = values_of(compiled)
    killed(session)
    assert same(values_of(compiled), held)
    assert bytes_of(compiled) == scratch_bytes[0]
    with pytest.raises(EngineError, match="died during 'build'") as info:
        refitkit.refit(compiled, weights(1))
    assert "Try again" in info.value.hint
    assert same(values_of(compiled), held)
    assert bytes_of(compiled) == scratch_bytes[0]
    refitkit.refit(compiled, weights(1))
    assert bytes_of(compiled) == scratch_bytes[1]


class Meddler:
    """Has something done whenever a session is asked for a build."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str = "build") -> None:
        self.calls: list[str] = []
        self.do: Callable[[], None] = lambda: None
        send = messages.send

        def sent(channel: Any, message: Any) -> None:
            send(channel, message)
            if isinstance(message, dict) and message.get("method"):
                self.calls.append(message["method"])
                if message["method"] == method:
                    self.do()

        monkeypatch.setattr(client, "send", sent)


def test_a_session_that_is_killed_in_a_build_leaves_the_module_as_it_was(
    monkeypatch: pytest.MonkeyPatch, scratch_bytes: list[dict[str, bytes]]
) -> None:
    """Its build dies with it: nobody would want the result."""
    compiled, session = compiled_with_session()
    held = values_of(compiled)
    meddler = Meddler(monkeypatch)

    def kill() -> None:
        while not (building := children_of(session)):
            pass
        builds.extend(building)
        os.kill(session, signal.SIGKILL)

    builds: list[int] = []
    meddler.do = kill
    with pytest.raises(EngineError, match="died during 'build'"):
        refitkit.refit(compiled, weights(1))
    meddler.do = lambda: None
    assert same(values_of(compiled), held)
    assert bytes_of(compiled) == scratch_bytes[0]
    for one in [session, *builds]:
        wait_for_end(one)
    refitkit.refit(compiled, weights(1))
    assert bytes_of(compiled) == scratch_bytes[1]


def test_a_build_that_is_killed_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, scratch_bytes: list[dict[str, bytes]]
) -> None:
    compiled, session = compiled_with_session()

    def kill() -> None:
        while not (building := children_of(session)):
            pass
        os.kill(building.pop(), signal.SIGKILL)

    meddler = Meddler(monkeypatch)
    meddler.do = kill
    with pytest.raises(CompileError, match="signal 9"):
        refitkit.refit(compiled, weights(1))
    meddler.do = lambda: None
    assert bytes_of(compiled) == scratch_bytes[0]
    refitkit.refit(compiled, weights(1))
    assert bytes_of(compiled) == scratch_bytes[1]
    assert session in sessions()


def test_a_session_that_is_killed_while_it_plans_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_from(CASE)
    gc.collect()
    before = sessions()
    meddler = Meddler(monkeypatch, "open")

    def kill() -> None:
        while not (new := sessions() - before):
            pass  # the server is asked to fork, and need not have done so yet
        os.kill(min(new), signal.SIGKILL)

    meddler.do = kill
    with pytest.raises(EngineError, match="died during 'open'"):
        compiled_from(CASE)


@pytest.mark.parametrize("method", ["open", "build"])
def test_an_interrupted_call_does_not_leave_its_answer_to_the_next(
    monkeypatch: pytest.MonkeyPatch, scratch_bytes: list[dict[str, bytes]], method: str
) -> None:
    """Once the next call took the answer of the interrupted one for its own."""
    compiled, session = compiled_with_session()
    held = values_of(compiled)
    receive = messages.receive
    armed: list[bool] = []

    def interrupted(channel: Any) -> Any:
        if armed and meddler.calls[-1:] == [method]:
            armed.clear()
            raise KeyboardInterrupt
        return receive(channel)

    meddler = Meddler(monkeypatch)
    monkeypatch.setattr(client, "receive", interrupted)
    armed.append(True)
    with pytest.raises(KeyboardInterrupt):
        REBUILDING.refit(compiled, CASE.program(1))
    assert same(values_of(compiled), held)
    assert bytes_of(compiled) == scratch_bytes[0]
    if method == "build":
        wait_for_end(session)
    refitkit.refit(compiled, weights(1), verify="engine-bytes")
    assert bytes_of(compiled) == scratch_bytes[1]


def test_an_interrupt_while_the_server_starts_leaves_no_half_started_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, session = compiled_with_session()
    assert SERVER._process is not None
    old = SERVER._process.pid
    killed(old)
    assert session  # it lives on without the server

    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            SERVER.session(lambda _: None)
    assert SERVER._process is None
    refitkit.refit(compiled, weights(1), verify="engine-bytes")
    process: Any = SERVER._process
    assert process.pid != old


def test_sessions_that_end_leave_no_zombies() -> None:
    compiled, session = compiled_with_session()
    del compiled
    gc.collect()
    wait_for_end(session)
    assert session not in sessions()


def test_ctrl_c_in_a_terminal_is_for_the_users_process_alone() -> None:
    """A terminal sends it to the whole process group."""
    _, session = compiled_with_session()
    assert os.getpgid(session) != os.getpgid(0)


def test_two_threads_refit_two_modules_at_once(scratch_bytes: list[dict[str, bytes]]) -> None:
    modules = [compiled_from(CASE, 0), compiled_from(CASE, 1)]
    states = [weights(0), weights(1)]  # not in the threads: they share the seed of the process
    failures: list[BaseException] = []

    def there_and_back(module: refitkit.CompiledModule, first: int) -> None:
        try:
            for seed in (1 - first, first, 1 - first):
                refitkit.refit(module, states[seed])
        except BaseException as exc:  # noqa: BLE001 - it is shown below
            failures.append(exc)

    threads = [
        threading.Thread(target=there_and_back, args=(one, first))
        for first, one in enumerate(modules)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures
    assert [bytes_of(one) for one in modules] == scratch_bytes[::-1]


@pytest.fixture
def in_fork() -> Iterator[Callable[[Callable[[], str]], str]]:
    """Runs something in a fork of this process; gives what it returned."""

    def run(do: Callable[[], str]) -> str:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                text = do()
            except BaseException as exc:  # noqa: BLE001 - told to the parent
                text = f"{type(exc).__name__}: {exc}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        os.waitpid(child, 0)
        return said

    return run


def test_a_fork_reads_and_leaves_the_rest_to_its_parent(
    in_fork: Callable[[Callable[[], str]], str], scratch_bytes: list[dict[str, bytes]]
) -> None:
    """It shared the socket, the files, and the duty to remove them."""
    compiled, _ = compiled_with_session()
    held = values_of(compiled)

    def child() -> str:
        assert same(values_of(compiled), held)
        compiled.free_spare()
        try:
            refitkit.refit(compiled, weights(1), verify="none")
        except EngineError as exc:
            said = str(exc)
        opened: Any = compiled.opened
        opened.__dict__.clear()
        gc.collect()
        return said

    assert "belongs to the parent of this forked process" in in_fork(child)
    assert bytes_of(compiled) == scratch_bytes[0]
    refitkit.refit(compiled, weights(1))
    refitkit.refit(compiled, weights(0))
    assert bytes_of(compiled) == scratch_bytes[0]


def test_a_fork_has_no_end_of_the_parents_sockets(
    in_fork: Callable[[Callable[[], str]], str],
) -> None:
    """Or the processes at the other ends would not see that the parent is gone."""
    compiled, _ = compiled_with_session()
    opened: Any = compiled.opened
    client: SessionClient = opened.planned.session

    def child() -> str:
        return f"{client.alive} {client._channel.fileno()} {SERVER._channel}"

    assert in_fork(child) == "False -1 None"
    assert client.alive


def test_a_fork_calling_a_session_is_refused(in_fork: Callable[[Callable[[], str]], str]) -> None:
    compiled, _ = compiled_with_session()
    opened: Any = compiled.opened
    assert "belongs to the parent of this forked process" in in_fork(
        lambda: str(opened.planned.session.call("values"))
    )


# -- every call of a refit fails in turn ----------------------------------------------------------


@pytest.mark.parametrize("verify", ["weights", "engine-bytes"])
def test_every_call_of_a_refit_fails_in_turn(
    monkeypatch: pytest.MonkeyPatch, scratch_bytes: list[dict[str, bytes]], verify: str
) -> None:
    compiled = compiled_from(CASE)
    held = values_of(compiled)
    call = SessionClient.call
    calls: list[str] = []
    failing = [-1]

    def counted(self: SessionClient, method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        if len(calls) - 1 == failing[0]:
            raise EngineError(f"as told, at call {failing[0]}")
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(SessionClient, "call", counted)
    REBUILDING.refit(compiled, weights(1), verify=verify)
    assert bytes_of(compiled) == scratch_bytes[1]
    assert {"open", "values", "build"} <= set(calls)
    count = len(calls)
    failing[0] = -1
    refitkit.refit(compiled, weights(0), verify="none")
    for number in range(count):
        calls.clear()
        failing[0] = number
        with pytest.raises(EngineError, match=f"at call {number}$"):
            REBUILDING.refit(compiled, weights(1), verify=verify)
        assert same(values_of(compiled), held)
        assert bytes_of(compiled) == scratch_bytes[0]
        assert compiled.version == 2
    failing[0] = -1
    refitkit.refit(compiled, weights(1), verify=verify)
    assert bytes_of(compiled) == scratch_bytes[1]


def test_a_full_disk_is_an_error_and_no_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Writing to a mapped file that gets no room raises SIGBUS."""
    import errno

    compiled = compiled_from(CASE)
    before = bytes_of(compiled)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(messages.os, "posix_fallocate", full)
        with pytest.raises(ResourceError, match="No space left"):
            refitkit.refit(compiled, weights(1))
    assert bytes_of(compiled) == before
    refitkit.refit(compiled, weights(1))
