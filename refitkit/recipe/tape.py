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
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import escapes
from refitkit.recipe.memories import Geometry, Memories, Memory, address_of, geometry_of
from refitkit.recipe.origins import Call, Escape, Leaf, Literal, Origin, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SHOWN = 4
"""Largest number of elements of a value that is shown as text."""
_SEPARATE = "it was made where no op is seen"
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
        escapes: Values that left it: what they were, and how they left.
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
        self.escapes: list[Escape] = []
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
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if types or not all(map(_is_plain, inputs)):
            return func(*args, **kwargs)
        if hasattr(func, "impl_aten"):  # an op of torch._prims: what it calls is what counts
            with self._within():
                return func.impl_aten(*args, **kwargs)
        given = [
            args[position] if position < len(args) else kwargs.get(name)
            for position, name in _written(func)
        ]
        written = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        self._refuse_leaves(func, written)
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
        if not all(map(_is_plain, outputs)):
            return
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
    ) -> Call | Literal:
        if torch.Tag.nondeterministic_seeded in func.tags and not known:
            return Literal(self._copy(results[0]))
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
            value = Origin(node, number, geometry.contiguous)
            whole = self._rewritten(memory, geometry, value)
            memory.values.clear()
            memory.values.update(whole)
            memory.values[geometry] = value

    def _rewritten(
        self, memory: Memory, geometry: Geometry, value: Origin
    ) -> dict[Geometry, Origin]:
        """Values of a memory after a part of it was written to."""
        found = next(memory.around(geometry), None)
        if found is None or found[0] == geometry:
            return {}
        outer, base = found
        offset = (geometry.start - outer.start) // geometry.dtype.itemsize
        node = Call(
            torch.ops.aten.as_strided_scatter.default,
            (base, value, list(geometry.shape), list(geometry.stride), offset),
            {},
            (Tensor(dtype=dtype_name(outer.dtype), shape=outer.shape),),
            memory.device,
            (base, value),
        )
        return {outer: Origin(node, 0, contiguous=True)}

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

    def literal(self, tensor: torch.Tensor) -> None:
        """Note that a tensor was made of what is no tensor."""
        memory = self._memories.find(tensor) or self._memories.add(tensor)
        geometry = geometry_of(tensor, memory)
        node = Literal(self._copy(tensor))
        memory.values.setdefault(geometry, Origin(node, 0, geometry.contiguous))

    def copied(self, old: torch.UntypedStorage, new: torch.UntypedStorage) -> None:
        """Note that a storage was copied as a whole."""
        with self.paused():
            before = torch.empty(0, dtype=torch.uint8, device=old.device).set_(old)
            after = torch.empty(0, dtype=torch.uint8, device=new.device).set_(new)
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
        with self.paused():
            facts = Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            shown = str(tensor.tolist()) if tensor.numel() <= _SHOWN else ""
            self.escapes.append(Escape(origin, how, digest(tensor), facts, shown))

    # -- asking -----------------------------------------------------------------------------

    def origin_of(self, tensor: torch.Tensor) -> Origin:
        """Where the present value of a tensor comes from."""
        memory, geometry = self._place(tensor)
        found: Origin | None = memory.values.get(geometry)
        if found is None:
            found = self._seen_otherwise(memory, geometry)
            memory.values[geometry] = found
        return found

    def origin_at(self, flat: torch.Tensor) -> Origin:
        """Where the values in a stretch of memory come from that somebody found by its address.

        Args:
            flat: One-dimensional and contiguous, on that memory.
        """
        address = address_of(flat)
        if self._memories.at(address, flat.nbytes) is not None:
            return self.origin_of(flat)
        if address in self._exported:
            reason = "its memory was freed before it was read"
            return Origin(Unknown(reason), 0, contiguous=True)
        return Origin(Literal(self._copy(flat)), 0, contiguous=True)

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

    def _seen_otherwise(self, memory: Memory, geometry: Geometry) -> Origin:
        """A value that was seen in this memory in another geometry only."""
        facts = (Tensor(dtype=dtype_name(geometry.dtype), shape=geometry.shape),)
        for outer, base in memory.around(geometry):
            if (outer.start, outer.size) == (geometry.start, geometry.size) and (
                geometry.contiguous
            ):
                op: Any = torch.ops.aten.view.default
                arguments: tuple[Any, ...] = (base, list(geometry.shape))
            elif any(geometry.lazy):
                continue
            else:
                offset = (geometry.start - outer.start) // geometry.dtype.itemsize
                op = torch.ops.aten.as_strided.default
                arguments = (base, list(geometry.shape), list(geometry.stride), offset)
            node = Call(op, arguments, {}, facts, memory.device, (base,))
            return Origin(node, 0, geometry.contiguous)
        return Origin(Unknown(_SEPARATE), 0, geometry.contiguous)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with data of its own, in the ordinary layout."""
    return (
        type(value) in _PLAIN
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


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an op writes to."""
    arguments = func._schema.arguments  # noqa: SLF001 - there is no other way
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
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
