"""Which aten ops a recipe may hold, and which of them are exact on every kind of device.

A plan is a file that may come from anywhere, so what it can run is a closed list. An overload is on
it if its packet is named below and its schema says that it does nothing but compute tensors from
tensors: no ``out=``, nothing random, no storages, streams, generators or named dimensions. Packets
that end in ``_`` write to their first operand; in a recipe they do so to a copy of it.

Left out on purpose: factories without an operand and those that leave memory as it is (``empty``,
``empty_like``, ``resize_``), because a recipe keeps such tensors instead; ops that change operands
without saying so in their schema (``native_batch_norm``); ops whose time or memory follows from a
value (``bincount``, ``combinations``, ``diff``, ``repeat_interleave`` by a tensor); quantized,
sparse and nested tensors.
"""

from __future__ import annotations

import ctypes
import functools
import math
from contextlib import contextmanager
from functools import cache
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
_CACHED = 4096


# -- the list ---------------------------------------------------------------------------------


def is_allowed(name: str) -> bool:
    """Whether a recipe may hold this overload, written as torch does: ``aten.mul.Tensor``."""
    return _find(name) is not None


def overload(name: str) -> torch._ops.OpOverload:
    """The op of this name.

    Raises:
        KeyError: A recipe may not hold it, or this torch has no such op.
    """
    found = _find(name)
    if found is None:
        raise KeyError(name)
    return found


def writes_to_operand(op: torch._ops.OpOverload) -> bool:
    """Whether it writes to its first operand; in a recipe, to a copy of that."""
    return op._schema.is_mutable  # noqa: SLF001 - torch's own name for it


@functools.lru_cache(_CACHED)
def _find(name: str) -> torch._ops.OpOverload | None:
    namespace, _, rest = name.partition(".")
    packet_name, _, overload_name = rest.partition(".")
    listed = packet_name in _PACKETS or packet_name.removesuffix("_") in _PACKETS
    if namespace != _NAMESPACE or not listed or packet_name in _REFUSED_NAMES:
        return None
    packet = getattr(torch.ops.aten, packet_name, None)
    if packet is None or overload_name not in packet.overloads():
        return None
    op: torch._ops.OpOverload = getattr(packet, overload_name)
    return op if str(op) == name and _is_pure(op) else None


def _is_pure(op: torch._ops.OpOverload) -> bool:
    schema = op._schema  # noqa: SLF001
    arguments = [(str(argument.real_type), argument) for argument in schema.arguments]
    if any(tag in op.tags for tag in _REFUSED_TAGS):
        return False
    if any(refused in kind for kind, _ in arguments for refused in _REFUSED_TYPES):
        return False
    if "Device" in dict(arguments):  # one that has to be given
        return False
    if any(argument.is_out for _, argument in arguments):
        return False
    written = [
        argument.name for _, argument in arguments if (i := argument.alias_info) and i.is_write
    ]
    if written not in ([], [schema.arguments[0].name]):
        return False
    results = {str(result.type) for result in schema.returns}
    operands = any("Tensor" in kind for kind, _ in arguments)
    return operands and bool(results) and results <= {"Tensor", "List[Tensor]"}


# -- exactness --------------------------------------------------------------------------------

_MOVES = _names(_VIEWS, _VIEW_COPIES, _MOVEMENT)
_CASTING = _names(_CASTS)
_ROUNDED = _names(_CORRECTLY_ROUNDED)
_COMPARING = _names(_COMPARISONS)
_BITWISE = _names(_BITS)
_OF_INTEGERS = _names(_LIMITS, "amax amin sum cumsum prod all any count_nonzero")
_DIVISIONS = _names("div divide true_divide")
_MAGNITUDES = _names("abs absolute")
_WHOLE = ("bool", "int", "uint")
_WIDE = ("float32", "float64")
_HARDWARE_CASTS = ("float8", "complex32")


