"""Record every op that runs on real tensors, and where each value comes from.

A :class:`Tape` is a dispatch mode. It sees ops on tensors that have data; ops on fake, meta and
functional tensors, which tracing creates, pass by. It stays on when libraries disable all modes, as
constant folding does. Values that leave torch (numbers, NumPy arrays) are reported by
:mod:`refitkit.recipe.host_reads`, and :mod:`refitkit.recipe.provenance` keeps the origins of
values.

Read :class:`Tape` first, from ``__torch_dispatch__`` on. Then come the facts that a recording needs
from an op's schema, and last the functions that hide torch's private names for its stack of modes.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from refitkit.errors import CompileError, Problem
from refitkit.program.ambient import WatchingMode
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import ops
from refitkit.recipe.host_reads import watch_host_reads
from refitkit.recipe.memories import NumpyExports, is_tracked
from refitkit.recipe.ops import ALIGNMENT, aligned, is_aligned, moved, same_settings
from refitkit.recipe.origins import (
    Call,
    HostRead,
    Literal,
    Origin,
    Unknown,
    depends_on_leaf,
    has_dense_base,
    metadata_of_tensor,
)
from refitkit.recipe.provenance import Provenance, RecordingScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    import numpy as np

    from refitkit.recipe.provenance import Location


_SHOWN = 4
"""Largest number of elements of a value that guards show as text."""
_RANDOM = "a random op computes it from other values"


_entered: list[Tape] = []
"""Tapes whose contexts were entered, of all threads."""


def active_tape() -> Tape | None:
    """Return the tape that records the current thread now; None if there is none."""
    return next((tape for tape in reversed(_entered) if tape.is_on), None)


class Tape(WatchingMode):
    """A recording of ops, as a context manager.

    Attributes:
        exports: NumPy arrays that the recorded code received.
        provenance: Origins of all tensors, for the patches that report changes without an op.
    """

    def __init__(self, leaves: Mapping[str, torch.Tensor]) -> None:
        """Register the leaves; recording starts when the context is entered.

        Args:
            leaves: All tensors that the program reads, by FQN.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._patches = ExitStack()
        self._scope = RecordingScope()
        self._reads: list[HostRead] = []
        self._read_keys: set[tuple[int, int]] = set()
        self.exports = NumpyExports()
        self.provenance = Provenance(leaves, self._scope, self.exports)

    # -- on and off -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(same_settings())
            stack.enter_context(lowest_mode(self))
            stack.enter_context(watch_host_reads(self))
            stack.callback(_entered.remove, self)
            _entered.append(self)
            self._patches = stack.pop_all()
        self._scope.bind_to_thread()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patches.close()

    def paused(self) -> AbstractContextManager[None]:
        """Pause the recording until the end of the block."""
        return self._scope.pause()

    @property
    def is_on(self) -> bool:
        """Whether the tape records the current thread now."""
        return self._scope.is_active

    def sees(self, value: Any) -> bool:
        """Return whether a value is a tracked tensor and the tape records the current thread."""
        return self._scope.is_active and is_tracked(value)

    # -- results ----------------------------------------------------------------------------

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Return the origin of the present value of a tensor."""
        return self.provenance.origin_of(tensor)

    def origin_at(self, flat: torch.Tensor) -> Origin:
        """Return the origin of the values in memory that code found by its address.

        Args:
            flat: Tensor on that memory, one-dimensional and contiguous.
        """
        return self.provenance.origin_at(flat)

    @property
    def host_reads(self) -> list[HostRead]:
        """Values that code outside torch's ops read or may have read."""
        return [*self._reads, *self.exports.host_reads()]

    # -- ops --------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an op and record it.

        Raises:
            CompileError: The op would change a leaf.
        """
        kwargs = kwargs or {}
        if self._scope.paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # noqa: SLF001 - there is no public name
            return self._run_higher_order(func, args, kwargs)
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        written = [t for t in written_tensors(func, args, kwargs) if is_tracked(t)]
        self._refuse_leaf_writes(func, written)
        if types or not all(map(is_tracked, inputs)):
            return self._run_untracked(func, args, kwargs, written)
        # An op of torch._prims is written in aten ops; those are recorded in its place, because
        # plans may only contain aten ops.
        if hasattr(func, "impl_aten"):
            with mode_enabled(self):
                return func.impl_aten(*args, **kwargs)
        # These ops (t_, resize_) change no value. The geometry of the next read shows the change.
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        return self._run_tracked(func, args, kwargs, inputs, written)

    def _run_tracked(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> Any:
        """Run an op on tracked tensors and record it."""
        # Origins and locations are looked up before the op runs, as the op may overwrite operands.
        known = {id(tensor): self.origin_of(tensor) for tensor in inputs}
        locations = [self.provenance.location(tensor) for tensor in written]
        result = self._run_as_replayed(func, args, kwargs, known, written, inputs)
        outputs = [a for a in tree_leaves(result) if isinstance(a, torch.Tensor)]
        if written:
            self._record_writes(self._node(func, args, kwargs, known, written), locations)
        elif outputs:
            self._record_results(func, args, kwargs, known, inputs, outputs)
        elif not reads_metadata_only(func):
            self._record_reads(func, inputs, known)
        return result

    def _run_as_replayed(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        known: Mapping[int, Origin],
        written: list[torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> Any:
        """Run an op so that it returns the bits that a recipe will return.

        If the bits may depend on how operands lie in memory
        (:func:`refitkit.recipe.ops.is_sensitive`), the operands are placed as in a replay.
        """
        dtypes = [dtype_name(tensor.dtype) for tensor in inputs]
        if not ops.is_sensitive(str(func), dtypes, kwargs.get("alpha", 1)):
            return func(*args, **kwargs)
        targets = {id(tensor): tensor for tensor in written}
        with self.paused():
            others = {
                id(tensor): placed
                for tensor in inputs
                if (placed := self._as_replayed(tensor, known, targets)) is not tensor
            }
        if not others:
            return func(*args, **kwargs)
        args, kwargs = _substitute((args, kwargs), others)
        result = func(*args, **kwargs)
        # The op wrote to the replacements: the program's own tensors get the values, and a result
        # that is a replacement becomes the tensor that it replaced.
        with self.paused():
            for key in others.keys() & targets:
                targets[key].copy_(others[key])
        return _substitute(result, {id(others[k]): t for k, t in targets.items() if k in others})

    def _as_replayed(
        self,
        tensor: torch.Tensor,
        known: Mapping[int, Origin],
        targets: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Return an operand placed in memory as in a replay; the tensor itself in most cases."""
        if tensor.is_conj() or tensor.is_neg():
            return tensor
        if id(tensor) in targets:
            return aligned(tensor)
        origin, offset = known[id(tensor)], self.provenance.offset(tensor)
        at_start = offset % ALIGNMENT == 0
        if at_start and tensor.is_contiguous() and is_aligned(tensor):  # the common case
            return tensor
        if not has_dense_base(origin) or not depends_on_leaf(origin):
            return aligned(tensor)
        return tensor if is_aligned(tensor, offset) else moved(tensor, offset)

    def _run_higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a higher-order op; the ops that it calls are recorded if all tensors are tracked."""
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        key = torch._C.DispatchKey.CompositeExplicitAutograd  # noqa: SLF001 - no public name
        eager = func.py_kernels.get(key)
        if eager is not None and all(map(is_tracked, inputs)):
            return eager(*args, **kwargs)
        with mode_disabled(self):
            return func(*args, **kwargs)

    def _run_untracked(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """Run an op that has untracked operands; the tensors that it writes become unknown."""
        try:
            return func(*args, **kwargs)
        finally:
            for location in map(self.provenance.location, written):
                self.provenance.record_unknown_write(location)

    def _refuse_leaf_writes(self, func: Any, written: list[torch.Tensor]) -> None:
        for tensor in written:
            problems = [
                Problem(fqn, "changed in place", str(func))
                for fqn in self.provenance.leaves_in(tensor)
            ]
            if problems:
                raise CompileError(
                    "Compiling the engines would change the program's own tensors.",
                    problems=problems,
                    hint="Put the model into eval mode before the export, or remove the buffers "
                    "that it updates.",
                )

    # -- nodes ------------------------------------------------------------------------------

    def _node(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        results: list[torch.Tensor],
    ) -> Call | Literal | Unknown:
        """Return the node for a call of an op; ``results`` are its outputs or written operands."""
        if is_random(func):
            literal = not known or ignores_operands(func)
            if not literal:
                return Unknown(_RANDOM)
            return Literal(self.provenance.snapshot(results[0]), seen=True)
        numbers = self._number_origins(value_numbers(func, args, kwargs))
        if isinstance(numbers, Unknown):
            return numbers
        positional, named = tree_map(
            lambda a: known[id(a)] if isinstance(a, torch.Tensor) else a, (args, dict(kwargs))
        )
        metadata = tuple(map(metadata_of_tensor, results))
        device = results[0].device.type
        inputs = (*known.values(), *numbers)
        return Call(func, tuple(positional), named, metadata, device, inputs, numbers)

    def _number_origins(self, numbers: Iterable[complex]) -> tuple[Origin, ...] | Unknown:
        """Return the exports that the numbers of a call may have been read from, as an origin.

        Returns :class:`Unknown` if they may have been read where no recording can track reads.
        """
        exports: list[Any] = []
        for number in () if self.provenance.trusts_numbers else numbers:
            if self.provenance.exposed.doubt:
                return Unknown(self.provenance.exposed.doubt)
            exports += self.exports.possible_sources(number)
        if not exports:
            return ()
        # An empty literal carries the exports: it changes no value, and the lineage checks it.
        nothing = torch.empty(0)
        return (Origin(Literal(nothing, tuple(exports)), 0, contiguous=True),)

    def _record_results(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        """Record the results of an op that writes to no operand."""
        # as_strided counts from the start of the storage and not of its operand, so its result is
        # derived from the memory when it is read.
        if func is torch.ops.aten.as_strided.default or not all(map(is_tracked, outputs)):
            return
        fresh = [(i, o) for i, o in enumerate(outputs) if not self.provenance.knows(o)]
        if not fresh:
            return
        node = self._node(func, args, kwargs, known, outputs)
        for number, output in fresh:
            self.provenance.record_result(output, node, number)
        self._record_reads(func, shape_deciding(func, inputs), known)

    def _record_writes(self, node: Call | Literal | Unknown, locations: list[Location]) -> None:
        """Record the results of an op that writes to operands."""
        for number, location in enumerate(locations):
            self.provenance.record_write(location, node, number)

    # -- host reads -------------------------------------------------------------------------

    def _record_reads(
        self, func: Any, inputs: list[torch.Tensor], known: Mapping[int, Origin]
    ) -> None:
        for tensor in inputs:
            self.record_read(tensor, known[id(tensor)], f"read by {func}")

    def record_read(self, tensor: torch.Tensor, origin: Origin, reason: str) -> None:
        """Record that code read the values of a tensor; each value is recorded once.

        Args:
            tensor: Tensor whose values were read.
            origin: Origin of the values.
            reason: How the values were used, such as ``converted to a list``.
        """
        key = id(origin.node), origin.output
        if isinstance(origin.node, Literal) or key in self._read_keys:
            return
        self._read_keys.add(key)
        self._reads.append(self._host_read(tensor, origin, reason))

    def record_export(self, tensor: torch.Tensor, array: np.ndarray, *, trusted: bool) -> None:
        """Record that code received a NumPy array on the memory of a tensor.

        Args:
            tensor: Tensor that the array lies on.
            array: NumPy array.
            trusted: Whether the code is known to only pass the array on.
        """
        origin = self.origin_of(tensor)
        if depends_on_leaf(origin):
            read = self._host_read(tensor, origin, "passed to NumPy")
            self.provenance.record_export(tensor, read, None if trusted else array)

    def _host_read(self, tensor: torch.Tensor, origin: Origin, reason: str) -> HostRead:
        with self.paused():
            shown = str(tensor.tolist()) if tensor.numel() <= _SHOWN else ""
            return HostRead(origin, reason, digest(tensor), metadata_of_tensor(tensor), shown)


def _substitute(tree: Any, others: Mapping[int, torch.Tensor]) -> Any:
    """Return a tree with some tensors, given by identity, replaced by others."""
    return tree_map(lambda one: others.get(id(one), one), tree)


# -- schemas of ops ---------------------------------------------------------------------------

_IGNORING_OPERANDS = frozenset(
    f"aten::{name}"
    for name in (
        *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"),
        *("rand_like", "randn_like", "randint_like"),
    )
)
"""Random ops that use the dtype and shape of their operand and ignore its values."""
_UNDECLARED_WRITES = {
    "aten::native_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::cudnn_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::miopen_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::batch_norm_update_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats_with_counts": (("running_mean", "running_var"), ""),
}
"""Ops that write to operands without declaring it in their schema.

