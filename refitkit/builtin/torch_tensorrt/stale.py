"""Serialized engines that a target stores, brought up to date only when other code reads them.

Upstream's objects keep the bytes that their engine was created from, and copy, pickle and save
these bytes (``TorchTensorRTModule._pack_engine_info``, ``__deepcopy__``;
``TRTEngine.__getstate__``). A refit in place makes the bytes stale. Serializing takes longer than
the refit itself, so ``StoredBytes`` puts it off until the bytes are read.

To notice a reader, ``watch_child`` gives the child module a subclass of its own class, and
``watch_engine`` replaces the list in a ``TRTEngine``. Both serialize before the read. After that,
class and list are the original ones again.

Two readers are not noticed: ``vars(child)["serialized_engine"]`` and
``TRTEngine.serialized_engine``. Upstream reads the latter only when it sets an engine up.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

_DICT_READERS = ("__deepcopy__", "__getstate__", "__reduce_ex__")
"""Methods that read a child's ``__dict__``, so a property of the subclass does not notice them."""


class StoredBytes:
    """The serialized engine of one engine, in all places that store it."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        watch: Callable[[StoredBytes], Callable[[], None]],
    ) -> None:
        """Start with bytes that are up to date.

        Args:
            write: Writes bytes to all places.
            watch: Arranges that ``flush`` is called before other code reads one of the places.
                Returns a function that undoes this.
        """
        self._write = write
        self._watch = watch
        self._unwatch: Callable[[], None] | None = None
        self._serialize: Callable[[], bytes] | None = None
        self._lock = ForkedLock()

    def mark(self, serialize: Callable[[], bytes]) -> None:
        """Mark the bytes as stale.

        Args:
            serialize: Returns the new bytes. It is called before the first read.
        """
        with self._lock.held:
            self._serialize = serialize
            if self._unwatch is None:
                self._unwatch = self._watch(self)

    def clear(self) -> Callable[[], bytes] | None:
        """Mark the bytes as up to date. Return the pending serialization, if there was one."""
        with self._lock.held:
            pending, self._serialize = self._serialize, None
            if self._unwatch is not None:
                unwatch, self._unwatch = self._unwatch, None
                unwatch()
            return pending

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the engine in the body; a pending serialization is dropped unless that fails.

        The serialization does not run: it may need the very engine that the body removes.
        """
        pending = self.clear()
        try:
            yield
        except BaseException:
            if pending is not None:
                self.mark(pending)
            raise

    def flush(self) -> None:
        """Bring the bytes up to date. If serializing raises, they stay marked as stale."""
        # two threads that read at once must not serialize twice; the lock is reentrant
        with self._lock.held:
            if self._serialize is not None:
                engine_bytes = self._serialize()
                self.clear()  # restores the plain class and list, which `_write` then writes to
                self._write(engine_bytes)


def watch_child(child: torch.nn.Module, stored: StoredBytes) -> Callable[[], None]:
    """Flush before a child is copied, pickled, or asked for ``serialized_engine``.

    Args:
        child: Module of upstream's that stores a serialized engine.
        stored: The bytes to flush.

    Returns:
        Function that restores the class of the child.
    """
    original = type(child)
    child.__class__ = _watched_class(original, stored)

    def unwatch() -> None:
        child.__class__ = original

    return unwatch


def _watched_class(original: type, stored: StoredBytes) -> type:
    """A subclass whose methods flush, which restores the original class, and then run again."""

    def get(self: Any) -> Any:
        stored.flush()
        return self.serialized_engine  # of the original class by now, so this does not recurse

    def put(self: Any, engine_bytes: Any) -> None:
        stored.clear()
        self.serialized_engine = engine_bytes

    def flushed_first(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            stored.flush()
            return getattr(self, name)(*args, **kwargs)

        return method

    members: dict[str, Any] = {name: flushed_first(name) for name in _DICT_READERS}
    members["serialized_engine"] = property(get, put)
    # so that `repr` and error messages name the upstream class
    members["__module__"] = original.__module__
    members["__qualname__"] = original.__qualname__
    return type(original)(original.__name__, (original,), members)


def watch_engine(engine: Any, stored: StoredBytes) -> Callable[[], None]:
    """Flush before the list is read that a ``TRTEngine`` was created from.

    Args:
        engine: A ``TRTEngine`` of the Python runtime.
        stored: The bytes to flush.

    Returns:
        Function that restores the list.
    """
    fields: list[Any] = engine.serialized_info
    engine.serialized_info = _FlushingList(engine, fields, stored)

    def unwatch() -> None:
        engine.serialized_info = fields

    return unwatch


class _FlushingList(list[Any]):
    """Replaces a list until it is read.

    Functions in C that skip these methods, such as ``list.copy``, read the stale fields.
    """

    def __init__(self, engine: Any, fields: list[Any], stored: StoredBytes) -> None:
        super().__init__(fields)
        self._engine = engine
        self._stored = stored

    def _fresh(self) -> list[Any]:
        self._stored.flush()  # puts the original list back into the engine
        super().__init__(self._engine.serialized_info)
        return list.copy(self)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._fresh())

    def __getitem__(self, key: Any) -> Any:
        return self._fresh()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._stored.clear()
        self._engine.serialized_info[key] = value
        super().__setitem__(key, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copy.deepcopy(self._fresh(), memo)

    def __reduce_ex__(self, _: Any) -> Any:
        return (list, (self._fresh(),))

    def copy(self) -> list[Any]:
        return self._fresh()
