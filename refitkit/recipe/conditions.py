"""The conditions under which an op gives the same bits in every process.

Results of products, reductions, linear algebra and vectorized functions also depend on matters that
are no operand. MKL chooses kernels by the address of a matrix. Vectorized loops compute the last
elements of a stretch another way, and every thread has a stretch of its own. oneDNN computes
float32 products in bfloat16 where the process allows it. So recordings and recipes compute under
the same conditions: one thread, full precision, and operands that start where torch's allocator
would put them (:func:`aligned`).

What remains is the processor: other vector lengths and other versions of a library round
differently.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALIGNMENT = 64
"""Bytes: torch's allocators put tensors at multiples of this (``c10/core/alignment.h``)."""
_FULL = frozenset({"none", "ieee"})
_PRECISIONS = (
    ("generic", "all"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("cuda", "all"),
    ("cuda", "matmul"),
)
"""Settings that let float32 products be computed in less, those that others inherit from first.

cuDNN's convolutions are not among them: TF32 is their default, and the reference's.
"""
_DENORMAL = 5e-324


# -- memory -----------------------------------------------------------------------------------


def is_aligned(tensor: torch.Tensor, offset: int = 0) -> bool:
    """Whether a tensor lies where the allocator could have put it.

    Args:
        tensor: Any tensor that has memory.
        offset: Bytes from the start of what was allocated to its first element.
    """
    return (tensor.data_ptr() - offset) % ALIGNMENT == 0


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that starts where the allocator puts tensors; itself if it does."""
    if tensor.is_contiguous() and is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy with the same strides, a number of bytes behind a multiple of the alignment.

    Args:
        tensor: Of any layout.
        offset: The number; a multiple of the size of an element.
    """
    size = tensor.element_size()
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = offset % ALIGNMENT // size
    memory = tensor.new_empty(first + extent)
    memory[first:].copy_(tensor.as_strided((extent,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), first)


# -- settings ---------------------------------------------------------------------------------


def is_flushing() -> bool:
    """Whether this thread takes denormal numbers for zeros (``torch.set_flush_denormal``)."""
    return _DENORMAL * 1.0 == 0.0


@contextmanager
def same_settings() -> Iterator[None]:
    """Compute in one thread, in full precision and with denormals, whatever the caller has set.

    The number of threads is that of the calling thread only. Precisions and oneDNN's switch belong
    to the process; they are touched only where they are not torch's defaults.
    """
    undo: list[Callable[[], object]] = []
    try:
        _one_thread(undo)
        _full_precision(undo)
        if is_flushing():
            torch.set_flush_denormal(False)
            undo.append(lambda: torch.set_flush_denormal(True))
        yield
    finally:
        for one in reversed(undo):
            one()


def _one_thread(undo: list[Callable[[], object]]) -> None:
    before = torch.get_num_threads()  # sets up this thread's number if nothing did before
    if before == 1:
        return
    openmp, mkl = _setters()
    if openmp is None:
        torch.set_num_threads(1)
        undo.append(lambda: torch.set_num_threads(before))
        return
    openmp(1)
    undo.append(lambda: openmp(before))
    if mkl is not None:
        mkl_before = mkl(1)
        undo.append(lambda: mkl(mkl_before))


@cache
def _setters() -> tuple[Callable[[int], Any] | None, Callable[[int], Any] | None]:
    """OpenMP's and MKL's functions that set the number of threads of the calling thread.

    ``torch.set_num_threads`` sets it for threads that start meanwhile, too, and those would keep
    it. Where torch was built without either library, there is no such function.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.PyDLL(str(path))  # without giving the GIL up: the calls take nanoseconds
        openmp = library.omp_set_num_threads
    except (OSError, AttributeError):
        return None, None
    openmp.restype = None
    before = torch.get_num_threads()
    openmp(1)
    works = torch.get_num_threads() == 1
    openmp(before)
    return (openmp, getattr(library, "MKL_Set_Num_Threads_Local", None)) if works else (None, None)


def _full_precision(undo: list[Callable[[], object]]) -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter  # noqa: SLF001
    for backend, op in _PRECISIONS:
        found = get(backend, op)
        if found not in _FULL:
            put(backend, op, "ieee")
            undo.append(_setting(put, backend, op, found))
    if not torch._C._get_mkldnn_enabled():  # noqa: SLF001 - the property's own function
        torch._C._set_mkldnn_enabled(True)  # noqa: SLF001, FBT003
        undo.append(lambda: torch._C._set_mkldnn_enabled(False))  # noqa: SLF001, FBT003


def _setting(put: Callable[..., object], *arguments: str) -> Callable[[], object]:
    return lambda: put(*arguments)
