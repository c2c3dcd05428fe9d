"""Watch how values leave a recording without an op, and how they come back.

A tape sees every op, so it sees each read of a number (``item``). It does not see NumPy arrays,
lists and exports to other libraries. While a tape runs, this module patches the functions that
create those, in torch and in NumPy. It also watches what code does with a NumPy array on a tensor's
memory, through a subclass of ``numpy.ndarray``.

Three kinds of reads remain that a patch cannot see:

- Code reads an array through the buffer protocol, in C, or by ``plain[:] = array``.
  :class:`refitkit.recipe.memories.NumpyExports` infers these reads.
- Code receives an address, a storage, a pickle or a handle, and reads it with ``ctypes`` or in C.
  :class:`refitkit.recipe.provenance.ExposedMemory` then distrusts all later numbers.
- Code passes a tensor itself to C, calls a torch method that it looked up before the recording, or
  runs in another thread or process. Three checks remain: a weight that reaches no slot, a slot
  that holds the bits of a weight (:mod:`refitkit.recipe.record`), and the proof of a plan.

Unseen writes show up when recipes are tried (:mod:`refitkit.recipe.record`).

Read :func:`watch_host_reads` first: it lists all patches. Each ``_patch_*`` function returns the
replacement for one function of torch or NumPy. :class:`WatchedArray` comes last.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from refitkit.recipe.provenance import is_trusted_caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from refitkit.recipe.memories import NumpyExports
    from refitkit.recipe.origins import Origin
    from refitkit.recipe.provenance import Provenance


_CONVERTERS = ("array", "asarray", "ascontiguousarray", "asfortranarray", "asanyarray", "require")
"""NumPy functions that return their argument, a copy of it, or one array of several."""
_READERS = ("copyto", "frombuffer", "fromiter", "nditer")
"""NumPy functions that read arrays without calling a method of them."""
_CREATORS = ("arange", "eye", "full", "identity", "ones", "ones_like", "zeros", "zeros_like")
"""NumPy functions that create an array from numbers."""
_C, _AOTI = torch._C, torch._C._aoti  # noqa: SLF001 - there are no public names
_EXPOSING = (
    (_C, "_data_address", "the address"),
    (_C, "_to_dlpack", "a DLPack capsule"),
    (_C, "_to_dlpack_versioned", "a DLPack capsule"),
    (_AOTI, "unsafe_alloc_void_ptr_from_tensor", "a handle"),
    (_AOTI, "unsafe_alloc_void_ptrs_from_tensors", "a handle"),
)
"""Functions that expose the memory of tensors: owner, name, and the form that they return."""
_STORAGE_METHODS = (
    *("data_ptr", "tolist", "__getitem__", "_write_file", "_share_fd_cpu_", "_share_filename_cpu_"),
    *("_share_cuda_", "share_memory_", "cpu", "copy_", "__reduce__", "byteswap"),
)
"""Methods of storages that return their bytes or expose their memory."""
_COPIED = "copied by NumPy"
"""Reason of a host read."""


class HostReadRecorder(Protocol):
    """The recording that host reads are reported to: a tape.

    Attributes:
        exports: NumPy arrays that the recorded code received.
        provenance: Origins of the recorded values.
    """

    exports: NumpyExports
    provenance: Provenance

    @property
    def is_on(self) -> bool:
        """Whether the recording records the current thread now."""

    def sees(self, value: Any) -> bool:
        """Return whether a value is a tracked tensor and the recording is on."""

    def paused(self) -> AbstractContextManager[None]:
        """Pause the recording until the end of the block."""

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Return the origin of the present value of a tensor."""

    def record_export(self, tensor: torch.Tensor, array: np.ndarray, *, trusted: bool) -> None:
        """Record that code received a NumPy array on the memory of a tensor."""

    def record_read(self, tensor: torch.Tensor, origin: Origin, reason: str) -> None:
        """Record that code read the values of a tensor."""


