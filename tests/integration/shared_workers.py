"""A model whose outputs show which weights answered, and processes that serve it together.

A module of its own, because processes that are not forked import what they run.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import refitkit
from refitkit.builtin.aotinductor import shared as shared_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PATIENCE = 120
"""Seconds after which a worker that hangs fails its test."""

SIDE = 512
INPUTS = (torch.ones(256, SIDE),)
"""A call of so many rows takes longer than a refit that verifies nothing."""


class Even(nn.Module):
    """Two weights, each full of one number; both are in the outputs."""

    def __init__(self, value: float, side: int = SIDE) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((side, side), float(value)))
        self.b = nn.Parameter(torch.full((side, side), float(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ self.a, x @ self.b], -1)


def weights(value: float) -> dict[str, torch.Tensor]:
    return Even(value).state_dict()


def answer(compiled: refitkit.CompiledModule) -> float:
    """The number that all weights of one call are full of; -1 for a mixture."""
    found = compiled(*INPUTS) / SIDE
    return float(found.min()) if found.min() == found.max() else -1.0


class Worker:
    """A process that serves from shared weights and does what it is asked."""

    def __init__(self, given: Any, path: Path, kind: str = "fork") -> None:
        """Start it.

        Args:
            given: A module, for a forked process, or shared weights.
            path: File of the module.
            kind: How the process is started.
        """
        context = multiprocessing.get_context(kind)
        self._pipe, theirs = context.Pipe()
        process: Any = getattr(context, "Process")  # noqa: B009 - contexts have no type for it
        self.process = process(target=work, args=(given, path, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, name: str, *args: Any) -> None:
        self._pipe.send((name, *args))

    def hear(self) -> Any:
        assert self._pipe.poll(PATIENCE), "the worker does not answer"
        return self._pipe.recv()

    def ask(self, name: str, *args: Any) -> Any:
        self.tell(name, *args)
        return self.hear()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(PATIENCE)
        assert self.process.exitcode == -signal.SIGKILL

    def end(self) -> None:
        with suppress(OSError):  # it is dead
            self.tell("end")
        self.process.join(5)
        self.process.kill()  # one that hangs has failed its test already
        self.process.join()
        self._pipe.close()


def work(given: Any, path: Path, pipe: Connection) -> None:
    """Do what the other end of a pipe asks for, until it says ``end``."""
    torch.set_num_threads(1)
    is_module = isinstance(given, refitkit.CompiledModule)
    compiled = given if is_module else refitkit.load(path, shared=given)
    while (asked := pipe.recv())[0] != "end":
        name, *args = asked
        try:
            pipe.send(globals()["do_" + name](compiled, pipe, *args))
        except refitkit.RefitError as exc:
            pipe.send((type(exc).__name__, str(exc)))


def do_call(compiled: refitkit.CompiledModule, pipe: Connection) -> tuple[float, int]:
    """The answer, and the version of the weights."""
    return answer(compiled), compiled.version


def do_refit(
    compiled: refitkit.CompiledModule, pipe: Connection, value: float, verify: str = "outputs"
) -> int:
    refitkit.refit(compiled, weights(value), inputs=INPUTS, verify=verify)
    return compiled.version


def do_fail(compiled: refitkit.CompiledModule, pipe: Connection, value: float) -> int:
    refitkit.refit(compiled, weights(value), inputs=INPUTS, reference=lambda x: x)
    return compiled.version


def do_restore(compiled: refitkit.CompiledModule, pipe: Connection, version: int) -> int:
    compiled.restore(version)
    return compiled.version


def do_serve(compiled: refitkit.CompiledModule, pipe: Connection) -> list[float]:
    """Call all the time until the next message; the different answers, in their order."""
    pipe.send("serving")
    found: list[float] = []
    while not pipe.poll():
        value = answer(compiled)
        if not found or found[-1] != value:
            found.append(value)
    pipe.recv()
    return found


def do_stop(compiled: refitkit.CompiledModule, pipe: Connection, where: str, value: float) -> None:
    """Refit, and stand still forever at some place."""

    def stand_still(*_: Any) -> None:
        pipe.send(where)
        signal.pause()

    staged, write = shared_memory.StagedShared, shared_memory.write
    commit = staged.commit

    def write_one(into: torch.Tensor, one: Any) -> None:
        write(into, one)
        stand_still()

    def commit_first(self: Any) -> None:
        commit(self)
        stand_still()

    if where == "staging":
        shared_memory.write = write_one
    elif where == "staged":
        staged.commit = stand_still
    elif where == "committed":
        staged.commit = commit_first
    refitkit.refit(compiled, weights(value), inputs=INPUTS)


# -- what the kernel knows ----------------------------------------------------------------------


def memory_of(compiled: refitkit.CompiledModule) -> shared_memory.SharedWeights:
    found = compiled.shared
    assert isinstance(found, shared_memory.SharedWeights)
    return found


def is_locked(memory: shared_memory.SharedWeights, byte: int) -> bool:
    """Whether any process has a lock on a byte: 0 for refits, 1 and more for sets."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0)
    fd = os.open(f"/proc/self/fd/{memory._fd}", os.O_RDWR)
    try:
        return struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != (
            fcntl.F_UNLCK
        )
    finally:
        os.close(fd)


def locked(memory: shared_memory.SharedWeights) -> list[int]:
    return [byte for byte in range(1 + shared_memory.SETS) if is_locked(memory, byte)]


def memfds(key: int, pid: int | str = "self") -> int:
    """Number of descriptors of some shared weights that a process has open."""
    folder, found = Path(f"/proc/{pid}/fd"), 0
    for one in folder.iterdir():
        try:
            mine = "memfd:refitkit" in str(one.readlink())
            found += mine and one.stat().st_ino == key
        except FileNotFoundError:  # that of the folder
            continue
    return found


def pages(key: int, kind: str, pid: int | str = "self") -> int:
    """Bytes of some shared weights that a process has mapped: ``Size``, ``Rss``, or its ``Pss``."""
    size, mine = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word = line.split()
        if "-" in word[0]:
            mine = "/memfd:refitkit" in line and word[4] == str(key)
        elif mine and word[0] == f"{kind}:":
            size += int(word[1]) * 1024
    return size
