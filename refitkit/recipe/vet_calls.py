"""Whether the calls of a plan can be made, without making them.

First what is written (:mod:`refitkit.recipe.vet_form`). Then every call is tried on tensors of
torch's ``meta`` device, which have dtypes and shapes and no data, and its results are compared with
what the plan says. So a file can neither run what it should not nor ask for memory out of
proportion to its slots and leaves.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from refitkit.errors import Problem, raise_if_resource
from refitkit.model import CallRef, SourceRef, Tensor
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.recipe import ops
from refitkit.recipe.literals import decode_literal
from refitkit.recipe.operands import is_reference, operands_of
from refitkit.recipe.vet_form import ANY_STRIDE, Form, by_name, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Argument, OpCall, PlanData, Value
    from refitkit.recipe.vet_facts import Facts

_SPARE_BYTES = 1 << 26
_ONE_RESULT, _ALL_RESULTS = 16, 128
"""Results may take so many times the bytes of all slots, leaves and kept tensors."""
_MANY = 4096
_AS_RESHAPE = frozenset({"aten.view.default", "aten._unsafe_view.default"})
"""What they ask of strides depends on how the source lies in memory."""
_STATISTICS = frozenset(
    {
        "aten._native_batch_norm_legit.no_stats",
        "aten._weight_norm_interface.default",
        "aten.native_layer_norm.default",
    }
)
"""Ops that give statistics of half-precision tensors in another precision on CPUs than on ``meta``
(``torch/_decomp/decompositions.py``, ``ATen/native/WeightNorm.cpp``; 2.11 to 2.14)."""
_PRECISIONS = frozenset({"float16", "bfloat16", "float32"})
_SEVERAL = {"unbind": "", "split": "split_size", "chunk": "chunks", "tensor_split": "sections"}


def problems_of_calls(data: PlanData, facts: Facts) -> Iterator[Problem]:
    """What is wrong with the calls; what is tried on tensors is written well."""
    written = [
        problem
        for number, call in enumerate(data.calls)
        for problem in Form(number, call).problems(facts)
    ]
    if written or not data.calls:
        yield from written
        return
    with _disable_current_modes(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about ops are for whoever recorded them
        tried = list(_Trial(data, facts).problems())
    yield from tried


@dataclass
class _Budget:
    """Bytes that results may take."""

    one: int
    all: int


class _Trial:
    """All calls, one after another, on tensors without data."""

    def __init__(self, data: PlanData, facts: Facts) -> None:
        self._data, self._facts = data, facts
        self._made: list[Sequence[torch.Tensor]] = []
        self._known: dict[Value, torch.Tensor] = {}
        self._tried: dict[object, tuple[Sequence[torch.Tensor], tuple[int, ...]]] = {}
        size = _bytes_of_plan(data, facts)
        self._budget = _Budget(
            _SPARE_BYTES + _ONE_RESULT * size, _SPARE_BYTES + _ALL_RESULTS * size
        )

    def problems(self) -> Iterator[Problem]:
        """What goes wrong first."""
        for number, call in enumerate(self._data.calls):
            try:
                self._make(call)
            except Exception as exc:  # noqa: BLE001 - torch raises what it likes
                raise_if_resource(exc, f"{name_of(number, call)} cannot be vetted")
                hint = str(exc).strip().split("\n", 1)[0]
                yield Problem(
                    name_of(number, call), "cannot be made", type(exc).__name__, hint=hint
                )
                return

    def _make(self, call: OpCall) -> None:
        op = ops.overload(call.op)
        args = [self._resolved(argument) for argument in call.args]
        kwargs = {name: self._resolved(argument) for name, argument in call.kwargs.items()}
        stated = call.results
        key = call.op, stated, _described(args), _described(kwargs.items())
        if key not in self._tried:  # blocks of a model are alike
            bound = dict(by_name(op, args, kwargs))
            _check_number_of_results(op, bound, len(stated))
            _check_bounds(call.op, bound)
            self._tried[key] = self._try(op, args, kwargs, stated)
        made, sizes = self._tried[key]
        self._spend(sizes)
        self._made.append(made)

    def _try(
        self, op: Any, args: list[Any], kwargs: Mapping[str, Any], stated: Sequence[Tensor]
    ) -> tuple[Sequence[torch.Tensor], tuple[int, ...]]:
        """Results of a call, and how many bytes each new memory takes that they are parts of."""
        try:
            made = _called(op, args, kwargs)
        except NotImplementedError:  # what it gives depends on values: then as the plan says
            made = [_without_data(tensor) for tensor in stated]
        found = [Tensor(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for t in made]
        if str(op) in _STATISTICS and _differ_in_precision(found[1:], stated[1:]):
            made = [made[0], *map(_without_data, stated[1:])]
            found[1:] = stated[1:]
        if found != list(stated):
            raise _RefusedError(f"it gives {_shown(found)} where the plan says {_shown(stated)}")
        if any(t.is_neg() and t.dtype == torch.bool for t in made):
            raise _RefusedError("truth values have no negative")  # torch makes it, and cannot read
        there = {_memory(t) for t in tree_leaves((args, dict(kwargs))) if torch.is_tensor(t)}
        storages = {_memory(t): t.untyped_storage() for t in made if _memory(t) not in there}
        return made, tuple(storage.nbytes() for storage in storages.values())

    def _resolved(self, argument: Argument) -> Any:
        if isinstance(argument, tuple):
            return [self._resolved(atom) for atom in argument]
        return self._tensor(argument) if is_reference(argument) else decode_literal(argument)

    def _tensor(self, value: Value) -> torch.Tensor:
        if isinstance(value, CallRef):
            return self._made[value.call][value.output]
        if value not in self._known:
            self._known[value] = _without_data(self._facts.tensor(value))
        return self._known[value]

    def _spend(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            self._budget.all -= size
            if size > self._budget.one or self._budget.all < 0:
                raise _RefusedError("results take far more memory than all slots and leaves")


def _check_number_of_results(op: Any, bound: Mapping[str, Any], stated: int) -> None:
    """Refuse what would make a tensor for each of many million rows."""
    packet = op._schema.name.removeprefix("aten::").removesuffix("_copy")  # noqa: SLF001
    parameter = _SEVERAL.get(packet.removeprefix("unsafe_"))
    if parameter is None:
        return
    shape, dim, given = bound["self"].shape, bound.get("dim", 0), bound.get(parameter, 1)
    if not (isinstance(dim, int) and -len(shape) <= dim < len(shape) and isinstance(given, int)):
        return  # torch says what is wrong with it
    size = shape[dim]
    number = {"chunks": min(given, size), "sections": given}.get(parameter, size // given)
    if number > max(_MANY, 2 * stated):
        raise _RefusedError(f"it gives {number} results where the plan says {stated}")


def _check_bounds(op: str, bound: Mapping[str, Any]) -> None:
    """Refuse what reads or writes beside its operand, which is taken to lie in memory alone."""
    if not op.startswith(ANY_STRIDE) or 0 in bound["size"]:
        return
    first = bound.get("storage_offset") or 0
    steps = ((n - 1) * step for n, step in zip(bound["size"], bound["stride"], strict=True))
    if first < 0 or first + sum(steps) >= bound["self"].numel():
        raise _RefusedError("it is out of bounds of its operand")


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - its identity


def _described(arguments: Iterable[Any]) -> object:
    """What tells one call from another one that gives something else on tensors without data."""
    return tuple(
        (
            one.dtype,
            tuple(one.shape),
            one.stride(),
            one.storage_offset(),
            one.untyped_storage().nbytes(),
        )
        if isinstance(one, torch.Tensor)
        else _described(one)
        if isinstance(one, list | tuple)
        else (type(one), repr(one))
        for one in arguments
    )


class _RefusedError(Exception):
    """Why a call is not made."""


def _called(op: Any, args: list[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    if ops.writes_to_operand(op):
        copy = args[0].clone(memory_format=torch.contiguous_format)
        op(copy, *args[1:], **kwargs)
        return [copy]
    if str(op) in _AS_RESHAPE:
        op = torch.ops.aten.reshape.default
    if str(op).startswith(ANY_STRIDE):
        args = [args[0].clone(memory_format=torch.contiguous_format), *args[1:]]
    result = op(*args, **kwargs)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _differ_in_precision(found: Sequence[Tensor], stated: Sequence[Tensor]) -> bool:
    """Whether tensors differ in nothing but which of a few precisions they have."""
    return [t.shape for t in found] == [t.shape for t in stated] and all(
        t.dtype in _PRECISIONS for t in (*found, *stated)
    )


def _without_data(tensor: Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device="meta")


def _bytes_of_plan(data: PlanData, facts: Facts) -> int:
    """Bytes of all slots, of the leaves that they follow from, and of what the plan keeps."""
    used = {v for call in data.calls for v in operands_of(call) if isinstance(v, SourceRef)}
    sizes = [(t.dtype, t.shape) for t in map(facts.tensor, used)]
    sizes += [(t.dtype, t.shape) for t in data.pinned.values()]
    slots = sum(row.slot.nbytes for row in data.ledger)
    return slots + sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in sizes)


def _shown(tensors: Sequence[Tensor]) -> str:
    shown = ", ".join(f"{t.dtype} {t.shape}" for t in tensors[:4])
    return f"{len(tensors)} results" if len(tensors) > 4 else shown  # noqa: PLR2004 - a line of text