@contextmanager
def watch_host_reads(tape: HostReadRecorder) -> Iterator[None]:
    """Report host reads to a tape until the end of the block."""
    with ExitStack() as stack:
        dlpack = partial(_patch_export, reason="exported by DLPack")
        patches: tuple[tuple[Any, str, Callable[[HostReadRecorder, Any], Any]], ...] = (
            (torch.Tensor, "numpy", _patch_numpy),
            (torch.Tensor, "__array__", _patch_array),
            (torch.Tensor, "__dlpack__", dlpack),
            (torch.utils.dlpack, "to_dlpack", dlpack),
            (torch.Tensor, "tolist", partial(_patch_export, reason="converted to a list")),
            (torch.Tensor, "__setitem__", _patch_setitem),
            (torch.Tensor, "data_ptr", _patch_data_ptr),
            (torch.Tensor, "const_data_ptr", _patch_data_ptr),
            (torch.Tensor, "__reduce_ex__", partial(_patch_exposing, form="a pickle")),
            (torch.Tensor, "__cuda_array_interface__", _patch_interface),
            *(
                (owner, name, partial(_patch_exposing, form=form))
                for owner, name, form in _EXPOSING
            ),
            *((torch.UntypedStorage, name, _patch_storage_method) for name in _STORAGE_METHODS),
            (torch.UntypedStorage, "clone", _patch_clone),
            (torch, "tensor", _patch_tensor),
            (torch, "as_tensor", _patch_tensor),
            (torch, "asarray", _patch_tensor),
            (torch.Tensor, "new_tensor", _patch_new_tensor),
            (torch, "from_numpy", _patch_from_numpy),
            (torch, "from_dlpack", _patch_from_dlpack),
            (torch.utils.dlpack, "from_dlpack", _patch_from_dlpack),
            *((np, name, _patch_converter) for name in _CONVERTERS),
            *((np, name, _patch_reader) for name in _READERS),
            *((np, name, _patch_creator) for name in _CREATORS),
        )
        for owner, name, patch in patches:
            # Names differ between the versions of torch that refitkit supports.
            if not hasattr(owner, name):
                continue
            patched = patch(tape, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield


# -- patches: tensors that become something else ----------------------------------------------


def _read_callback(tape: HostReadRecorder, tensor: torch.Tensor) -> Callable[[str], None]:
    """Return a function that reports a read of the value that a tensor has when it is called."""
    with tape.paused():
        value = tensor.detach()
    return lambda reason: tape.record_read(value, tape.origin_of(value), reason)


def _patch_numpy(tape: HostReadRecorder, real: Any) -> Any:
    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        array = real(self, *args, **kwargs)
        if not tape.sees(self):
            return array
        tape.record_export(self, array, trusted=is_trusted_caller())
        return watch_array(array, _read_callback(tape, self))

    return numpy


def _patch_array(tape: HostReadRecorder, real: Any) -> Any:
    """Return a patch of ``Tensor.__array__`` that reports the read at once.

    NumPy turns the result into a plain array, so a watched array would report nothing.
    """

    def array(self: torch.Tensor, dtype: Any = None, copy: bool | None = None) -> Any:  # noqa: FBT001 - NumPy's
        options = () if dtype is None else (dtype,)
        if not tape.sees(self):
            return real(self, *options)
        tape.record_read(self, tape.origin_of(self), "converted to a NumPy array")
        plain = plain_array(real(self, *options))
        return plain.copy() if copy else watch_array(plain, None)

    return array


def _patch_export(tape: HostReadRecorder, real: Any, *, reason: str) -> Any:
    def export(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tape.sees(self):
            tape.record_read(self, tape.origin_of(self), reason)
        return real(self, *args, **kwargs)

    return export


def _patch_data_ptr(tape: HostReadRecorder, real: Any) -> Any:
    def data_ptr(self: torch.Tensor) -> Any:
        address = real(self)
        if tape.sees(self):
            tape.provenance.record_address(self, address)
            if not is_trusted_caller():
                tape.provenance.expose_memory(self, "the address")
        return address

    return data_ptr


def _patch_exposing(tape: HostReadRecorder, real: Any, *, form: str) -> Any:
    """Return a patch of a function that exposes or copies the memory of its first argument."""

    def expose(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Some of these functions take a list of tensors.
        seen = [one for one in tree_leaves(self) if tape.sees(one)]
        if seen and not is_trusted_caller():
            for one in seen:
                tape.provenance.expose_memory(one, form)
        return real(self, *args, **kwargs)

    return expose


def _patch_interface(tape: HostReadRecorder, real: Any) -> Any:
    def read(self: torch.Tensor) -> Any:
        if tape.sees(self) and not is_trusted_caller():
            tape.provenance.expose_memory(self, "the address")
        return real.__get__(self)

    return property(read)


def _patch_storage_method(tape: HostReadRecorder, real: Any) -> Any:
    """Return a patch of a storage's method that returns bytes, an address or a shared handle."""

    def method(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        if tape.is_on and not is_trusted_caller():
            for one in (self, *args):
                if isinstance(one, torch.UntypedStorage):
                    tape.provenance.expose_storage(one, "the storage")
        return real(self, *args, **kwargs)

    return method


def _patch_clone(tape: HostReadRecorder, real: Any) -> Any:
    def clone(self: torch.UntypedStorage) -> Any:
        with tape.paused():
            copy = real(self)
        tape.provenance.record_storage_copy(self, copy)
        return copy

    return clone


# -- patches: numbers and arrays that become tensors ------------------------------------------


def _patch_setitem(tape: HostReadRecorder, real: Any) -> Any:
    """Return a patch of ``Tensor.__setitem__`` that records an assigned number as a literal.

    Torch turns ``tensor[index] = number`` into a tensor below the dispatcher, where no op is seen.
    """

    def setitem(self: torch.Tensor, index: Any, value: Any) -> None:
        if isinstance(value, bool | int | float | complex) and tape.sees(self):
            with tape.paused():
                value = torch.tensor(value, dtype=self.dtype, device=self.device)
            tape.provenance.record_literal(value)
        real(self, index, value)

    return setitem


def _patch_tensor(tape: HostReadRecorder, real: Any) -> Any:
    """Return a patch of a function that creates a tensor from numbers, arrays or tensors."""

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return real(data, *args, **kwargs)
        for one in tree_leaves(data):
            if tape.sees(one):
                tape.record_read(one, tape.origin_of(one), "used as a number to create a tensor")
        # The function copies its argument by ops of its own, which are not part of the program.
        with tape.paused():
            created = real(writable_array(data), *args, **kwargs)
        return _record_created(tape, data, created)

    return tensor


def _patch_new_tensor(tape: HostReadRecorder, real: Any) -> Any:
    def new_tensor(self: torch.Tensor, data: Any, *args: Any, **kwargs: Any) -> Any:
        return _patch_tensor(tape, partial(real, self))(data, *args, **kwargs)

    return new_tensor


def _patch_from_numpy(tape: HostReadRecorder, real: Any) -> Any:
    def from_numpy(data: Any) -> Any:
        with tape.paused():
            created = real(writable_array(data))
        return _record_created(tape, data, created)

    return from_numpy


def _patch_from_dlpack(tape: HostReadRecorder, real: Any) -> Any:
    def from_dlpack(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not tape.sees(data):
            return real(data, *args, **kwargs)
        # No read is recorded: the new tensor has the memory of a tracked one.
        with tape.paused():
            return real(data, *args, **kwargs)

    return from_dlpack


def _record_created(tape: HostReadRecorder, data: Any, created: Any) -> Any:
    """Record a tensor that was created from an array or numbers, and return it.

    The tensor is a value on known memory if an exported array came back, and else a literal.
    """
    if tape.sees(created) and tape.provenance.knows_memory(created):
        tape.provenance.record_return(created)
    elif tape.sees(created):
        _report_reads(data, "used to create a tensor")
        for one in tree_leaves(data):
            if isinstance(one, np.ndarray) and not isinstance(one, WatchedArray):
                tape.exports.check_array(one)
        known = isinstance(data, np.ndarray) and tape.exports.is_known(data)
        tape.provenance.record_literal(
            created, numpy_writable=isinstance(data, np.ndarray), known=known
        )
    return created


# -- patches: functions of NumPy --------------------------------------------------------------


def _report_reads(data: Any, reason: str) -> None:
    for one in watched_arrays_in(data):
        one.report_read(reason)


def _patch_converter(tape: HostReadRecorder, real: Any) -> Any:
    def convert(data: Any, *args: Any, **kwargs: Any) -> Any:
        array = real(data, *args, **kwargs)
        # np.asarray and the like drop the subclass; a view on the same memory is watched again.
        if isinstance(data, WatchedArray) and not isinstance(array, WatchedArray):
            if np.may_share_memory(array, plain_array(data)):
                return watch_array(array, data.on_read)
            data.report_read(_COPIED)
        elif array is not data:
            _report_reads(data, _COPIED)
            # The content of an array of plain numbers is remembered: it holds no exported value.
            if not any(isinstance(one, np.ndarray) for one in tree_leaves(data)):
                tape.exports.remember_created(array, doubtful=bool(tape.provenance.exposed.doubt))
        return array

    return convert


def _patch_reader(_: HostReadRecorder, real: Any) -> Any:
    def read(*args: Any, **kwargs: Any) -> Any:
        _report_reads((args, kwargs), _COPIED)
        return real(*args, **kwargs)

    return read


def _patch_creator(tape: HostReadRecorder, real: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> Any:
        array = real(*args, **kwargs)
        # Of these functions only np.full takes values; the others take shapes and bounds.
        _report_reads((args, kwargs) if real.__name__ == "full" else (), _COPIED)
        doubt = tape.provenance.exposed.doubt if real.__name__ == "full" else ""
        tape.exports.remember_created(array, doubtful=bool(doubt))
        return array

    return create


# -- arrays on the memory of tracked tensors --------------------------------------------------

_READ_METHODS = (
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
"""Methods of arrays that read values and call no ufunc."""
_MEMORY_ATTRIBUTES = ("__array_interface__", "__array_struct__", "base", "ctypes", "data", "flat")
"""Attributes of arrays that expose their memory."""
_METADATA_FUNCTIONS = frozenset(
    getattr(np, name)
    for name in (
        *("shape", "ndim", "size", "empty_like", "zeros_like", "ones_like", "result_type"),
        *("can_cast", "iscomplexobj", "isrealobj", "may_share_memory", "shares_memory"),
    )
)
"""NumPy functions that read no values."""


class WatchedArray(np.ndarray[Any, Any]):
    """A read-only array on a tensor's memory that reports reads of its value.

    An array that is only passed on, as weights are to TensorRT, is identified by its memory, and so
    are its views. An array that is computed with, copied or indexed reports a read. It is read-only
    because torch would not see a write.
    """

    on_read: Callable[[str], None] | None = None
    """Function that reports a read, with the reason. None if the read was reported before."""

    def __array_finalize__(self, made_from: Any) -> None:
        # NumPy calls this for every array that it creates from a watched one. An array on other
        # memory is a copy.
        if isinstance(made_from, WatchedArray):
            if np.may_share_memory(plain_array(self), plain_array(made_from)):
                self.on_read = made_from.on_read
            else:
                made_from.report_read(_COPIED)

    def report_read(self, reason: str) -> None:
        """Report that the value was read.

        Args:
            reason: How the value was used.
        """
        if self.on_read is not None:
            self.on_read(reason)

    def view(self, *args: Any, **kwargs: Any) -> Any:
        """Return a view; a view of another class cannot report, so it counts as a read."""
        view = super().view(*args, **kwargs)
        if not isinstance(view, WatchedArray):
            self.report_read("read by NumPy")
        return view

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for one in watched_arrays_in((inputs, kwargs)):
            one.report_read(f"read by NumPy's {ufunc.__name__}")
        # ufunc.at writes to its first operand without checking whether it is read-only.
        if method == "at" and isinstance(inputs[0], WatchedArray):
            raise ValueError("output array is read-only")
        return getattr(ufunc, method)(*_unwrap(inputs), **_unwrap(kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = func(*_unwrap(args), **_unwrap(kwargs))
        if func in _METADATA_FUNCTIONS:
            return result
        for one in watched_arrays_in((args, kwargs)):
            if isinstance(result, np.ndarray) and np.may_share_memory(result, plain_array(one)):
                return watch_array(result, one.on_read)
            one.report_read(f"read by NumPy's {func.__name__}")
        return result

    def __getitem__(self, key: Any) -> Any:
        for one in watched_arrays_in(key):
            one.report_read("used as a NumPy index")
        # A view stays watched; a scalar is a value that has left the array.
        item = super().__getitem__(_unwrap(key))
        if not isinstance(item, np.ndarray):
            self.report_read("read by NumPy indexing")
        return item

    def __bytes__(self) -> bytes:
        return self.tobytes()


def _read_method(name: str) -> Callable[..., Any]:
    def read(self: WatchedArray, *args: Any, **kwargs: Any) -> Any:
        self.report_read(f"read by NumPy's {name}")
        return getattr(plain_array(self), name)(*args, **kwargs)

    return read


def _memory_attribute(name: str) -> property:
    def read(self: WatchedArray) -> Any:
        self.report_read(f"exposed by NumPy's {name}")
        return getattr(np.ndarray, name).__get__(self)

    return property(read)


for _name in _READ_METHODS:
    if hasattr(np.ndarray, _name):  # __buffer__ needs Python 3.12
        setattr(WatchedArray, _name, _read_method(_name))
for _name in _MEMORY_ATTRIBUTES:
    setattr(WatchedArray, _name, _memory_attribute(_name))


def watch_array(array: Any, on_read: Callable[[str], None] | None) -> WatchedArray:
    """Return a read-only view of an array that reports reads of its value.

    Args:
        array: Array to view.
        on_read: Function that reports a read, with the reason; None to report nothing.
    """
    # Methods of ndarray are called on the class, because WatchedArray.view reports a read.
    seen = np.ndarray.view(array, WatchedArray)
    seen.flags.writeable = False
    seen.on_read = on_read
    return seen


def plain_array(value: Any) -> Any:
    """Return a plain view of a watched array; return any other value unchanged."""
    return np.ndarray.view(value, np.ndarray) if isinstance(value, WatchedArray) else value


def writable_array(value: Any) -> Any:
    """Return a plain view that torch may write to, as the recording sees torch's writes.

    Any value that is not a watched array is returned unchanged.
    """
    view = plain_array(value)
    if isinstance(value, WatchedArray) and not view.flags.writeable:
        with suppress(ValueError):  # the base array was read-only before
            view.flags.writeable = True
    return view


def watched_arrays_in(value: Any) -> Iterator[WatchedArray]:
    """Yield the watched arrays in a value, and in lists, tuples and dict values below it."""
    if isinstance(value, WatchedArray):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from watched_arrays_in(one)
    elif isinstance(value, dict):
        yield from watched_arrays_in(list(value.values()))


def _unwrap(value: Any) -> Any:
    """Return a value with every watched array in it replaced by a plain view."""
    if isinstance(value, list):
        return [_unwrap(one) for one in value]
    if type(value) is tuple:
        return tuple(_unwrap(one) for one in value)
    if isinstance(value, dict):
        return {name: _unwrap(one) for name, one in value.items()}
    return plain_array(value)