Each entry names the written arguments, and the argument that has to be true; empty if the op always
writes.
"""
_METADATA_OPS = frozenset(
    {
        "aten::sym_size",
        "aten::sym_stride",
        "aten::sym_numel",
        "aten::sym_storage_offset",
        "aten::is_contiguous",
        "aten::is_non_overlapping_and_dense",
        "aten::is_strides_like_format",
        "aten::size",
        "aten::stride",
        "aten::dim",
        "aten::numel",
        "aten::is_pinned",
        "aten::is_same_size",
        "aten::_has_compatible_shallow_copy_type",
        "prim::device",
        "prim::layout",
    }
)
"""Ops that return no tensor and read no values."""
_LAYOUT_ARGUMENTS = frozenset(
    {
        *("self", "a", "dtype", "out_dtype", "layout", "memory_format", "size", "sizes", "shape"),
        *("stride", "storage_offset", "dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis"),
        *("start_dim", "end_dim", "source", "destination", "output_size", "input_size"),
        *("input_sizes", "bias_sizes", "normalized_shape", "chunks", "num_chunks", "sections"),
        *("split_size", "split_sizes", "reduction", "groups", "group", "padding", "dilation"),
        *("kernel_size", "output_padding", "pad", "N", "C", "HxW", "num_heads", "num_head"),
    }
)
"""Names of integer arguments that set shapes and strides and do not change values."""


def reads_metadata_only(op: Any) -> bool:
    """Return whether an op that returns no tensor reads no values."""
    return _schema_name(op) in _METADATA_OPS or _schema_name(op).startswith("prim::")


def is_random(op: Any) -> bool:
    """Return whether the result of an op is random."""
    return torch.Tag.nondeterministic_seeded in op.tags


def ignores_operands(op: Any) -> bool:
    """Return whether the result of a random op is independent of its operands' values."""
    return _schema_name(op) in _IGNORING_OPERANDS