def is_exact_anywhere(call: OpCall, operands: Sequence[str] = ()) -> bool:
    """Whether a call gives the same bits on a CPU and on a GPU, but for the bits of NaNs.

    True of movement, of casts, of correctly rounded arithmetic, of what is done with bits and with
    whole numbers. Where it depends on the dtypes of operands and they are not given, the answer
    is False. Among what is not the same:

    - a division by a number, which CUDA does as a product with its reciprocal;
    - half-precision arithmetic with a number, which a CPU rounds to half precision first;
    - square roots: MKL's, which torch uses on CPUs, are one ulp off for one value in 7 (an EPYC) or
      in 160 (a Xeon), and CUDA's are correctly rounded;
    - the greater of 0 and -0; casts of floats to integers where they do not fit;
    - scatters, where an index occurs twice.

    All tensors must be on one device: CUDA takes a tensor without dimensions that is on the CPU for
    a number.

    Args:
        call: The call.
        operands: Dtypes of all its tensors, without the ``torch.``.
    """
    packet, _, kind = call.op.removeprefix(f"{_NAMESPACE}.").partition(".")
    name = packet if packet in _BITWISE else packet.removesuffix("_")
    results = [result.dtype for result in call.results]
    if name in _MOVES or name in _BITWISE:
        return True
    if name in _CASTING:
        return all(_exact_cast(result, operands) for result in results)
    if name in _OF_INTEGERS:
        return _all_whole(results) and bool(operands) and _all_whole(operands)
    if name in _COMPARING:
        return bool(operands) and _same_anywhere(call, operands, operands)
    divides = name in _DIVISIONS and (kind.endswith("_mode") or _numbers(call))
    of_complex = name in _MAGNITUDES and not operands  # they may be
    if name not in _ROUNDED or divides or of_complex:
        return False
    return _same_anywhere(call, operands, [*operands, *results])


def is_sensitive(op: str, operands: Sequence[str], alpha: object = 1) -> bool:
    """Whether bits of what an op gives may depend on how operands lie in memory, or on threads.

    False of movement, casts, correctly rounded arithmetic, and what is done with bits and whole
    numbers: each element is computed alike wherever it lies. Not so complex products, and sums with
    a factor, which vectorized loops round once and others twice.

    Args:
        op: The overload, written as torch does.
        operands: Dtypes of all its tensors, without the ``torch.``.
        alpha: The factor of the second operand of a sum.
    """
    packet = op.removeprefix(f"{_NAMESPACE}.").partition(".")[0]
    name = packet if packet in _BITWISE else packet.removesuffix("_")
    if name in _MOVES or name in _BITWISE or name in _CASTING or name in _COMPARING:
        return False
    if _all_whole(operands):
        return name not in _ROUNDED and name not in _OF_INTEGERS
    is_complex = any(dtype.startswith("complex") for dtype in operands)
    return name not in _ROUNDED or is_complex or alpha != 1


def _exact_cast(result: str, operands: Sequence[str]) -> bool:
    if result.startswith(_WHOLE) and result != "bool":
        return bool(operands) and _all_whole(operands)
    return not result.startswith(_HARDWARE_CASTS) or set(operands) == {result}


def _same_anywhere(call: OpCall, operands: Sequence[str], dtypes: Sequence[str]) -> bool:
    """Whether arithmetic on these dtypes is rounded once, correctly, on all devices."""
    if _all_whole(dtypes):
        return not any(isinstance(number, float) for number in _numbers(call))
    if call.kwargs.get("alpha", 1) != 1 or call.args[2:] not in ((), (1,)):  # (self, other, alpha)
        return False
    if all(d.startswith(_WIDE) or _all_whole([d]) for d in dtypes):
        return True
    one_half = bool(operands) and set(dtypes) in ({"float16"}, {"bfloat16"})
    return one_half and not _numbers(call)


def _all_whole(dtypes: Sequence[str]) -> bool:
    return all(dtype.startswith(_WHOLE) for dtype in dtypes)


def _numbers(call: OpCall) -> list[object]:
    return [a for a in call.args if isinstance(a, int | float | Number) and a is not True]


# MERGED operands: What calls are made of: operands, calls below them, leaves that they follow
# from.

_REFERENCES = (SourceRef, PinnedRef, CallRef)


def is_reference(argument: Any) -> TypeGuard[Value]:
    """Whether an argument of a call stands for a tensor."""
    return isinstance(argument, _REFERENCES)


