"""Stored engine bytes that are older than the live engine, and who must not see them.

Upstream's objects keep the bytes that their engine was made from, and copy, pickle and save those
(``TorchTensorRTModule._pack_engine_info``, ``__deepcopy__``; ``TRTEngine.__getstate__``). A refit
in place makes them stale. Serializing takes longer than the refit itself, so it is put off until
somebody reads them: the child gets a class of its own meanwhile, a subclass that flushes first, and
the list in a ``TRTEngine`` is replaced by one that does. Both are gone after the flush.

Not covered: readers of ``vars(child)["serialized_engine"]`` and of ``TRTEngine.serialized_engine``
(upstream reads the latter only when it sets an engine up).
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

_FIRST = ("__deepcopy__", "__getstate__", "__reduce_ex__")
"""What reads a child's ``__dict__`` and not its attributes."""


class Stored:
    """The bytes of one engine, in all the places that keep them."""

    def __init__(
        self, write: Callable[[bytes], None], watch: Callable[[Stored], Callable[[], None]]
    ) -> None:
        """Nothing is stale.

        Args:
            write: Puts bytes into all places.
            watch: Has ``flush`` called before anybody reads the places; returns what ends that.
        """
        self._write = write
        self._watch = watch
        self._unwatch: Callable[[], None] | None = None
        self._serialize: Callable[[], bytes] | None = None
        self._lock = ForkedLock()

    def mark(self, serialize: Callable[[], bytes]) -> None:
        """From now on the bytes are what this returns, once somebody asks."""
        with self._lock.held:
            self._serialize = serialize
            if self._unwatch is None:
                self._unwatch = self._watch(self)

    def clear(self) -> Callable[[], bytes] | None:
        """The bytes are right as they are; returns what was to be called."""
        with self._lock.held:
            pending, self._serialize = self._serialize, None
            if self._unwatch is not None:
                unwatch, self._unwatch = self._unwatch, None
                unwatch()
            return pending

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Forget what is pending, unless what is done meanwhile fails: the engine is replaced.

        It is not called: the engine which it would serialize may be the one to go.
        """
        pending = self.clear()
        try:
            yield
        except BaseException:
            if pending is not None:
                self.mark(pending)
            raise

    def flush(self) -> None:
        """Bring the bytes up to date. When that fails they are still stale, and nobody saw them."""
        with self._lock.held:
            if self._serialize is not None:
                engine_bytes = self._serialize()
                self.clear()
                self._write(engine_bytes)


def watch_child(child: torch.nn.Module, stored: Stored) -> Callable[[], None]:
    """Flush before a child is copied, pickled, or asked for ``serialized_engine``.

    Returns:
        What ends that.
    """
    plain = type(child)
    child.__class__ = _watched(plain, stored)

    def unwatch() -> None:
        child.__class__ = plain

    return unwatch


def _watched(plain: type, stored: Stored) -> type:
    def get(self: Any) -> Any:
        stored.flush()
        return self.serialized_engine

    def put(self: Any, engine_bytes: Any) -> None:
        stored.clear()
        self.serialized_engine = engine_bytes

    def flushed_first(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            stored.flush()
            return getattr(self, name)(*args, **kwargs)

        return method

    members: dict[str, Any] = {name: flushed_first(name) for name in _FIRST}
    members["serialized_engine"] = property(get, put)
    members["__module__"] = plain.__module__
    members["__qualname__"] = plain.__qualname__
    return type(plain)(plain.__name__, (plain,), members)


def watch_engine(engine: Any, stored: Stored) -> Callable[[], None]:
    """Flush before anybody reads the list that a ``TRTEngine`` was made from.

    Returns:
        What ends that.
    """
    fields: list[Any] = engine.serialized_info
    engine.serialized_info = _FlushingList(engine, fields, stored)

    def unwatch() -> None:
        engine.serialized_info = fields

    return unwatch


class _FlushingList(list[Any]):
    """Stands for a list until somebody reads it.

    Whoever goes through C, as ``list.copy`` does, sees the fields as they were.
    """

    def __init__(self, engine: Any, fields: list[Any], stored: Stored) -> None:
        super().__init__(fields)
        self._engine = engine
        self._stored = stored

    def _fresh(self) -> list[Any]:
        self._stored.flush()
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