def shape_deciding(op: Any, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the operands whose values decide the shape of an op's result."""
    if torch.Tag.dynamic_output_shape not in op.tags:
        return []
    # The shape of an indexed tensor depends on masks, but not on the values of integer indices.
    indexing = _schema_name(op) == "aten::index"
    return [tensor for tensor in inputs if tensor.dtype is torch.bool or not indexing]


def value_numbers(
    op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[int | float | complex]:
    """Yield the Python numbers in a call that change values, not only shapes and strides."""
    for position, name, counts in _number_arguments(op):
        value = args[position] if position < len(args) else kwargs.get(name)
        if value is not None:
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, int | float | complex) and (counts or not isinstance(one, bool)):
                    yield one


@cache
def _number_arguments(op: Any) -> tuple[tuple[int, str, bool], ...]:
    """Return the arguments that these numbers are passed to.

    Each entry is a position, a name, and whether a bool counts as a number.
    """
    arguments = op._schema.arguments  # noqa: SLF001 - there is no public name
    kinds = {a.name: str(a.type).lower() for a in arguments}
    wide = {name for name, kind in kinds.items() if "int" not in kind and "bool" not in kind}
    return tuple(
        (position, argument.name, argument.name in wide)
        for position, argument in enumerate(arguments)
        if argument.name in wide
        or ("int" in kinds[argument.name] and argument.name not in _LAYOUT_ARGUMENTS)
    )


def written_tensors(
    op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Return the tensors that a call of an op writes to."""
    arguments = [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name, condition in _written_arguments(op)
        if condition is None
        or (args[condition[0]] if condition[0] < len(args) else kwargs.get(condition[1]))
    ]
    return [one for one in tree_leaves(arguments) if isinstance(one, torch.Tensor)]


@cache
def _written_arguments(op: Any) -> tuple[tuple[int, str, tuple[int, str] | None], ...]:
    """Return the arguments that an op writes to.

    Each entry is a position, a name, and the position and name of the argument that has to be true;
    None if the op always writes.
    """
    arguments = op._schema.arguments  # noqa: SLF001 - there is no public name
    undeclared, condition = _UNDECLARED_WRITES.get(_schema_name(op), ((), ""))
    positions = {argument.name: position for position, argument in enumerate(arguments)}
    only = (positions[condition], condition) if condition else None
    declared = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return (
        *((positions[name], name, None) for name in declared),
        *((positions[name], name, only) for name in undeclared),
    )


def _schema_name(op: Any) -> str:
    name: str = op._schema.name  # noqa: SLF001 - there is no public name
    return name


# -- dispatch modes ---------------------------------------------------------------------------
#
# torch has only private names for its stack of modes; all uses are here.


@contextmanager
def lowest_mode(mode: TorchDispatchMode) -> Iterator[None]:
    """Enable a mode below all others, and keep it enabled, until the end of the block."""
    with _python_dispatch._disable_current_modes():  # noqa: SLF001 - no public way to insert below
        TorchDispatchMode.__enter__(mode)  # type: ignore[no-untyped-call]  # torch's
        try:
            with _kept_enabled(mode):
                yield
        finally:
            TorchDispatchMode.__exit__(mode, None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def mode_enabled(mode: TorchDispatchMode) -> Iterator[None]:
    """Enable a mode inside its own handler, to see the ops that an op calls.

    Torch disables a mode while the mode handles an op.
    """
    torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001


@contextmanager
def mode_disabled(mode: TorchDispatchMode) -> Iterator[None]:
    """Disable the uppermost mode until the end of the block."""
    torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001


@contextmanager
def _kept_enabled(mode: TorchDispatchMode) -> Iterator[None]:
    """Keep the lowest mode enabled when code disables all modes.

    ``_disable_current_modes`` (``torch/utils/_python_dispatch.py``, 2.11 to 2.14) pops all modes
    and pushes them again afterwards. When the patched function pops this mode, it pushes the mode
    back and returns another one, if any is left.
    """
    pop, push = _python_dispatch._pop_mode, _python_dispatch._push_mode  # noqa: SLF001

    def popped(*args: Any) -> Any:
        popped_mode = pop(*args)
        if popped_mode is not mode:
            return popped_mode
        below = pop() if torch._C._len_torch_dispatch_stack() else mode  # noqa: SLF001
        push(mode)
        return below

    def pushed(other: Any) -> None:
        if other is not mode:
            push(other)

    with (
        mock.patch.object(_python_dispatch, "_pop_mode", popped),
        mock.patch.object(_python_dispatch, "_push_mode", pushed),
    ):
        yield