def operands_of(one: OpCall) -> tuple[Value, ...]:
    """The tensors among the arguments of a call."""
    flat: list[Any] = []
    for argument in (*one.args, *one.kwargs.values()):
        flat += argument if isinstance(argument, tuple) else (argument,)
    return tuple(filter(is_reference, flat))


def calls_below(values: Iterable[Value], operands: Callable[[int], Iterable[Value]]) -> set[int]:
    """Numbers of the calls that values are made by.

    Args:
        values: The values.
        operands: What a call is made of, by its number; nothing where the walk ends.
    """
    found: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, CallRef) and value.call not in found:
            found.add(value.call)
            stack += operands(value.call)
    return found


class Followed:
    """The leaves that values follow from."""

    def __init__(self, calls: Sequence[OpCall], ties: Iterable[Sequence[str]] = ()) -> None:
        """Find out nothing yet; more calls may come.

        Args:
            calls: Each after those whose results it takes.
            ties: Classes of leaves that are one tensor: who follows from one follows from all.
        """
        self._calls = calls
        self._twins = {name: frozenset(tie) for tie in ties for name in tie}
        self._found: dict[int, frozenset[str]] = {}

    def by(self, value: Value) -> frozenset[str]:
        """Their names; none of what the plan keeps."""
        if isinstance(value, SourceRef):
            return self._twins.get(value.fqn, frozenset({value.fqn}))
        if isinstance(value, PinnedRef):
            return frozenset()
        return self.by_call(value.call)

    def by_call(self, number: int) -> frozenset[str]:
        """The same for what a call gives."""
        for below in range(len(self._found), number + 1):  # chains can be long: no recursion
            parts = map(self.by, operands_of(self._calls[below]))
            self._found[below] = frozenset[str]().union(*parts)  # threads may both find it
        return self._found[number]


# MERGED literals: How literals of calls are written in a plan: numbers, lists, dtypes, layouts,
# memory formats.

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
_NAME_OF = {id(constant): name for name, constant in _CONSTANTS.items()}


def encode_literal(value: object) -> Argument:
    """A literal of a call as the manifest has it.

    References to tensors (:data:`refitkit.model.Value`) and what is encoded already stay as they
    are.

    Raises:
        TypeError: There is no way to write it: a device, a symbolic number, a list in a list.
    """
    if isinstance(value, list | tuple):
        return tuple(_encode_atom(item) for item in value)
    return _encode_atom(value)


def _encode_atom(value: object) -> Atom:
    if is_reference(value) or isinstance(value, TorchName | Number):
        return value
    if value is None or type(value) in {bool, int, str}:
        return value  # type: ignore[return-value]  # of one of these types, none of a subclass
    if type(value) is float:
        return value if math.isfinite(value) else Number(text=repr(value))
    if type(value) is complex:
        return Number(text=repr(value))
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        if id(value) in _NAME_OF:
            return TorchName(name=_NAME_OF[id(value)])
        raise TypeError(f"{value} does not occur in recipes")
    raise TypeError(f"a {type(value).__name__} does not occur in recipes")


def decode_literal(argument: Argument) -> Any:
    """A literal from the manifest; lists come as lists, references to tensors as they are.

    Raises:
        ValueError: It names a constant that torch does not have, or is no number.
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
    """``inf``, ``-inf``, ``nan``, or what ``repr`` writes for a complex number."""
    if text in {"inf", "-inf", "nan"}:
        return float(text)
    if not text.endswith(("j", "j)")):
        raise ValueError(f"{text!r} is no number of a recipe")
    return complex(text)


# MERGED conditions: The conditions under which an op gives the same bits in every process.
#
# Results of products, reductions, linear algebra and vectorized functions also depend on matters
# that are no operand. MKL chooses kernels by the address of a matrix. Vectorized loops compute
# the last elements of a stretch another way, and every thread has a stretch of its own. oneDNN
# computes float32 products in bfloat16 where the process allows it. So recordings and recipes
# compute under the same conditions: one thread, full precision, and operands that start where
# torch's allocator would put them (:func:`aligned`).
#
# What remains is the processor: other vector lengths and other versions of a library round
# differently.

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
