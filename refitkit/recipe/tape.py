"""A recording of all ops that run on real tensors, with where each value comes from.

While a tape runs, it sees every op on tensors that have data; ops on fake, meta and functional
tensors, which tracing makes, pass by. It stays on where libraries switch all modes off, as constant
folding does (:mod:`refitkit.recipe.modes`). What leaves it (numbers, arrays of NumPy) is watched by
:mod:`refitkit.recipe.escapes`; what each tensor holds is known to
:mod:`refitkit.recipe.provenance`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map

from refitkit.errors import CompileError, Problem
from refitkit.program.ambient import WatchingMode
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import escapes, modes, ops, schemas
from refitkit.recipe.attention import Attention
from refitkit.recipe.conditions import ALIGNMENT, aligned, is_aligned, moved, same_settings
from refitkit.recipe.layouts import is_anchored
from refitkit.recipe.loans import Loans
from refitkit.recipe.memories import is_followed
from refitkit.recipe.origins import (
    Call,
    Escape,
    Literal,
    Origin,
    Unknown,
    facts_of_tensor,
    follows_from_leaf,
)
from refitkit.recipe.provenance import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
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
            stack.enter_context(modes.lowest(self))
            stack.enter_context(escapes.watched(self))
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
        written = [t for t in schemas.written_by(func, args, kwargs) if is_followed(t)]
        self._refuse_leaves(func, written)
        if types or not all(map(is_followed, inputs)):
            return self._unrecorded(func, args, kwargs, written)
        if hasattr(func, "impl_aten"):  # an op of torch._prims: what it calls is what counts
            with modes.within(self):
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
        elif not schemas.is_quiet(func):
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
        with modes.without(self):
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
        self._asked(func, schemas.deciding(func, inputs), known)

    def _node(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        known: Mapping[int, Origin],
        results: list[torch.Tensor],
    ) -> Call | Literal | Unknown:
        if schemas.is_random(func):
            drawn = not known or schemas.is_drawn(func)
            return Literal(self.provenance.copy(results[0])) if drawn else Unknown(_RANDOM)
        numbers = self._numbers(schemas.numbers_of(func, args, kwargs))
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
