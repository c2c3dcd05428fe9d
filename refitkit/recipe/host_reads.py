"""Ways by which values leave a recording as what is no tensor, and come back.

Numbers are read through an op, which the tape sees. Arrays of NumPy, lists, and exports to other
libraries are not: here the functions that give them are watched while a tape runs. What is done
with an array is watched here, too; that an array was read unseen (through
the buffer protocol, in C, by ``plain[:] = array``) is concluded by :mod:`refitkit.recipe.memories`.

Memory that is given away by its address, as a storage, a pickle or a handle can be read unseen, by
``ctypes`` or a library in C. Where code of a third party asks for one, numbers that appear after
that are not taken for literals (:mod:`refitkit.recipe.provenance`).

Code that takes a tensor as it is and reads it in C, a method of torch that was looked up before the
recording began, other threads and forked processes cannot be watched. There a weight that reaches
no slot, a slot that holds the bits of a weight (:mod:`refitkit.recipe.record`), and the proof by
trial remain. What is written unseen shows, as recipes are tried (:mod:`refitkit.recipe.record`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from refitkit.recipe.provenance import is_trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from refitkit.recipe.memories import Loans
    from refitkit.recipe.origins import Origin
    from refitkit.recipe.provenance import Provenance


_MAKERS = ("array", "asarray", "ascontiguousarray", "asfortranarray", "asanyarray", "require")
"""Functions of NumPy that give an array itself, or a copy of it, or one of several."""
_COPIERS = ("copyto", "frombuffer", "fromiter", "nditer")
"""Functions of NumPy that read arrays and do not ask them."""
_C, _AOTI = torch._C, torch._C._aoti  # noqa: SLF001 - what they give has no other name
_LEADING = (
    (_C, "_data_address", "the address"),
    (_C, "_to_dlpack", "a DLPack capsule"),
    (_C, "_to_dlpack_versioned", "a DLPack capsule"),
    (_AOTI, "unsafe_alloc_void_ptr_from_tensor", "a handle"),
    (_AOTI, "unsafe_alloc_void_ptrs_from_tensors", "a handle"),
)
"""Functions that give what leads to the memory of tensors."""
_STORAGE = (
    *("data_ptr", "tolist", "__getitem__", "_write_file", "_share_fd_cpu_", "_share_filename_cpu_"),
    *("_share_cuda_", "share_memory_", "cpu", "copy_", "__reduce__", "byteswap"),
)
"""Methods of storages that give their bytes or lead to them."""
_FRESH = ("arange", "eye", "full", "identity", "ones", "ones_like", "zeros", "zeros_like")
"""Functions of NumPy that give an array of numbers."""


class Recorder(Protocol):
    """What is told of values that leave it: a tape.

    Attributes:
        loans: Arrays of NumPy that were given out.
        provenance: Where values come from.
    """

    loans: Loans
    provenance: Provenance

    @property
    def is_on(self) -> bool:
        """Whether what happens now, in this thread, is recorded."""

    def sees(self, value: Any) -> bool:
        """Whether it is a tensor that is followed, and recording is on."""

    def paused(self) -> AbstractContextManager[None]:
        """See nothing until the end of the block."""

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Where a tensor's values come from."""

    def lent(self, tensor: torch.Tensor, array: np.ndarray, *, trusted: bool) -> None:
        """Its memory was given out as an array."""

    def escaped(self, tensor: torch.Tensor, origin: Origin, how: str) -> None:
        """Its values were given out in a way that nothing follows."""


