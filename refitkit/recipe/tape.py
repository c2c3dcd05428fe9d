"""A recording of all ops that run on real tensors, with where each value comes from.

While a tape runs, it sees every op on tensors that have data; ops on fake, meta and functional
tensors, which tracing makes, pass by. It stays on where libraries switch all modes off, as constant
folding does (:mod:`refitkit.recipe.tape`). What leaves it (numbers, arrays of NumPy) is watched by
:mod:`refitkit.recipe.host_reads`; what each tensor holds is known to
:mod:`refitkit.recipe.provenance`.
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
from refitkit.recipe import host_reads, ops
from refitkit.recipe.memories import Loans, is_followed
from refitkit.recipe.ops import ALIGNMENT, aligned, is_aligned, moved, same_settings
from refitkit.recipe.origins import (
    Call,
    Escape,
    Literal,
    Origin,
    Unknown,
    facts_of_tensor,
    follows_from_leaf,
    is_anchored,
)
from refitkit.recipe.provenance import Attention, Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    import numpy as np

    from refitkit.recipe.provenance import Place


_SHOWN = 4
"""Largest number of elements of a value that is shown as text."""
_RANDOM = "random numbers decide it"


class Tape(WatchingMode):
    """A recording.

    Attributes:
        loans: Arrays of NumPy that were given out.
        provenance: Where values come from, for those who tell of what is no op.
    """

    def __init__(self, leaves: Mapping[str, torch.Tensor]) -> None:
        """Know the leaves; nothing is recorded yet.

        Args:
            leaves: Everything that the program reads, by FQN.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._on = ExitStack()
        self._attention = Attention()
        self._told: set[tuple[int, int]] = set()
        self._escapes: list[Escape] = []
        self.loans = Loans()
        self.provenance = Provenance(leaves, self._attention, self.loans)

    # -- on and off -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(same_settings())
            stack.enter_context(lowest(self))
            stack.enter_context(host_reads.watched(self))
            self._on = stack.pop_all()
        self._attention.turn_here()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._on.close()

    def paused(self) -> AbstractContextManager[None]:
        """See nothing until the end of the block."""
        return self._attention.pause()

    @property
    def is_on(self) -> bool:
        """Whether what happens now, in this thread, is recorded."""
        return self._attention.is_here

    def sees(self, value: Any) -> bool:
        """Whether it is a tensor that this tape records: with data, and in its own thread."""
        return self._attention.is_here and is_followed(value)

    # -- recording --------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an op and write it down."""
        kwargs = kwargs or {}
        if self._attention.paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # noqa: SLF001 - there is no other name
            return self._ran_inside(func, args, kwargs)
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        written = [t for t in written_by(func, args, kwargs) if is_followed(t)]
        self._refuse_leaves(func, written)
        if types or not all(map(is_followed, inputs)):
            return self._unrecorded(func, args, kwargs, written)
        if hasattr(func, "impl_aten"):  # an op of torch._prims: what it calls is what counts
            with within(self):
                return func.impl_aten(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:  # no value changes, and memory tells the rest
            return func(*args, **kwargs)
        return self._recorded(func, args, kwargs, inputs, written)

    def _recorded(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> Any:
        """Run an op on tensors that are followed."""
        known = {id(tensor): self.origin_of(tensor) for tensor in inputs}
        places = [self.provenance.place(tensor) for tensor in written]
        result = self._run(func, args, kwargs, known, written, inputs)
        outputs = [a for a in tree_leaves(result) if isinstance(a, torch.Tensor)]
        if written:
            self._wrote(self._node(func, args, kwargs, known, written), places)
        elif outputs:
            self._gave(func, args, kwargs, known, inputs, outputs)
        elif not is_quiet(func):
            self._asked(func, inputs, known)
        return result

    def _run(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        known: Mapping[int, Origin],
        written: list[torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> Any:
        """Run an op as recipes will: where it matters, on operands that lie as theirs do."""
        dtypes = [dtype_name(tensor.dtype) for tensor in inputs]
        if not ops.is_sensitive(str(func), dtypes, kwargs.get("alpha", 1)):
            return func(*args, **kwargs)
        targets = {id(tensor): tensor for tensor in written}
        with self.paused():
            others = {
                id(tensor): found
                for tensor in inputs
                if (found := self._as_replayed(tensor, known, targets)) is not tensor
            }
        if not others:
            return func(*args, **kwargs)
        args, kwargs = _swapped((args, kwargs), others)
        result = func(*args, **kwargs)
        with self.paused():
            for key in others.keys() & targets:
                targets[key].copy_(others[key])
        return _swapped(result, {id(others[k]): t for k, t in targets.items() if k in others})

    def _as_replayed(
        self,
        tensor: torch.Tensor,
        known: Mapping[int, Origin],
        targets: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """An operand as it lies in memory when recipes are computed; mostly itself."""
        if tensor.is_conj() or tensor.is_neg():
            return tensor
        if id(tensor) in targets:
            return aligned(tensor)
        origin, offset = known[id(tensor)], self.provenance.offset(tensor)
        first = offset % ALIGNMENT == 0
        if first and tensor.is_contiguous() and is_aligned(tensor):  # as most are
            return tensor
        if not is_anchored(origin) or not follows_from_leaf(origin):
            return aligned(tensor)
        return tensor if is_aligned(tensor, offset) else moved(tensor, offset)

    def _ran_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op of a higher order: what it calls is what counts, if that is ops on tensors."""
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        key = torch._C.DispatchKey.CompositeExplicitAutograd  # noqa: SLF001 - its only name
        plainly = func.py_kernels.get(key)
        if plainly is not None and all(map(is_followed, inputs)):
            return plainly(*args, **kwargs)
        with without(self):
            return func(*args, **kwargs)

    def _unrecorded(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """Run an op whose operands are of kinds that are not followed."""
        try:
            return func(*args, **kwargs)
        finally:
            for place in map(self.provenance.place, written):
                self.provenance.lost(place)

    def _gave(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        """Write down an op that writes nothing."""
        if func is torch.ops.aten.as_strided.default or not all(map(is_followed, outputs)):
            return  # where it lies in memory says what the first one gives
        fresh = [(i, o) for i, o in enumerate(outputs) if not self.provenance.knows(o)]
        if not fresh:
            return
        node = self._node(func, args, kwargs, known, outputs)
        for number, output in fresh:
            self.provenance.made(output, node, number)
        self._asked(func, deciding(func, inputs), known)

    def _node(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        results: list[torch.Tensor],
    ) -> Call | Literal | Unknown:
        if is_random(func):
            drawn = not known or is_drawn(func)
            return Literal(self.provenance.copy(results[0])) if drawn else Unknown(_RANDOM)
        numbers = self._numbers(numbers_of(func, args, kwargs))
        if isinstance(numbers, Unknown):
            return numbers
        swapped, named = tree_map(
            lambda a: known[id(a)] if isinstance(a, torch.Tensor) else a, (args, dict(kwargs))
        )
        facts = tuple(map(facts_of_tensor, results))
        device = results[0].device.type
        inputs = (*known.values(), *numbers)
        return Call(func, tuple(swapped), named, facts, device, inputs, numbers)

    def _numbers(self, numbers: Iterable[complex]) -> tuple[Origin, ...] | Unknown:
        """What the numbers of a call may have been read from; unknown where nobody can say."""
        loans: list[Any] = []
        for number in numbers:
            if self.provenance.unwatched.doubt:
                return Unknown(self.provenance.unwatched.doubt)
            loans += self.loans.among(number)
        if not loans:
            return ()
        nothing = torch.empty(0)
        return (Origin(Literal(nothing, tuple(loans)), 0, contiguous=True),)

    def _wrote(self, node: Call | Literal | Unknown, places: list[Place]) -> None:
        """Write down an op that writes."""
        for number, place in enumerate(places):
            self.provenance.wrote(place, node, number)

    def _refuse_leaves(self, func: Any, written: list[torch.Tensor]) -> None:
        for tensor in written:
            problems = [
                Problem(fqn, "changed in place", str(func))
                for fqn in self.provenance.leaves_in(tensor)
            ]
            if problems:
                raise CompileError(
                    "Making the engines would change the program's own tensors.",
                    problems=problems,
                    hint="Put the model into eval mode before the export, or keep no buffers that "
                    "it updates.",
                )

    def _asked(self, func: Any, inputs: list[torch.Tensor], known: Mapping[int, Origin]) -> None:
        for tensor in inputs:
            self.escaped(tensor, known[id(tensor)], f"{func} tells of its value")

    # -- values that leave ------------------------------------------------------------------

    @property
    def escapes(self) -> list[Escape]:
        """Values that left it: what they were, and how they left."""
        return [*self._escapes, *self.loans.escapes()]

    def lent(self, tensor: torch.Tensor, array: np.ndarray, *, trusted: bool) -> None:
        """Note that an array of NumPy on the memory of a tensor was given out.

        Args:
            tensor: The tensor.
            array: The array.
            trusted: Whether whoever asked for it is known only to pass it on.
        """
        origin = self.origin_of(tensor)
        if follows_from_leaf(origin):
            escape = self._escape(tensor, origin, "it is given to NumPy")
            self.provenance.lent(tensor, escape, None if trusted else array)

    def escaped(self, tensor: torch.Tensor, origin: Origin, how: str) -> None:
        """Note that a value became something that is no tensor.

        Args:
            tensor: The value.
            origin: Where it comes from.
            how: What was done with it.
        """
        key = id(origin.node), origin.output
        if isinstance(origin.node, Literal) or key in self._told:
            return
        self._told.add(key)
        self._escapes.append(self._escape(tensor, origin, how))

    def _escape(self, tensor: torch.Tensor, origin: Origin, how: str) -> Escape:
        with self.paused():
            shown = str(tensor.tolist()) if tensor.numel() <= _SHOWN else ""
            return Escape(origin, how, digest(tensor), facts_of_tensor(tensor), shown)

    # -- where values come from -------------------------------------------------------------

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Where the present value of a tensor comes from."""
        return self.provenance.of(tensor)

    def origin_at(self, flat: torch.Tensor) -> Origin:
        """Where the values in a stretch of memory come from that somebody found by its address.

        Args:
            flat: One-dimensional and contiguous, on that memory.
        """
        return self.provenance.at(flat)


def _swapped(tree: Any, others: Mapping[int, torch.Tensor]) -> Any:
    """The same with other tensors in the place of some, which are known by identity."""
    return tree_map(lambda one: others.get(id(one), one), tree)


# MERGED schemas: What a recording has to know of an op: what it writes to, what it tells, what
# decides it.

_DRAWN = frozenset(
    f"aten::{name}"
    for name in (
        *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"),
        *("rand_like", "randn_like", "randint_like"),
    )
)
"""Random ops whose result does not depend on the values of their operand."""
_STATISTICS = {
    "aten::native_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::cudnn_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::miopen_batch_norm": (("running_mean", "running_var"), "training"),
    "aten::batch_norm_update_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats": (("running_mean", "running_var"), ""),
    "aten::batch_norm_gather_stats_with_counts": (("running_mean", "running_var"), ""),
}
"""Ops that write to operands and do not say so in their schema: to which, and if what is true."""
_QUIET = frozenset(
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
"""Ops that give no tensor and tell nothing of values."""


_LAYOUT = frozenset(
    {
        *("self", "a", "dtype", "out_dtype", "layout", "memory_format", "size", "sizes", "shape"),
        *("stride", "storage_offset", "dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis"),
        *("start_dim", "end_dim", "source", "destination", "output_size", "input_size"),
        *("input_sizes", "bias_sizes", "normalized_shape", "chunks", "num_chunks", "sections"),
        *("split_size", "split_sizes", "reduction", "groups", "group", "padding", "dilation"),
        *("kernel_size", "output_padding", "pad", "N", "C", "HxW", "num_heads", "num_head"),
    }
)
"""Arguments of whole numbers that say how tensors lie, not which values they have."""


def is_quiet(op: Any) -> bool:
    """Whether an op that gives no tensor tells nothing of values."""
    return _name(op) in _QUIET or _name(op).startswith("prim::")


def is_random(op: Any) -> bool:
    """Whether random numbers decide what an op gives."""
    return torch.Tag.nondeterministic_seeded in op.tags


def is_drawn(op: Any) -> bool:
    """Whether nothing but random numbers decides what such an op gives."""
    return _name(op) in _DRAWN


def deciding(op: Any, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Operands whose values decide the shape of what an op gives."""
    if torch.Tag.dynamic_output_shape not in op.tags:
        return []
    indexing = _name(op) == "aten::index"
    return [tensor for tensor in inputs if tensor.dtype is torch.bool or not indexing]


def numbers_of(
    op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[int | float | complex]:
    """The Python numbers in a call that decide values, not how tensors lie."""
    for position, name, counts in _numbers(op):
        given = args[position] if position < len(args) else kwargs.get(name)
        if given is not None:
            for one in given if isinstance(given, list | tuple) else (given,):
                if isinstance(one, int | float | complex) and (counts or not isinstance(one, bool)):
                    yield one


@cache
def _numbers(op: Any) -> tuple[tuple[int, str, bool], ...]:
    """Position and name of arguments for such numbers, and whether truth values are some."""
    arguments = op._schema.arguments  # noqa: SLF001 - there is no other way
    kinds = {a.name: str(a.type).lower() for a in arguments}
    wide = {name for name, kind in kinds.items() if "int" not in kind and "bool" not in kind}
    return tuple(
        (position, argument.name, argument.name in wide)
        for position, argument in enumerate(arguments)
        if argument.name in wide or ("int" in kinds[argument.name] and argument.name not in _LAYOUT)
    )


def written_by(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op writes to."""
    given = [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name, condition in _writes(op)
        if condition is None
        or (args[condition[0]] if condition[0] < len(args) else kwargs.get(condition[1]))
    ]
    return [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]


@cache
def _writes(op: Any) -> tuple[tuple[int, str, tuple[int, str] | None], ...]:
    """Position and name of the arguments that an op writes to, and of what has to be true."""
    arguments = op._schema.arguments  # noqa: SLF001 - there is no other way
    silent, condition = _STATISTICS.get(_name(op), ((), ""))
    positions = {argument.name: position for position, argument in enumerate(arguments)}
    only = (positions[condition], condition) if condition else None
    said = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return (
        *((positions[name], name, None) for name in said),
        *((positions[name], name, only) for name in silent),
    )


def _name(op: Any) -> str:
    name: str = op._schema.name  # noqa: SLF001 - there is no other way
    return name


# MERGED modes: A dispatch mode of torch below all others, which stays on where libraries switch
# all modes off.
#
# What torch offers for its stack of modes has private names; they stand here.


@contextmanager
def lowest(mode: TorchDispatchMode) -> Iterator[None]:
    """Put a mode below all others, and keep it on, until the end of the block."""
    with _python_dispatch._disable_current_modes():  # noqa: SLF001 - there is no other way below
        TorchDispatchMode.__enter__(mode)  # type: ignore[no-untyped-call]  # torch's
        try:
            with _staying(mode):
                yield
        finally:
            TorchDispatchMode.__exit__(mode, None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def within(mode: TorchDispatchMode) -> Iterator[None]:
    """See the ops that an op calls, too: while one is handled, its mode is off."""
    torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001


@contextmanager
def without(mode: TorchDispatchMode) -> Iterator[None]:
    """Take a mode away that is the uppermost, until the end of the block."""
    torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001


@contextmanager
def _staying(mode: TorchDispatchMode) -> Iterator[None]:
    """Leave the lowest mode on where all modes are switched off.

    ``_disable_current_modes`` (``torch/utils/_python_dispatch.py``, 2.11 to 2.14) pops as many
    modes as there are and pushes them again afterwards. This one is popped last, and put back.
    """
    pop, push = _python_dispatch._pop_mode, _python_dispatch._push_mode  # noqa: SLF001

    def popped(*args: Any) -> Any:
        found = pop(*args)
        if found is not mode:
            return found
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
