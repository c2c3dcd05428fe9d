"""Ways by which values leave a recording as what is no tensor.

Numbers are read through an op, which the tape sees. Arrays of NumPy, lists, and addresses are not:
here the methods that give them are watched while a tape runs. An array that is only passed on,
as weights are to TensorRT, is known again by its memory; one that NumPy computes with has left.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.recipe.tape import Tape

_READERS = (
    "__bool__",
    "__bytes__",
    "__complex__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "__iter__",
    "__matmul__",
    "__rmatmul__",
    "argmax",
    "argmin",
    "argpartition",
    "argsort",
    "choose",
    "compress",
    "diagonal",
    "dot",
    "dump",
    "dumps",
    "item",
    "nonzero",
    "put",
    "repeat",
    "searchsorted",
    "take",
    "tobytes",
    "tofile",
    "tolist",
    "trace",
)
"""Methods of arrays that tell values and call no ufunc."""
_MAKERS = ("array", "asarray", "ascontiguousarray", "asanyarray", "require")
"""Functions of NumPy that give the array itself, or a copy of it, as a plain array."""


class Watched(np.ndarray[Any, Any]):
    """An array on a tensor's memory, or made from one, that tells the tape when it is used."""

    left: Callable[[str], None] | None = None

    def __array_finalize__(self, made_from: Any) -> None:
        self.left = getattr(made_from, "left", None)

    def tell(self, how: str) -> None:
        """Say that its value was used."""
        if self.left is not None:
            self.left(how)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for one in inputs:
            if isinstance(one, Watched):
                one.tell(f"NumPy's {ufunc.__name__} reads it")
        given = kwargs.get("out", ())
        if any(isinstance(one, Watched) for one in given):
            raise TypeError("a weight would be written to through NumPy")
        return getattr(ufunc, method)(*map(_plain, inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self.tell(f"NumPy's {func.__name__} reads it")
        return func(*_plain_all(args), **_plain_all(kwargs))

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(found, np.ndarray):
            self.tell("an element of it is read")
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a weight would be written to through NumPy")


def _reader(name: str) -> Callable[..., Any]:
    def read(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.tell(f"NumPy's {name} reads it")
        return getattr(_plain(self), name)(*args, **kwargs)

    return read


for _name in _READERS:
    setattr(Watched, _name, _reader(_name))


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Watched) else value


def _plain_all(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_plain_all, value))
    if isinstance(value, dict):
        return {name: _plain_all(one) for name, one in value.items()}
    return _plain(value)


@contextmanager
def watched(tape: Tape) -> Iterator[None]:
    """Watch what leaves a tape, until the end of the block."""
    with ExitStack() as stack:
        for owner, name, make in (
            (torch.Tensor, "numpy", _numpy),
            (torch.Tensor, "__array__", _array),
            (torch.Tensor, "tolist", _tolist),
            (torch.Tensor, "data_ptr", _data_ptr),
            (torch.UntypedStorage, "clone", _clone),
            (torch, "tensor", _tensor),
            (torch, "as_tensor", _tensor),
            (torch, "asarray", _tensor),
            (torch.Tensor, "new_tensor", _new_tensor),
            (torch, "from_numpy", _from_numpy),
            *((np, name, _maker) for name in _MAKERS),
        ):
            patched = make(tape, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield


def _left(tape: Tape, tensor: torch.Tensor) -> Callable[[str], None]:
    origin = tape.origin_of(tensor)
    with tape.paused():
        value = tensor.detach()
    return lambda how: tape.escaped(value, origin, how)


def _numpy(tape: Tape, real: Any) -> Any:
    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        array = real(self, *args, **kwargs)
        if not tape.sees(self):
            return array
        seen: Watched = array.view(Watched)
        seen.left = _left(tape, self)
        return seen

    return numpy


def _array(tape: Tape, real: Any) -> Any:
    def array(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tape.sees(self):
            tape.escaped(self, tape.origin_of(self), "it becomes an array of NumPy")
        return real(self, *args, **kwargs)

    return array


def _tolist(tape: Tape, real: Any) -> Any:
    def tolist(self: torch.Tensor) -> Any:
        if tape.sees(self):
            tape.escaped(self, tape.origin_of(self), "it becomes a list")
        return real(self)

    return tolist


def _data_ptr(tape: Tape, real: Any) -> Any:
    def data_ptr(self: torch.Tensor) -> Any:
        address = real(self)
        if tape.sees(self):
            tape.exported(self, address)
        return address

    return data_ptr


def _clone(tape: Tape, real: Any) -> Any:
    def clone(self: torch.UntypedStorage) -> Any:
        copy = real(self)
        tape.copied(self, copy)
        return copy

    return clone


def _tensor(tape: Tape, real: Any) -> Any:
    """``torch.tensor`` and its like: they make tensors of numbers, arrays, and lists of tensors."""

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return real(data, *args, **kwargs)
        for one in tree_leaves(data):
            if tape.sees(one):
                tape.escaped(one, tape.origin_of(one), "a tensor is made of its number")
        with tape.paused():  # what it does inside is its own affair
            found = real(_plain(data), *args, **kwargs)
        return _made(tape, data, found)

    return tensor


def _new_tensor(tape: Tape, real: Any) -> Any:
    def new_tensor(self: torch.Tensor, data: Any, *args: Any, **kwargs: Any) -> Any:
        return _tensor(tape, partial(real, self))(data, *args, **kwargs)

    return new_tensor


def _from_numpy(tape: Tape, real: Any) -> Any:
    def from_numpy(data: Any) -> Any:
        with tape.paused():
            found = real(data)
        return _made(tape, data, found)

    return from_numpy


def _made(tape: Tape, data: Any, found: Any) -> Any:
    """A tensor made of an array or of numbers: on a known memory, or a literal."""
    if tape.sees(found) and not tape.knows(found):
        if isinstance(data, Watched):
            data.tell("a tensor is made of what NumPy made of it")
        tape.literal(found)
    return found


def _maker(_: Tape, real: Any) -> Any:
    def make(data: Any, *args: Any, **kwargs: Any) -> Any:
        made = real(data, *args, **kwargs)
        if isinstance(data, Watched) and not isinstance(made, Watched):
            made = made.view(Watched)
            made.left = data.left
        return made

    return make
