"""Arrays of NumPy on the memory of tensors that a recording follows.

An array that is only passed on, as weights are to TensorRT, is known again by its memory; so are
its views. One that is computed with, copied or looked into tells so. It cannot be written to: what
torch would not see.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_READERS = (
    "__bool__",
    "__buffer__",
    "__complex__",
    "__contains__",
    "__float__",
    "__format__",
    "__index__",
    "__int__",
    "__iter__",
    "__matmul__",
    "__reduce__",
    "__reduce_ex__",
    "__repr__",
    "__rmatmul__",
    "__str__",
    "argmax",
    "argmin",
    "argpartition",
    "argsort",
    "choose",
    "compress",
    "dot",
    "dump",
    "dumps",
    "getfield",
    "item",
    "nonzero",
    "repeat",
    "searchsorted",
    "take",
    "tobytes",
    "tofile",
    "tolist",
    "trace",
)
"""Methods of arrays that tell values and call no ufunc."""
_WAYS_IN = ("__array_interface__", "__array_struct__", "base", "ctypes", "data", "flat")
"""Attributes that lead to the memory."""
_OF_THE_SHAPE = frozenset(
    getattr(np, name)
    for name in (
        *("shape", "ndim", "size", "empty_like", "zeros_like", "ones_like", "result_type"),
        *("can_cast", "iscomplexobj", "isrealobj", "may_share_memory", "shares_memory"),
    )
)
"""Functions that tell nothing of values."""


class Watched(np.ndarray[Any, Any]):
    """An array on a tensor's memory that tells when its value is used."""

    left: Callable[[str], None] | None = None

    def __array_finalize__(self, made_from: Any) -> None:
        if isinstance(made_from, Watched):
            if np.may_share_memory(plain(self), plain(made_from)):
                self.left = made_from.left
            else:
                made_from.tell("NumPy copies it")

    def tell(self, how: str) -> None:
        """Say that its value was used."""
        if self.left is not None:
            self.left(how)

    def view(self, *args: Any, **kwargs: Any) -> Any:
        """A view of it; one that is not watched has left."""
        found = super().view(*args, **kwargs)
        if not isinstance(found, Watched):
            self.tell("NumPy reads it")
        return found

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for one in watched_in((inputs, kwargs)):
            one.tell(f"NumPy's {ufunc.__name__} reads it")
        if method == "at" and isinstance(inputs[0], Watched):  # it asks nobody whether it may
            raise ValueError("output array is read-only")
        return getattr(ufunc, method)(*_plain_all(inputs), **_plain_all(kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        found = func(*_plain_all(args), **_plain_all(kwargs))
        if func in _OF_THE_SHAPE:
            return found
        for one in watched_in((args, kwargs)):
            if isinstance(found, np.ndarray) and np.may_share_memory(found, plain(one)):
                return watched_array(found, one.left)
            one.tell(f"NumPy's {func.__name__} reads it")
        return found

    def __getitem__(self, key: Any) -> Any:
        for one in watched_in(key):
            one.tell("it is an index of NumPy's")
        found = super().__getitem__(_plain_all(key))
        if not isinstance(found, np.ndarray):
            self.tell("an element of it is read")
        return found

    def __bytes__(self) -> bytes:
        return self.tobytes()


def _reader(name: str) -> Callable[..., Any]:
    def read(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.tell(f"NumPy's {name} reads it")
        return getattr(plain(self), name)(*args, **kwargs)

    return read


def _way_in(name: str) -> property:
    def read(self: Watched) -> Any:
        self.tell(f"NumPy's {name} leads to it")
        return getattr(np.ndarray, name).__get__(self)

    return property(read)


for _name in _READERS:
    if hasattr(np.ndarray, _name):
        setattr(Watched, _name, _reader(_name))
for _name in _WAYS_IN:
    setattr(Watched, _name, _way_in(_name))


def watched_array(array: Any, left: Callable[[str], None] | None) -> Watched:
    """A view of an array that tells when its value is used; it cannot be written to."""
    seen = np.ndarray.view(array, Watched)
    seen.flags.writeable = False
    seen.left = left
    return seen


def plain(value: Any) -> Any:
    """An array without anybody who watches; anything else as it is."""
    return np.ndarray.view(value, np.ndarray) if isinstance(value, Watched) else value


def writable(value: Any) -> Any:
    """The same for somebody who may write to it: torch, which is seen."""
    found = plain(value)
    if isinstance(value, Watched) and not found.flags.writeable:
        with suppress(ValueError):  # what it is a view of was read-only before
            found.flags.writeable = True
    return found


def watched_in(value: Any) -> Iterator[Watched]:
    """The watched arrays in a value and in the lists, tuples and values of dicts in it."""
    if isinstance(value, Watched):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from watched_in(one)
    elif isinstance(value, dict):
        yield from watched_in(list(value.values()))


def _plain_all(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_all(one) for one in value]
    if type(value) is tuple:
        return tuple(_plain_all(one) for one in value)
    if isinstance(value, dict):
        return {name: _plain_all(one) for name, one in value.items()}
    return plain(value)