@contextmanager
def watched(tape: Recorder) -> Iterator[None]:
    """Watch what leaves a tape, until the end of the block."""
    with ExitStack() as stack:
        patches: tuple[tuple[Any, str, Callable[[Recorder, Any], Any]], ...] = (
            (torch.Tensor, "numpy", _numpy),
            (torch.Tensor, "__array__", _array),
            (torch.Tensor, "__dlpack__", partial(_exporter, how="it is given away by DLPack")),
            (torch.utils.dlpack, "to_dlpack", partial(_exporter, how="it is given away by DLPack")),
            (torch.Tensor, "tolist", partial(_exporter, how="it becomes a list")),
            (torch.Tensor, "__setitem__", _setitem),
            (torch.Tensor, "data_ptr", _data_ptr),
            (torch.Tensor, "const_data_ptr", _data_ptr),
            (torch.Tensor, "__reduce_ex__", partial(_given, how="a pickle")),
            (torch.Tensor, "__cuda_array_interface__", _interface),
            *((owner, name, partial(_given, how=how)) for owner, name, how in _LEADING),
            *((torch.UntypedStorage, name, _storage) for name in _STORAGE),
            (torch.UntypedStorage, "clone", _clone),
            (torch, "tensor", _tensor),
            (torch, "as_tensor", _tensor),
            (torch, "asarray", _tensor),
            (torch.Tensor, "new_tensor", _new_tensor),
            (torch, "from_numpy", _from_numpy),
            (torch, "from_dlpack", _from_dlpack),
            (torch.utils.dlpack, "from_dlpack", _from_dlpack),
            *((np, name, _maker) for name in _MAKERS),
            *((np, name, _copier) for name in _COPIERS),
            *((np, name, _fresh) for name in _FRESH),
        )
        for owner, name, make in patches:
            if not hasattr(owner, name):  # another version of torch
                continue
            patched = make(tape, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield


def _left(tape: Recorder, tensor: torch.Tensor) -> Callable[[str], None]:
    with tape.paused():
        value = tensor.detach()
    return lambda how: tape.escaped(value, tape.origin_of(value), how)


def _numpy(tape: Recorder, real: Any) -> Any:
    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        array = real(self, *args, **kwargs)
        if not tape.sees(self):
            return array
        tape.lent(self, array, trusted=is_trusted())
        return watched_array(array, _left(tape, self))

    return numpy


def _array(tape: Recorder, real: Any) -> Any:
    """``Tensor.__array__``: NumPy makes a plain array of what it gives, and asks no more."""

    def array(self: torch.Tensor, dtype: Any = None, copy: bool | None = None) -> Any:  # noqa: FBT001 - NumPy's
        given = () if dtype is None else (dtype,)
        if not tape.sees(self):
            return real(self, *given)
        tape.escaped(self, tape.origin_of(self), "it becomes an array of NumPy")
        found = plain(real(self, *given))
        return found.copy() if copy else watched_array(found, None)

    return array


def _exporter(tape: Recorder, real: Any, *, how: str) -> Any:
    def export(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tape.sees(self):
            tape.escaped(self, tape.origin_of(self), how)
        return real(self, *args, **kwargs)

    return export


def _from_dlpack(tape: Recorder, real: Any) -> Any:
    def from_dlpack(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not tape.sees(data):
            return real(data, *args, **kwargs)
        with tape.paused():  # its memory is known
            return real(data, *args, **kwargs)

    return from_dlpack


def _setitem(tape: Recorder, real: Any) -> Any:
    """``tensor[index] = number``: torch makes a tensor of it where no op is seen."""

    def setitem(self: torch.Tensor, index: Any, value: Any) -> None:
        if isinstance(value, bool | int | float | complex) and tape.sees(self):
            with tape.paused():
                value = torch.tensor(value, dtype=self.dtype, device=self.device)
            tape.provenance.literal(value)
        real(self, index, value)

    return setitem


def _data_ptr(tape: Recorder, real: Any) -> Any:
    def data_ptr(self: torch.Tensor) -> Any:
        address = real(self)
        if tape.sees(self):
            tape.provenance.exported(self, address)
            if not is_trusted():
                tape.provenance.gave_memory(self, "the address")
        return address

    return data_ptr


def _given(tape: Recorder, real: Any, *, how: str) -> Any:
    """A function that gives what leads to the memory of its first argument, or holds a copy."""

    def give(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = [one for one in tree_leaves(self) if tape.sees(one)]
        if seen and not is_trusted():
            for one in seen:
                tape.provenance.gave_memory(one, how)
        return real(self, *args, **kwargs)

    return give


def _interface(tape: Recorder, real: Any) -> Any:
    def read(self: torch.Tensor) -> Any:
        if tape.sees(self) and not is_trusted():
            tape.provenance.gave_memory(self, "the address")
        return real.__get__(self)

    return property(read)


def _storage(tape: Recorder, real: Any) -> Any:
    """A method of storages that gives their bytes, their address, or another process's way in."""

    def give(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        if tape.is_on and not is_trusted():
            for one in (self, *args):
                if isinstance(one, torch.UntypedStorage):
                    tape.provenance.gave_storage(one, "the storage")
        return real(self, *args, **kwargs)

    return give


def _clone(tape: Recorder, real: Any) -> Any:
    def clone(self: torch.UntypedStorage) -> Any:
        with tape.paused():
            copy = real(self)
        tape.provenance.copied(self, copy)
        return copy

    return clone


def _tensor(tape: Recorder, real: Any) -> Any:
    """``torch.tensor`` and its like: they make tensors of numbers, arrays, and lists of tensors."""

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return real(data, *args, **kwargs)
        for one in tree_leaves(data):
            if tape.sees(one):
                tape.escaped(one, tape.origin_of(one), "a tensor is made of its number")
        with tape.paused():  # what it does inside is its own affair
            found = real(writable(data), *args, **kwargs)
        return _made(tape, data, found)

    return tensor


def _new_tensor(tape: Recorder, real: Any) -> Any:
    def new_tensor(self: torch.Tensor, data: Any, *args: Any, **kwargs: Any) -> Any:
        return _tensor(tape, partial(real, self))(data, *args, **kwargs)

    return new_tensor


def _from_numpy(tape: Recorder, real: Any) -> Any:
    def from_numpy(data: Any) -> Any:
        with tape.paused():
            found = real(writable(data))
        return _made(tape, data, found)

    return from_numpy


def _made(tape: Recorder, data: Any, found: Any) -> Any:
    """A tensor made of an array or of numbers: on a known memory, or a literal."""
    if tape.sees(found) and tape.provenance.knows_memory(found):
        tape.provenance.came_back(found)
    elif tape.sees(found):
        _tell(data, "a tensor is made of it")
        for one in tree_leaves(data):
            if isinstance(one, np.ndarray) and not isinstance(one, Watched):
                tape.loans.own(one)
        known = isinstance(data, np.ndarray) and tape.loans.knows(data)
        tape.provenance.literal(found, foreign=isinstance(data, np.ndarray), known=known)
    return found


def _tell(data: Any, how: str) -> None:
    for one in watched_in(data):
        one.tell(how)


def _maker(tape: Recorder, real: Any) -> Any:
    def make(data: Any, *args: Any, **kwargs: Any) -> Any:
        made = real(data, *args, **kwargs)
        if isinstance(data, Watched) and not isinstance(made, Watched):
            if np.may_share_memory(made, plain(data)):
                return watched_array(made, data.left)
            data.tell("NumPy copies it")
        elif made is not data:
            _tell(data, "NumPy copies it")
            if not any(isinstance(one, np.ndarray) for one in tree_leaves(data)):
                tape.loans.made(made, doubtful=bool(tape.provenance.unwatched.doubt))
        return made

    return make


def _copier(_: Recorder, real: Any) -> Any:
    def copy(*args: Any, **kwargs: Any) -> Any:
        _tell((args, kwargs), "NumPy copies it")
        return real(*args, **kwargs)

    return copy


def _fresh(tape: Recorder, real: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        _tell((args, kwargs) if real.__name__ == "full" else (), "NumPy copies it")
        doubt = tape.provenance.unwatched.doubt if real.__name__ == "full" else ""
        tape.loans.made(made, doubtful=bool(doubt))
        return made

    return make


# MERGED arrays: Arrays of NumPy on the memory of tensors that a recording follows.
#
# An array that is only passed on, as weights are to TensorRT, is known again by its memory; so
# are its views. One that is computed with, copied or looked into tells so. It cannot be written
# to: what torch would not see.

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
