"""Weights in memory that processes share, and who may use which part of it. Linux only.

The memory is a memfd: a header, and ``SETS`` sets of weights. A word in the header holds the
version and the number of the live set, so one store of 8 bytes publishes new weights everywhere.
Locks of the kernel (open file description locks, ``fcntl(2)``) say who uses a set. The kernel
drops those of a process that dies, so nobody has to clean up:

- A call locks the live set shared, and looks again at the word. If that has moved, it tries again.
- A refit locks ``_REFITS`` exclusively, so refits of all processes follow one another. Then it
  locks a set that is not live exclusively, and writes there. Only refits wait for locks.

A lock belongs to an open file description, which forks share. So each lock has a description of
its own (``Description``), and a forked child closes those of its parent.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import sys
import time
import weakref
from multiprocessing import reduction
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from refitkit.builtin.aotinductor.native import ALIGNMENT
from refitkit.errors import ConfigError, EngineError, RefitInProgressError, refused
from refitkit.program.dtypes import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

SETS = 3
"""Live weights, those before or after them, and those that a slow call still reads."""

PATIENCE = 60.0
"""Seconds that a refit waits for calls that read all sets but the live one."""

_POLL = 0.001  # seconds
_MAGIC = int.from_bytes(b"refit\0\0\1", sys.byteorder)
# places in the header, in bytes; those of 8 bytes for each set leave room
_LENGTH, _WORD, _HOLDS, _HAS_MEMORY, _LAYOUT = 8, 64, 128, 192, 256
_NUMBER = 0xFF  # of a set, in the word; the version is above it
_REFITS = 0  # the byte that a refit locks; the next ones are those of the sets


# -- locks ------------------------------------------------------------------------------------


class _Flock(ctypes.Structure):
    """``struct flock`` of ``fcntl(2)``."""

    _fields_ = (
        ("type", ctypes.c_short),
        ("whence", ctypes.c_short),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("pid", ctypes.c_int),
    )


# With the GIL, which takes long to get back from busy threads: this function never waits.
_fcntl = ctypes.PyDLL(None).fcntl
_fcntl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]


def _flocks(kind: int) -> list[tuple[_Flock, Any]]:
    """Return the lock of each byte, and a pointer to it."""
    locks = [_Flock(kind, 0, byte, 1) for byte in range(1 + SETS)]
    return [(lock, ctypes.byref(lock)) for lock in locks]


_SHARED, _EXCLUSIVE = _flocks(fcntl.F_RDLCK), _flocks(fcntl.F_WRLCK)
_FREE = _Flock(fcntl.F_UNLCK, 0, 0, 1 + SETS)
_TO_FREE = ctypes.byref(_FREE)


class Description:
    """An open file description of the shared memory, for locks of one owner in this process.

    It holds its locks until ``release``, or until the last reference to it goes.
    """

    def __init__(self, memory: int) -> None:
        """Open nothing yet.

        Args:
            memory: File descriptor of the memory.
        """
        self._memory, self._fd, self._pid = memory, -1, -1
        _descriptions.add(self)

    @property
    def is_open(self) -> bool:
        """Whether it may hold locks; no longer in a child that was forked meanwhile."""
        return self._fd >= 0

    def require_own(self) -> None:
        """Check that this process has opened the description.

        Raises:
            EngineError: It was forked off the process that has.
        """
        if not self.is_open:
            raise EngineError(
                "The process was forked during a refit of shared weights.",
                hint="That refit goes on in the parent. Start another one in the child.",
            )

    def lock(self, byte: int, *, exclusive: bool = False) -> bool:
        """Lock a byte if nobody else has a lock against that. Replaces a lock of its own.

        Raises:
            ResourceError: The system refused.
        """
        wanted, pointer = (_EXCLUSIVE if exclusive else _SHARED)[byte]
        if self._fd < 0:
            self._open()
        if not _fcntl(self._fd, fcntl.F_OFD_SETLK, pointer):
            return True
        try:  # again, for the reason
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, bytes(wanted))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as exc:
            raise refused(exc, _LOCKING) from exc
        return True

    def wait(self, byte: int) -> None:
        """Lock a byte exclusively, as soon as nobody else has a lock on it.

        Raises:
            ResourceError: The system refused.
        """
        try:
            self._open()
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, bytes(_EXCLUSIVE[byte][0]))
        except OSError as exc:
            raise refused(exc, _LOCKING) from exc

    def _open(self) -> None:
        try:
            # a second descriptor of one description would share its locks
            self._fd = os.open(f"/proc/self/fd/{self._memory}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise refused(exc, _LOCKING) from exc
        self._pid = os.getpid()

    def release(self) -> None:
        """Release all locks, and stay open."""
        _fcntl(self._fd, fcntl.F_OFD_SETLK, _TO_FREE)

    def close(self) -> None:
        """Release all locks."""
        # Not just closed: a child that is being forked may have the description open, too. And
        # such a child leaves the locks alone, if ``forked`` has not reached this yet.
        if self._pid == os.getpid():
            self.release()
        self._close()

    def forked(self) -> None:
        """Leave the locks to the parent; called in a forked child."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():  # then the system closes it
            self.close()


