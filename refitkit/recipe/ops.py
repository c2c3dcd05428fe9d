"""The ops that recipes may hold, and everything a recipe must know about an op and its arguments.

A plan file may come from anywhere, so recipes run ops from a closed list only. An overload is on
the list if its packet is named below, and its schema shows that it only computes tensors from
tensors: no ``out=``, no random numbers, no storages, streams, generators or named dimensions.
Packets that end in ``_`` write to their first operand; in a recipe they write to a copy of it.

The list leaves out on purpose:

- factories without an operand, and ops that leave memory uninitialized (``empty``, ``empty_like``,
  ``resize_``): recipes keep their results as pinned tensors instead;
- ops that change operands although their schema does not declare it (``native_batch_norm``);
- ops whose time or memory depends on a value (``bincount``, ``combinations``, ``diff``,
  ``repeat_interleave`` by a tensor);
- ops of quantized, sparse and nested tensors.

Sections, in order: the list of ops; which ops give the same bits on all devices and in all layouts;
operands of calls; literals of calls; and the settings under which ops give the same bits in every
process.
"""

from __future__ import annotations

import ctypes
import functools
import math
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from refitkit.model import CallRef, Number, PinnedRef, SourceRef, TorchName
from refitkit.model.slot import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.model import Argument, OpCall, Value
    from refitkit.model.plan import Atom


_NAMESPACE = "aten"

_VIEWS = """
    _conj _neg_view _reshape_alias _unsafe_view adjoint alias as_strided atleast_1d atleast_2d
    atleast_3d broadcast_to chunk contiguous detach diagonal expand expand_as flatten imag
    linalg_diagonal mH mT matrix_H moveaxis movedim narrow numpy_T permute positive ravel real
    reshape reshape_as resolve_conj resolve_neg select slice split split_with_sizes squeeze
    swapaxes swapdims t tensor_split transpose unbind unflatten unfold unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze view view_as view_as_complex view_as_real
"""
_VIEW_COPIES = """
    _conj_copy _neg_view_copy _reshape_alias_copy _reshape_copy alias_copy as_strided_copy
    detach_copy diagonal_copy expand_copy narrow_copy permute_copy select_copy slice_copy
    split_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy
    unsqueeze_copy view_as_complex_copy view_as_real_copy view_copy
"""
_MOVEMENT = """
    _pad_circular _pad_enum block_diag broadcast_tensors cartesian_prod cat channel_shuffle
    clone column_stack concat concatenate constant_pad_nd diag diag_embed diagflat dstack fill flip
    fliplr flipud full_like gather hstack index index_select lift lift_fresh lift_fresh_copy
    masked_fill masked_select meshgrid native_channel_shuffle new_full new_ones new_zeros ones_like
    pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat
    replication_pad1d replication_pad2d replication_pad3d roll rot90 row_stack select_scatter
    slice_scatter stack take take_along_dim tile tril triu vstack where zero zeros_like
    diagonal_scatter _unsafe_index im2col
"""
_CASTS = """
    _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short
    _to_copy complex copy to type_as
"""
_SCATTERS = """
    as_strided_scatter fill_diagonal index_add index_copy index_fill index_put index_reduce
    masked_scatter put scatter scatter_add scatter_reduce col2im _unsafe_index_put
"""
_BITS = """
    __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    logical_and logical_not logical_or logical_xor
"""
_COMPARISONS = """
    eq ge greater greater_equal gt isfinite isin isinf isnan isneginf isposinf isreal le
    less less_equal lt ne not_equal signbit
"""
_CORRECTLY_ROUNDED = """
    abs absolute add ceil div divide fix floor mul multiply neg negative rsub sgn sign sub
    subtract true_divide trunc
"""
_LIMITS = "clamp clamp_max clamp_min clip maximum minimum relu"
_POINTWISE = """
    _conj_physical _prelu_kernel acos acosh addcdiv addcmul angle arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh asin asinh atan atan2 atanh celu conj conj_physical copysign cos cosh
    deg2rad digamma elu erf erfc erfinv exp exp2 expm1 float_power floor_divide fmax fmin fmod frac
    frexp gcd gelu glu hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 isclose lcm
    ldexp leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp
    logaddexp2 logit mish nan_to_num nextafter polar pow prelu rad2deg reciprocal relu6 remainder
    round rsqrt selu sigmoid silu sin sinc sinh softplus softshrink special_entr special_erf
    special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammaln
    special_i0 special_i0e special_i1 special_i1e special_log1p special_logit special_ndtr
    special_psi special_round special_sinc special_xlog1py special_xlogy sqrt square tan tanh
    threshold xlogy
    fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
"""
_REDUCTIONS = """
    _aminmax _is_all_true _is_any_true _log_softmax _logcumsumexp _safe_softmax _softmax
    _weight_norm _weight_norm_interface all amax amin aminmax any argmax argmin corrcoef
    cosine_similarity count_nonzero cov cummax cummin cumprod cumsum frobenius_norm kthvalue
    linalg__powsum linalg_matrix_norm linalg_norm linalg_vector_norm log_softmax logcumsumexp
    logsumexp max mean median min mode msort nanmean nanmedian nanquantile nansum norm
    norm_except_dim nuclear_norm pairwise_distance prod quantile renorm searchsorted bucketize
    softmax sort special_log_softmax special_logsumexp special_softmax std std_mean sum sum_to_size
    argsort topk trace var var_mean nonzero nonzero_numpy argwhere unique_consecutive unique_dim
    unique_dim_consecutive _unique _unique2
"""
_PRODUCTS = """
    _convolution _convolution_mode _int_mm _trilinear addbmm addmm addmv addr baddbmm bilinear bmm
    cdist _cdist_forward _euclidean_dist chain_matmul conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d conv_transpose3d convolution cross dist dot einsum ger inner
    kron linalg_cross linalg_matmul linalg_multi_dot linalg_vecdot linear matmul mm mv outer
    tensordot vdot
"""
_LAYERS = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _batch_norm_no_update
    _native_batch_norm_legit _native_batch_norm_legit_no_training
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator avg_pool1d avg_pool2d avg_pool3d
    embedding grid_sampler grid_sampler_2d grid_sampler_3d group_norm layer_norm max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
    native_group_norm native_layer_norm rms_norm upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
