"""A recording of all ops that run on real tensors, with where each value comes from.

While a tape runs, it sees every op on tensors that have data; ops on fake, meta and functional
tensors, which tracing makes, pass by. It stays on where libraries switch all modes off, as constant
folding does. What leaves it (numbers, arrays of NumPy) is watched by ``escapes``.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from refitkit.errors import CompileError, Problem
from refitkit.model import Tensor
from refitkit.program.bits import digest, same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import aliases, escapes
from refitkit.recipe.loans import Loans
from refitkit.recipe.memories import Geometry, Memories, Memory, address_of, geometry_of
from refitkit.recipe.origins import (
    Call,
    Escape,
    Leaf,
    Literal,
    Origin,
    Unknown,
    follows_from_leaf,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

_WITHOUT_DISPATCH = torch._C._disabled_torch_dispatch_impl  # noqa: SLF001 - its only name
_SHOWN = 4
"""Largest number of elements of a value that is shown as text."""
_RANDOM = "random numbers decide it"
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


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A recording.

    Attributes:
        loans: Arrays of NumPy that were given out.
    """

    def __init__(self, leaves: Mapping[str, torch.Tensor]) -> None:
        """Know the leaves; nothing is recorded yet.

        Args:
            leaves: Everything that the program reads, by FQN.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._memories = Memories()
        self._on = ExitStack()
        self._thread = threading.get_ident()
        self._paused = False
        self._exported: dict[int, Origin] = {}
        self._told: set[tuple[int, int]] = set()
        self._escapes: list[Escape] = []
        self.loans = Loans()
        for fqn, tensor in leaves.items():
            if _is_plain(tensor):
                memory = self._memories.find(tensor) or self._memories.add(tensor)
                memory.leaves.append(fqn)
                geometry = geometry_of(tensor, memory)
                memory.values.setdefault(geometry, Origin(Leaf(fqn), 0, geometry.contiguous))

    # -- on and off -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_python_dispatch._disable_current_modes())  # noqa: SLF001 - below all
            super().__enter__()  # type: ignore[no-untyped-call]
            stack.callback(super().__exit__, None, None, None)
            stack.enter_context(_staying(self))
            stack.enter_context(escapes.watched(self))
            self._on, self._thread = stack.pop_all(), threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._on.close()

    @contextmanager
    def _within(self) -> Iterator[None]:
        """See the ops that an op calls, too: while one is handled, its mode is off."""
        torch._C._push_on_torch_dispatch_stack(self)  # noqa: SLF001 - as TorchDispatchMode does
        try:
            yield
        finally:
            torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing until the end of the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

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
        if self._paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # noqa: SLF001 - there is no other name
            return self._ran_inside(func, args, kwargs)
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        written = [t for t in _written(func, args, kwargs) if _is_plain(t)]
        self._refuse_leaves(func, written)
        if types or not all(map(_is_plain, inputs)):
            return self._unrecorded(func, args, kwargs, written)
        if hasattr(func, "impl_aten"):  # an op of torch._prims: what it calls is what counts
            with self._within():
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
        before = [self._place(tensor) for tensor in written]
        result = func(*args, **kwargs)
        outputs = [a for a in tree_leaves(result) if isinstance(a, torch.Tensor)]
        if written:
            self._wrote(func, args, kwargs, known, written, before)
        elif outputs:
            self._gave(func, args, kwargs, known, inputs, outputs)
        elif func._schema.name not in _QUIET and not func._schema.name.startswith("prim::"):  # noqa: SLF001
            self._asked(func, inputs, known)
        return result

    def _ran_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op of a higher order: what it calls is what counts, if that is ops on tensors."""
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        key = torch._C.DispatchKey.CompositeExplicitAutograd  # noqa: SLF001 - its only name
        plainly = func.py_kernels.get(key)
        if plainly is not None and all(map(_is_plain, inputs)):
            return plainly(*args, **kwargs)
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001 - as TorchDispatchMode does
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._push_on_torch_dispatch_stack(self)  # noqa: SLF001

    def _unrecorded(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """Run an op whose operands are of kinds that are not followed."""
        try:
            return func(*args, **kwargs)
        finally:
            for memory, geometry in map(self._place, written):
                aliases.forget(memory, geometry)

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
        if func is torch.ops.aten.as_strided.default or not all(map(_is_plain, outputs)):
            return  # where it lies in memory says what the first one gives
        fresh = [(i, o) for i, o in enumerate(outputs) if not self._is_known(o)]
        if not fresh:
            return
        node = self._node(func, args, kwargs, known, outputs)
        for number, output in fresh:
            memory = self._memories.find(output) or self._memories.add(output)
            geometry = geometry_of(output, memory)
            memory.values[geometry] = Origin(node, number, geometry.contiguous)
        if torch.Tag.dynamic_output_shape in func.tags:
            indexing = func._schema.name == "aten::index"  # noqa: SLF001
            deciding = [t for t in inputs if t.dtype is torch.bool or not indexing]
            self._asked(func, deciding, known)

    def _node(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        results: list[torch.Tensor],
    ) -> Call | Literal | Unknown:
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = not known or func._schema.name in _DRAWN  # noqa: SLF001
            return Literal(self._copy(results[0])) if drawn else Unknown(_RANDOM)
        facts = tuple(Tensor(dtype=dtype_name(r.dtype), shape=tuple(r.shape)) for r in results)
        swapped, named = tree_map(
            lambda a: known[id(a)] if isinstance(a, torch.Tensor) else a, (args, dict(kwargs))
        )
        device = results[0].device.type
        return Call(func, tuple(swapped), named, facts, device, tuple(known.values()))

    def _wrote(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        written: list[torch.Tensor],
        before: list[tuple[Memory, Geometry]],
    ) -> None:
        """Write down an op that writes: what it wrote, and what the memory around that is now."""
        node = self._node(func, args, kwargs, known, written)
        for number, (memory, geometry) in enumerate(before):
            aliases.write(memory, geometry, Origin(node, number, geometry.contiguous))

    def _refuse_leaves(self, func: Any, written: list[torch.Tensor]) -> None:
        for tensor in written:
            memory = self._memories.find(tensor)
            if memory is not None and memory.leaves:
                problems = [Problem(fqn, "changed in place", str(func)) for fqn in memory.leaves]
                raise CompileError(
                    "Making the engines would change the program's own tensors.",
                    problems=problems,
                    hint="Put the model into eval mode before the export, or keep no buffers that "
                    "it updates.",
                )

    def _asked(self, func: Any, inputs: list[torch.Tensor], known: Mapping[int, Origin]) -> None:
        for tensor in inputs:
            self.escaped(tensor, known[id(tensor)], f"{func} tells of its value")

    # -- what others tell -------------------------------------------------------------------

    def literal(self, tensor: torch.Tensor, *, foreign: bool = False) -> None:
        """Note that a tensor was made of what is no tensor.

        Args:
            tensor: It.
            foreign: Whether its memory is that of an array, so that NumPy can change it.
        """
        memory, geometry = self._place(tensor)
        node = Literal(self._copy(tensor))
        memory.values.setdefault(geometry, Origin(node, 0, geometry.contiguous))
        memory.foreign |= foreign

    def lent(self, tensor: torch.Tensor) -> None:
        """Note that an array of NumPy on the memory of a tensor was given out."""
        origin = self.origin_of(tensor)
        if follows_from_leaf(origin):
            escape = self._escape(tensor, origin, "it is given to NumPy")
            self.loans.lend(self._place(tensor)[0], escape)

    def came_back(self, tensor: torch.Tensor) -> None:
        """Note that such an array, or a view of it, became a tensor again."""
        self.loans.back(self._place(tensor)[0])

    def copied(self, old: torch.UntypedStorage, new: torch.UntypedStorage) -> None:
        """Note that a storage was copied as a whole."""
        with self.paused():
            before, after = _bytes_of(old), _bytes_of(new)
        memory = self._memories.find(before)
        if memory is not None and self._memories.find(after) is None:
            shift = old.data_ptr() - memory.address if old.nbytes() else 0
            self._memories.add(after).values = {
                geometry._replace(start=geometry.start - shift): value
                for geometry, value in memory.values.items()
                if geometry.start >= shift
            }

    def exported(self, tensor: torch.Tensor, address: int) -> None:
        """Note that somebody asked for the address of a tensor."""
        if _is_plain(tensor) and tensor.numel():
            self._exported[address] = self.origin_of(tensor)

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
            facts = Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            shown = str(tensor.tolist()) if tensor.numel() <= _SHOWN else ""
            return Escape(origin, how, digest(tensor), facts, shown)

    # -- asking -----------------------------------------------------------------------------

    @property
    def escapes(self) -> list[Escape]:
        """Values that left it: what they were, and how they left."""
        return [*self._escapes, *self.loans.escapes()]

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Where the present value of a tensor comes from."""
        memory, geometry = self._place(tensor)
        if memory.foreign and self._changed(memory, tensor):
            memory.values.clear()
            self.loans.found()
            self.literal(tensor)
        found: Origin | None = memory.values.get(geometry)
        if found is None:
            found = aliases.seen_otherwise(memory, geometry)
            memory.values[geometry] = found
        return found

    def origin_at(self, flat: torch.Tensor) -> Origin:
        """Where the values in a stretch of memory come from that somebody found by its address.

        Args:
            flat: One-dimensional and contiguous, on that memory.
        """
        address = address_of(flat)
        memory = self._memories.at(address, flat.nbytes)
        if memory is not None:
            self.loans.back(memory)
            return self.origin_of(flat)
        if address in self._exported:
            reason = "its memory was freed before it was read"
            return Origin(Unknown(reason), 0, contiguous=True)
        literal = self._copy(flat)
        with self.paused():
            self.loans.at(address, literal.view(torch.uint8).numpy())
        return Origin(Literal(literal), 0, contiguous=True)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.paused():
            return tensor.detach().clone()

    def sees(self, value: Any) -> bool:
        """Whether it is a tensor that this tape records: with data, and in its own thread."""
        mine = threading.get_ident() == self._thread and not self._paused
        return mine and _is_plain(value)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor was seen before."""
        return self._memories.find(tensor) is not None

    def _place(self, tensor: torch.Tensor) -> tuple[Memory, Geometry]:
        memory = self._memories.find(tensor) or self._memories.add(tensor)
        return memory, geometry_of(tensor, memory)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        memory = self._memories.find(tensor)
        return memory is not None and geometry_of(tensor, memory) in memory.values

    def _changed(self, memory: Memory, tensor: torch.Tensor) -> bool:
        """Whether an array of NumPy has another value than when a tensor was made of it."""
        storage = tensor.untyped_storage()
        shift = storage.data_ptr() - memory.address
        with self.paused():
            for geometry, origin in memory.values.items():
                first, off = divmod(geometry.start - shift, geometry.dtype.itemsize)
                inside = first >= 0 and not off and geometry.end - shift <= storage.nbytes()
                if isinstance(origin.node, Literal) and inside:
                    now = torch.empty(0, dtype=geometry.dtype)
                    now.set_(storage, first, geometry.shape, geometry.stride)
                    if not same_bits(now, origin.node.value):
                        return True
        return False


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with data of its own, in the ordinary layout."""
    return (
        isinstance(value, torch.Tensor)
        and type(value).__torch_dispatch__ is _WITHOUT_DISPATCH
        and not value.is_meta
        and value.layout is torch.strided
        and not value.is_quantized
        and not torch._is_functional_tensor(value)  # noqa: SLF001 - there is no other way
        and _has_memory(value)
    )


def _has_memory(value: torch.Tensor) -> bool:
    """Whether it is more than a promise: tracing makes tensors that say they are on a device."""
    try:
        address_of(value)
    except RuntimeError:
        return False
    return True


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op writes to."""
    given = [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name, condition in _writes(func)
        if condition is None
        or (args[condition[0]] if condition[0] < len(args) else kwargs.get(condition[1]))
    ]
    return [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]


@cache
def _writes(func: Any) -> tuple[tuple[int, str, tuple[int, str] | None], ...]:
    """Position and name of the arguments that an op writes to, and of what has to be true."""
    arguments = func._schema.arguments  # noqa: SLF001 - there is no other way
    silent, condition = _STATISTICS.get(func._schema.name, ((), ""))  # noqa: SLF001
    positions = {argument.name: position for position, argument in enumerate(arguments)}
    only = (positions[condition], condition) if condition else None
    said = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return (
        *((positions[name], name, None) for name in said),
        *((positions[name], name, only) for name in silent),
    )


@contextmanager
def _staying(tape: Tape) -> Iterator[None]:
    """Leave the tape on where all modes are switched off.

    ``_disable_current_modes`` (``torch/utils/_python_dispatch.py``, 2.11 to 2.14) pops as many
    modes as there are and pushes them again afterwards. The tape is popped last, and put back.
    """
    pop, push = _python_dispatch._pop_mode, _python_dispatch._push_mode  # noqa: SLF001

    def popped(*args: Any) -> Any:
        mode = pop(*args)
        if mode is not tape:
            return mode
        below = pop() if torch._C._len_torch_dispatch_stack() else tape  # noqa: SLF001
        push(tape)
        return below

    def pushed(mode: Any) -> None:
        if mode is not tape:
            push(mode)

    with (
        mock.patch.object(_python_dispatch, "_pop_mode", popped),
        mock.patch.object(_python_dispatch, "_push_mode", pushed),
    ):
        yield