class Hold(Description):
    """Keeps the values of a set as they are, for those who read its tensors."""

    index = -1  # number of the set

    def close(self) -> None:
        """Release the lock, unless a child that is being forked has yet to take its own."""
        self._close()

    def forked(self) -> None:
        """Take a lock of this process's own before the parent's is given up."""
        inherited, self._fd = self._fd, -1
        try:
            if inherited >= 0 and self.index >= 0:
                self.lock(1 + self.index)
        finally:
            if inherited >= 0:
                os.close(inherited)


_LOCKING = "The shared weights cannot be locked"
_descriptions: weakref.WeakSet[Description] = weakref.WeakSet()


class _Refit(NamedTuple):
    """A refit of a thread of this process; it is over once its turn is unlocked."""

    turn: Lock
    thread: int
    writer: Description


_refits: dict[int, _Refit] = {}
"""The last refit of each memory in this process, by ``SharedWeights.key``."""


def _let_go(refit: _Refit | None) -> None:
    """Release the locks of a refit that is over, but was interrupted before it did so."""
    if refit is not None and not refit.turn.locked():
        refit.writer.close()


def _after_fork_in_child() -> None:
    for key in [key for key, refit in _refits.items() if refit.thread != get_ident()]:
        del _refits[key]
    for description in tuple(_descriptions):
        description.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


# -- the memory -------------------------------------------------------------------------------