"""
_LINEAR_ALGEBRA = """
    _fft_c2c _fft_c2r _fft_r2c _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex
    _linalg_svd cholesky_inverse cholesky_solve det fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft
    fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft
    fft_rfft2 fft_rfftn inverse linalg_cholesky linalg_cholesky_ex linalg_det linalg_eigh
    linalg_householder_product linalg_inv linalg_inv_ex linalg_lu linalg_lu_factor
    linalg_lu_factor_ex linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_polar linalg_qr
    linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals
    logdet lu_unpack matrix_exp matrix_power orgqr pinverse slogdet
"""


def _names(*groups: str) -> frozenset[str]:
    return frozenset(name for group in groups for name in group.split())


_PACKETS = _names(
    *(_VIEWS, _VIEW_COPIES, _MOVEMENT, _CASTS, _SCATTERS, _BITS, _COMPARISONS),
    *(_CORRECTLY_ROUNDED, _LIMITS, _POINTWISE, _REDUCTIONS, _PRODUCTS, _LAYERS, _LINEAR_ALGEBRA),
)
_REFUSED_TYPES = ("Dimname", "Generator", "Storage", "Stream", "QScheme")
_REFUSED_NAMES = frozenset({"as_strided_", "detach_", "requires_grad_"})
_REFUSED_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output)
_CACHE_SIZE = 4096


# -- the list ---------------------------------------------------------------------------------


def is_allowed(name: str) -> bool:
    """Whether a recipe may hold this overload, spelled as torch does: ``aten.mul.Tensor``."""
    return _find(name) is not None


def overload(name: str) -> torch._ops.OpOverload:
    """The op of this name.

    Raises:
        KeyError: A recipe may not hold the op, or this version of torch does not have it.
    """
    op = _find(name)
    if op is None:
        raise KeyError(name)
    return op


def writes_to_operand(op: torch._ops.OpOverload) -> bool:
    """Whether an op writes to its first operand. In a recipe it writes to a copy."""
    return op._schema.is_mutable  # noqa: SLF001 - torch's own name for it


@functools.lru_cache(_CACHE_SIZE)
def _find(name: str) -> torch._ops.OpOverload | None:
    namespace, _, rest = name.partition(".")
    packet_name, _, overload_name = rest.partition(".")
    is_listed = packet_name in _PACKETS or packet_name.removesuffix("_") in _PACKETS
    if namespace != _NAMESPACE or not is_listed or packet_name in _REFUSED_NAMES:
        return None
    packet = getattr(torch.ops.aten, packet_name, None)
    if packet is None or overload_name not in packet.overloads():
        return None
    op: torch._ops.OpOverload = getattr(packet, overload_name)
    # names that torch would spell differently are refused, so that each op has one name in plans
    return op if str(op) == name and _is_pure(op) else None


def _is_pure(op: torch._ops.OpOverload) -> bool:
    """Whether an op only computes tensors from tensors, by its schema."""
    schema = op._schema  # noqa: SLF001
    arguments = [(str(argument.real_type), argument) for argument in schema.arguments]
    if any(tag in op.tags for tag in _REFUSED_TAGS):
        return False
    if any(refused in kind for kind, _ in arguments for refused in _REFUSED_TYPES):
        return False
    if "Device" in dict(arguments):  # a required device; an optional one is "Optional[Device]"
        return False
    if any(argument.is_out for _, argument in arguments):
        return False
    written = [
        argument.name for _, argument in arguments if (i := argument.alias_info) and i.is_write
    ]
    if written not in ([], [schema.arguments[0].name]):
        return False
    results = {str(result.type) for result in schema.returns}
    has_operand = any("Tensor" in kind for kind, _ in arguments)
    return has_operand and bool(results) and results <= {"Tensor", "List[Tensor]"}


# -- exactness --------------------------------------------------------------------------------

_MOVES = _names(_VIEWS, _VIEW_COPIES, _MOVEMENT)
_CASTING = _names(_CASTS)
_ROUNDED = _names(_CORRECTLY_ROUNDED)
_COMPARING = _names(_COMPARISONS)
_BITWISE = _names(_BITS)
_EXACT_ON_INTEGERS = _names(_LIMITS, "amax amin sum cumsum prod all any count_nonzero")
_DIVISIONS = _names("div divide true_divide")
_MAGNITUDES = _names("abs absolute")
_INTEGER_DTYPES = ("bool", "int", "uint")
_WIDE_DTYPES = ("float32", "float64")
_DTYPES_WITH_HARDWARE_CASTS = ("float8", "complex32")


def is_exact_anywhere(call: OpCall, operands: Sequence[str] = ()) -> bool:
    """Whether a call gives the same bits on a CPU and on a GPU. Bits of NaNs may differ.

    Movement, casts, correctly rounded arithmetic, and operations on bits and integers do. If the
    answer depends on the dtypes of operands and they are not given, it is False. Not exact are:

    - a division by a number: CUDA multiplies by its reciprocal;
    - half-precision arithmetic with a number: a CPU rounds the number to half precision first;
    - square roots: those of MKL, which torch uses on CPUs, are one ulp off for one value in 7 (on
      an EPYC) or in 160 (on a Xeon). Those of CUDA are correctly rounded;
    - the greater of 0 and -0;
    - casts of floats to integers that they do not fit;
    - scatters in which an index occurs twice.

    All tensors must be on one device: CUDA treats a tensor without dimensions that is on the CPU as
    a number.

    Args:
        call: The call.
        operands: Dtypes of all its tensor arguments, without the ``torch.``.
    """
    packet, _, kind = call.op.removeprefix(f"{_NAMESPACE}.").partition(".")
    name = packet if packet in _BITWISE else packet.removesuffix("_")
    results = [result.dtype for result in call.results]
    if name in _MOVES or name in _BITWISE:
        return True
    if name in _CASTING:
        return all(_is_exact_cast(result, operands) for result in results)
    if name in _EXACT_ON_INTEGERS:
        return _are_integers(results) and bool(operands) and _are_integers(operands)
    if name in _COMPARING:
        return bool(operands) and _is_rounded_alike(call, operands, operands)
    divides = name in _DIVISIONS and (kind.endswith("_mode") or _numbers(call))
    may_be_complex = name in _MAGNITUDES and not operands
    if name not in _ROUNDED or divides or may_be_complex:
        return False
    return _is_rounded_alike(call, operands, [*operands, *results])


def is_sensitive(op: str, operands: Sequence[str], alpha: object = 1) -> bool:
    """Whether the bits of results may depend on memory layout, number of threads, or settings.

    Movement, casts, correctly rounded arithmetic, and operations on bits and integers are not
    sensitive: they compute each element in the same way wherever it lies. Complex products, and
    sums with a factor, are sensitive: vectorized loops round them once, and scalar loops twice.

    Args:
        op: The overload, spelled as torch does.
        operands: Dtypes of all its tensor arguments, without the ``torch.``.
        alpha: Factor of the second operand of a sum.
    """
    packet = op.removeprefix(f"{_NAMESPACE}.").partition(".")[0]
    name = packet if packet in _BITWISE else packet.removesuffix("_")
    if name in _MOVES or name in _BITWISE or name in _CASTING or name in _COMPARING:
        return False
    if _are_integers(operands):
        return name not in _ROUNDED and name not in _EXACT_ON_INTEGERS
    is_complex = any(dtype.startswith("complex") for dtype in operands)
    return name not in _ROUNDED or is_complex or alpha != 1


def _is_exact_cast(result: str, operands: Sequence[str]) -> bool:
    if result.startswith(_INTEGER_DTYPES) and result != "bool":
        return bool(operands) and _are_integers(operands)
    return not result.startswith(_DTYPES_WITH_HARDWARE_CASTS) or set(operands) == {result}


def _is_rounded_alike(call: OpCall, operands: Sequence[str], dtypes: Sequence[str]) -> bool:
    """Whether all devices round arithmetic on these dtypes once, and correctly."""
    if _are_integers(dtypes):
        return not any(isinstance(number, float) for number in _numbers(call))
    # alpha as a keyword, or as the third argument: (self, other, alpha)
    if call.kwargs.get("alpha", 1) != 1 or call.args[2:] not in ((), (1,)):
        return False
    if all(d.startswith(_WIDE_DTYPES) or _are_integers([d]) for d in dtypes):
        return True
    is_one_half_dtype = bool(operands) and set(dtypes) in ({"float16"}, {"bfloat16"})
    return is_one_half_dtype and not _numbers(call)


def _are_integers(dtypes: Sequence[str]) -> bool:
    return all(dtype.startswith(_INTEGER_DTYPES) for dtype in dtypes)


def _numbers(call: OpCall) -> list[object]:
    return [a for a in call.args if isinstance(a, int | float | Number) and a is not True]


# -- operands ---------------------------------------------------------------------------------

_REFERENCES = (SourceRef, PinnedRef, CallRef)


def is_reference(argument: Any) -> TypeGuard[Value]:
    """Whether an argument of a call refers to a tensor."""
    return isinstance(argument, _REFERENCES)


def operands_of(one: OpCall) -> tuple[Value, ...]:
    """References to the tensors among the arguments of a call."""
    flat: list[Any] = []
    for argument in (*one.args, *one.kwargs.values()):
        flat += argument if isinstance(argument, tuple) else (argument,)
    return tuple(filter(is_reference, flat))


def calls_below(values: Iterable[Value], operands: Callable[[int], Iterable[Value]]) -> set[int]:
    """Numbers of all calls that values depend on.

    Args:
        values: The values.
        operands: Returns the operands of a call, by its number. Nothing ends the walk there.
    """
    numbers: set[int] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, CallRef) and value.call not in numbers:
            numbers.add(value.call)
            pending += operands(value.call)
    return numbers


class LeafDependencies:
    """The leaves that each value of a list of calls depends on. Threads may share it."""

    def __init__(self, calls: Sequence[OpCall], ties: Iterable[Sequence[str]] = ()) -> None:
        """Compute nothing yet. The caller may append calls later.

        Args:
            calls: Calls, each after the calls whose results it takes.
            ties: Classes of leaves that are one tensor. A value that depends on one of them
                depends on all.
        """
        self._calls = calls
        self._ties = {name: frozenset(tie) for tie in ties for name in tie}
        self._of_call: dict[int, frozenset[str]] = {}

    def of(self, value: Value) -> frozenset[str]:
        """FQNs of the leaves that a value depends on. Pinned tensors depend on none."""
        if isinstance(value, SourceRef):
            return self._ties.get(value.fqn, frozenset({value.fqn}))
        if isinstance(value, PinnedRef):
            return frozenset()
        return self.of_call(value.call)

    def of_call(self, number: int) -> frozenset[str]:
        """FQNs of the leaves that the results of a call depend on."""
        # in order instead of by recursion, because chains of calls can exceed Python's limit
        for earlier in range(len(self._of_call), number + 1):
            parts = map(self.of, operands_of(self._calls[earlier]))
            self._of_call[earlier] = frozenset[str]().union(*parts)  # threads write the same set
        return self._of_call[number]


# -- literals ---------------------------------------------------------------------------------

_LAYOUTS = {str(kind).removeprefix("torch."): kind for kind in (torch.strided,)}
_FORMATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
_DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)}
_CONSTANTS: dict[str, Any] = {**_DTYPES, **_LAYOUTS, **_FORMATS}
_CONSTANT_NAMES = {id(constant): name for name, constant in _CONSTANTS.items()}


def encode_literal(value: object) -> Argument:
    """A literal argument of a call, as the manifest of a plan stores it.

    Literals are numbers, texts, None, lists of them, dtypes, layouts and memory formats. References
    to tensors (:data:`refitkit.model.Value`) and encoded literals are returned unchanged.

    Raises:
        TypeError: The manifest cannot store the value: a device, a symbolic number, a nested list.
    """
    if isinstance(value, list | tuple):
        return tuple(_encode_atom(item) for item in value)
    return _encode_atom(value)


def _encode_atom(value: object) -> Atom:
    if is_reference(value) or isinstance(value, TorchName | Number):
        return value
    # exact types: a subclass, such as an enumeration, would come back as another type
    if value is None or type(value) in {bool, int, str}:
        return value  # type: ignore[return-value]
    if type(value) is float:
        return value if math.isfinite(value) else Number(text=repr(value))
    if type(value) is complex:
        return Number(text=repr(value))
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        if id(value) in _CONSTANT_NAMES:
            return TorchName(name=_CONSTANT_NAMES[id(value)])
        raise TypeError(f"{value} does not occur in recipes")
    raise TypeError(f"a {type(value).__name__} does not occur in recipes")


def decode_literal(argument: Argument) -> Any:
    """The value of a literal from the manifest. References to tensors are returned unchanged.

    Lists are returned as lists.

    Raises:
        ValueError: The literal names a constant that torch does not have, or is not a number.
    """
    if isinstance(argument, tuple):
        return [decode_literal(item) for item in argument]
    if isinstance(argument, TorchName):
        if argument.name not in _CONSTANTS:
            raise ValueError(f"torch has no constant {argument.name!r}")
        return _CONSTANTS[argument.name]
    if isinstance(argument, Number):
        return _number(argument.text)
    return argument


def _number(text: str) -> float | complex:
    """Parse ``inf``, ``-inf``, ``nan``, or the ``repr`` of a complex number."""
    if text in {"inf", "-inf", "nan"}:
        return float(text)
    if not text.endswith(("j", "j)")):
        raise ValueError(f"{text!r} is not a number of a recipe")
    return complex(text)


# -- conditions -------------------------------------------------------------------------------
#
# Bits of products, reductions, linear algebra and vectorized functions depend on more than their
# operands. MKL chooses kernels by the address of a matrix. Vectorized loops compute the last
# elements of a range in another way, and each thread has its own range. oneDNN computes float32
# products in bfloat16 if the process allows it. So recordings and recipes run these ops under the
# same conditions: one thread, full precision, and operands that start where torch's allocator puts
# tensors (`aligned`). The processor remains: other vector lengths and other versions of a library
# round differently.

ALIGNMENT = 64
"""Bytes: torch's allocators put tensors at multiples of this (``c10/core/alignment.h``)."""
_FULL_PRECISION = frozenset({"none", "ieee"})
_PRECISION_SETTINGS = (
    ("generic", "all"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("cuda", "all"),
    ("cuda", "matmul"),
)
"""Settings that allow lower precision in float32 products, as (backend, op).

Settings that others inherit from come first. cuDNN's convolutions are left out: TF32 is their
default, and the reference model uses it, too.
"""
_DENORMAL = 5e-324


def is_aligned(tensor: torch.Tensor, offset: int = 0) -> bool:
    """Whether a tensor lies where torch's allocator could have put it.

    Args:
        tensor: Any tensor that has memory.
        offset: Bytes from the start of the allocation to the tensor's first element.
    """
    return (tensor.data_ptr() - offset) % ALIGNMENT == 0


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that starts where torch's allocator puts tensors.

    The given tensor is returned if it does, else a copy.
    """
    if tensor.is_contiguous() and is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy with the same strides that starts ``offset`` bytes after an aligned address.

    Args:
        tensor: A tensor of any layout.
        offset: Number of bytes, a multiple of the size of an element.
    """
    size = tensor.element_size()
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = offset % ALIGNMENT // size
    memory = tensor.new_empty(first + extent)
    memory[first:].copy_(tensor.as_strided((extent,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), first)


def is_flushing() -> bool:
    """Whether this thread treats denormal numbers as zeros (``torch.set_flush_denormal``)."""
    return _DENORMAL * 1.0 == 0.0


@contextmanager
def same_settings() -> Iterator[None]:
    """Run in one thread, in full precision and with denormals, under any settings of the caller.

    The number of threads is set for the calling thread only. Precisions and the switch of oneDNN
    belong to the process. They are changed only if they are not torch's defaults.
    """
    undo: list[Callable[[], object]] = []
    try:
        _set_one_thread(undo)
        _set_full_precision(undo)
        if is_flushing():
            torch.set_flush_denormal(False)
            undo.append(lambda: torch.set_flush_denormal(True))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _set_one_thread(undo: list[Callable[[], object]]) -> None:
    before = torch.get_num_threads()  # also initializes this thread's number, if nothing did yet
    if before == 1:
        return
    openmp, mkl = _thread_setters()
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
def _thread_setters() -> tuple[Callable[[int], Any] | None, Callable[[int], Any] | None]:
    """OpenMP's and MKL's functions that set the number of threads of the calling thread.

    None stands for a library that torch was built without. ``torch.set_num_threads`` is no
    substitute: threads that start meanwhile inherit its number and keep it.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.PyDLL(str(path))  # PyDLL keeps the GIL: the calls take nanoseconds
        openmp = library.omp_set_num_threads
    except (OSError, AttributeError):
        return None, None
    openmp.restype = None
    # the symbol may belong to another OpenMP library than the one that torch uses
    before = torch.get_num_threads()
    openmp(1)
    works = torch.get_num_threads() == 1
    openmp(before)
    return (openmp, getattr(library, "MKL_Set_Num_Threads_Local", None)) if works else (None, None)


def _set_full_precision(undo: list[Callable[[], object]]) -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter  # noqa: SLF001
    for backend, op in _PRECISION_SETTINGS:
        before = get(backend, op)
        if before not in _FULL_PRECISION:
            put(backend, op, "ieee")
            undo.append(partial(put, backend, op, before))
    if not torch._C._get_mkldnn_enabled():  # noqa: SLF001 - the property's own function
        torch._C._set_mkldnn_enabled(True)  # noqa: SLF001, FBT003
        undo.append(lambda: torch._C._set_mkldnn_enabled(False))  # noqa: SLF001, FBT003