class SharedWeights:
    """Weights that several processes serve from; see ``refitkit.protocols.SharedMemory``.

    Pickle it only through ``multiprocessing``: as an argument of a process, or over its pipes and
    queues. Forked children just use it.

    Attributes:
        layout: Dtype, shape and strides of each slot, by name.
        key: Number of the memory, equal in all processes.
    """

    def __init__(self, fd: int) -> None:
        """Map memory that ``holding`` made.

        Args:
            fd: File descriptor, which belongs to this object from now on.

        Raises:
            ConfigError: It is another file, or of another version of refitkit.
        """
        self._fd = fd
        self.key = os.fstat(fd).st_ino
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        if self._number(0).value != _MAGIC:
            raise ConfigError(
                "These shared weights were made by another version of refitkit.",
                hint="Start all processes from one installation.",
            )
        length = self._number(_LENGTH).value
        self.layout: dict[str, list[Any]] = json.loads(self._memory[_LAYOUT : _LAYOUT + length])
        self._start, self._size = _places(self.layout, length)
        self._word = self._number(_WORD)
        # what each set holds: one more than a version, or 0 if its values are not whole
        self._holds = [self._number(_HOLDS + 8 * index) for index in range(SETS)]
        self._has_memory = [self._number(_HAS_MEMORY + 8 * index) for index in range(SETS)]

    @classmethod
    def holding(cls, tensors: Mapping[str, torch.Tensor], version: int) -> SharedWeights:
        """Return new memory that holds these weights.

        Args:
            tensors: Dense tensors on the CPU, by slot.
            version: Their version.

        Raises:
            ConfigError: This system has no memory that processes share in this way.
            ResourceError: The system refused the memory.
        """
        if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_OFD_SETLK"):
            raise ConfigError(
                "Weights are shared between processes on Linux only.",
                hint="Load the module in each process.",
            )
        layout = layout_of(tensors)
        text = json.dumps(layout).encode()
        start, size = _places(layout, len(text))
        try:
            fd = os.memfd_create("refitkit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as exc:
            raise refused(exc, "Memory cannot be shared") from exc
        try:
            os.ftruncate(fd, start + SETS * size)
            # A file that somebody cuts would end all processes with SIGBUS.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            header = b"".join(number.to_bytes(8, sys.byteorder) for number in (_MAGIC, len(text)))
            os.pwrite(fd, header, 0)
            os.pwrite(fd, text, _LAYOUT)
        except BaseException:
            os.close(fd)
            raise
        shared = cls(fd)
        # as a refit, so that a system without such locks is found out now
        shared.refit(lambda: shared._fill(tensors, version))
        return shared

    def _fill(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        self._allocate(0)
        with torch.no_grad():
            for name, tensor in self.tensors(0).items():
                tensor.copy_(tensors[name])
        self.publish(0, version)

    def _number(self, place: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_buffer(self._memory, place)

    def __reduce__(self) -> Any:
        """Give a process that ``multiprocessing`` starts, or talks to, the same memory."""
        return _received, (reduction.DupFd(self._fd),)

    def __repr__(self) -> str:
        return f"<SharedWeights, {len(self.layout)} slots, weights version {self.version}>"

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            os.close(self._fd)

    @property
    def version(self) -> int:
        """Version of the live weights."""
        return self._word.value >> 8

    @property
    def live(self) -> int:
        """Number of the live set."""
        return self._word.value & _NUMBER

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a set, by slot: aliases of the memory."""
        place, found = self._start + index * self._size, {}
        for name, (dtype, shape, strides) in self.layout.items():
            kind, nbytes = dtype_of(dtype), _nbytes(dtype, shape)
            flat = torch.empty(0, dtype=kind)
            if nbytes:
                part = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=place)
                flat = part.view(kind)
            found[name] = flat.as_strided(shape, strides)
            place += _aligned(nbytes, ALIGNMENT)
        return found

    # -- reading ------------------------------------------------------------------------------

    def description(self) -> Description:
        """Return a description for the locks of calls that follow one another."""
        return Description(self._fd)

    def enter(self, description: Description) -> int:
        """Lock the live set for a call, and return its number. It waits for nobody."""
        while True:
            index = self._word.value & _NUMBER
            # Refused only if a refit writes there by now, and so another set is live.
            if description.lock(1 + index) and self._word.value & _NUMBER == index:
                return index
            description.release()

    def hold(self) -> Hold:
        """Return a hold on the live set."""
        hold = Hold(self._fd)
        hold.index = self.enter(hold)
        return hold

    # -- refits -------------------------------------------------------------------------------

    def refit(self, do: Callable[[], T]) -> T:
        """Return the result of a function, run while no other process refits.

        Raises:
            RefitInProgressError: This thread is inside a refit of another module on this memory.
            ResourceError: The system refused.
        """
        if self.is_refitting:
            raise RefitInProgressError(
                "A refit of shared weights was started from inside a refit of the same weights.",
                hint="Refit them after the first refit has returned.",
            )
        turn, writer = Lock(), Description(self._fd)
        with turn:  # in C, so no interrupt leaves it locked
            try:
                _let_go(_refits.get(self.key))
                writer.wait(_REFITS)
                _refits[self.key] = _Refit(turn, get_ident(), writer)
                return do()
            finally:
                writer.close()

    @property
    def is_refitting(self) -> bool:
        """Whether this thread is inside ``refit``, so that no values that it reads can change."""
        refit = _refits.get(self.key)
        return refit is not None and refit.thread == get_ident() and refit.turn.locked()

    def writer(self) -> Description:
        """Return the description of the refit that this thread is in, or of a new one.

        Raises:
            EngineError: The refit was begun by the parent of this process.
        """
        if self.is_refitting:
            writer = _refits[self.key].writer
            writer.require_own()
        else:
            writer = Description(self._fd)
            writer.wait(_REFITS)
        return writer

    def take(self, writer: Description) -> int:
        """Return the number of a set that nobody uses, to write to. Its values are lost.

        Raises:
            EngineError: Calls use all sets for too long.
            ResourceError: There is no memory for another set.
        """
        live, until = self.live, time.monotonic() + PATIENCE
        # a set that has memory rather than a new one, and the previous values last
        others = sorted(
            set(range(SETS)) - {live},
            key=lambda index: (not self._has_memory[index].value, self._holds[index].value),
        )
        while True:
            for index in others:
                if writer.lock(1 + index, exclusive=True):
                    self._holds[index].value = 0
                    self._allocate(index)
                    return index
            if time.monotonic() > until:
                raise EngineError(
                    f"Calls have used all spare sets of the shared weights for {PATIENCE:.0f} s.",
                    hint="Look for processes that were stopped inside a call, or try again.",
                )
            time.sleep(_POLL)

    def _allocate(self, index: int) -> None:
        if self._has_memory[index].value:
            return
        try:
            # Without it, a lack of memory would be a SIGBUS in the middle of a copy.
            os.posix_fallocate(self._fd, self._start + index * self._size, self._size)
        except OSError as exc:
            raise refused(exc, "There is no shared memory for another set of weights") from exc
        self._has_memory[index].value = 1

    def publish(self, index: int, version: int) -> None:
        """Make a set live in all processes, by one store."""
        self._word.value = version << 8 | index
        # After it: a process that dies in between leaves a set that is no version's previous one.
        self._holds[index].value = version + 1

    def drop(self, index: int) -> None:
        """Note that the values of a set that is not live are not to be used."""
        self._holds[index].value = 0

    def previous(self) -> int | None:
        """Return the number of the set that was live before the last commit, if it is whole."""
        word = self._word.value
        found = [
            index
            for index, holds in enumerate(self._holds)
            if holds.value == word >> 8 and holds.value and index != word & _NUMBER
        ]
        return found[0] if found else None

    def free_spare(self) -> int:
        """Give the memory of all sets that nobody uses back to the system; return the bytes."""
        freed, writer, live = 0, self.writer(), self.live
        for index in set(range(SETS)) - {live}:
            if self._has_memory[index].value and writer.lock(1 + index, exclusive=True):
                self._holds[index].value = self._has_memory[index].value = 0
                start = self._start + index * self._size
                self._memory.madvise(mmap.MADV_REMOVE, start, self._size)
                freed += self._size
        return freed


def _received(sent: Any) -> SharedWeights:
    return SharedWeights(sent.detach())


def layout_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Return dtype, shape and strides of each tensor, sorted by name."""
    return {
        name: [dtype_name(tensor.dtype), list(tensor.shape), list(tensor.stride())]
        for name, tensor in sorted(tensors.items())
    }


def _places(layout: Mapping[str, Sequence[Any]], length: int) -> tuple[int, int]:
    """Return where the first set begins, and the size of each, in bytes: whole pages."""
    size = sum(_aligned(_nbytes(dtype, shape), ALIGNMENT) for dtype, shape, _ in layout.values())
    return _aligned(_LAYOUT + length, mmap.PAGESIZE), _aligned(max(size, 1), mmap.PAGESIZE)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype_of(dtype).itemsize


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
