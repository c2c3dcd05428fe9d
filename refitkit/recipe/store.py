"""Plan files: ``manifest.json``, which a person can read, and ``pinned.safetensors``.

The manifest is :class:`refitkit.model.PlanData` as JSON; it has the digests of the tensors, and
``manifest.sha256`` has its own. All are members of an uncompressed zip archive
(:mod:`refitkit.files.archive`); no pickle is read or written. The digest finds damage and edits by
hand. It keeps nobody from writing another plan, so what is read is vetted (:mod:`.vet`).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from refitkit.errors import PlanMismatchError, Problem, raise_if_resource
from refitkit.files.archive import Archive, ArchiveError, write_archive
from refitkit.model import (
    FORMAT,
    CallRef,
    PinnedRef,
    PinnedTensor,
    PlanData,
    SlotState,
    SourceRef,
    Tensor,
)
from refitkit.model.plan import fingerprint_of_slots
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.program.views import overlap_problems
from refitkit.recipe import ops
from refitkit.recipe.ops import Followed, decode_literal, is_reference, operands_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Argument, LedgerRow, OpCall, Value


MANIFEST = "manifest.json"
PINNED = "pinned.safetensors"
DIGEST = "manifest.sha256"
_MANIFEST_LIMIT = 1 << 28
_DIGEST_LIMIT = 65
_ODD = (KeyError, RuntimeError, TypeError, ValueError, OverflowError)
"""What safetensors and torch raise for headers that are well-formed and absurd."""
_WITHOUT_DIGEST = "refitplan/1"


def encode(data: PlanData, pinned: Mapping[str, torch.Tensor]) -> bytes:
    """A plan as the bytes of a plan file."""
    file = io.BytesIO()
    tensors = {
        name: tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in pinned.items()
    }
    manifest = data.model_dump_json(indent=1).encode()
    members = {MANIFEST: manifest, PINNED: save_safetensors(tensors), DIGEST: _line(manifest)}
    write_archive(file, members)
    return file.getvalue()


def decode(content: bytes, what: str) -> tuple[PlanData, dict[str, torch.Tensor]]:
    """A plan from the bytes of a plan file.

    Args:
        content: The file.
        what: What to call it in messages.

    Raises:
        PlanMismatchError: It is not a plan, is damaged, of another version, or contradicts itself.
    """
    try:
        with Archive(io.BytesIO(content)) as archive:
            data = _manifest(archive, what)
            pinned = load_safetensors(archive.read(PINNED, _pinned_limit(data)))
    except (ArchiveError, SafetensorError, *_ODD) as exc:
        raise_if_resource(exc, f"{what} cannot be read")
        raise PlanMismatchError(f"{what} is not a readable plan: {exc}.") from exc
    problems = [*problems_of(data), *_pinned_problems(data, pinned)]
    if problems:
        raise PlanMismatchError(f"{what} was damaged or changed by hand.", problems=problems)
    return data, pinned


def index_of(pinned: Mapping[str, torch.Tensor]) -> dict[str, PinnedTensor]:
    """Index entries of the tensors that a plan keeps."""
    return {
        name: PinnedTensor(
            dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256=digest(tensor)
        )
        for name, tensor in pinned.items()
    }


def _line(manifest: bytes) -> bytes:
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def _manifest(archive: Archive, what: str) -> PlanData:
    text = archive.read(MANIFEST, _MANIFEST_LIMIT)
    has_digest = DIGEST in archive.names()
    if has_digest and archive.read(DIGEST, _DIGEST_LIMIT) != _line(text):
        raise PlanMismatchError(
            f"{what} was changed after it was written.",
            problems=[Problem(MANIFEST, "does not have the digest that was written with it")],
            hint="Make the plan again, or fetch the file again.",
        )
    data = _parsed(text, what)
    if not has_digest and data.format != _WITHOUT_DIGEST:
        raise ArchiveError(f"it has no member {DIGEST!r}")
    return data


def _parsed(text: bytes, what: str) -> PlanData:
    try:
        return PlanData.model_validate_json(text)
    except ValidationError as exc:
        problems = [
            Problem(
                subject=".".join(map(str, error["loc"])) or MANIFEST,
                kind=error["type"].replace("_", " "),
                found=repr(error["input"])[:80],
                hint=error["msg"],
            )
            for error in exc.errors()
        ]
        hint = f"This refitkit reads the format {FORMAT!r}; make the plan again if it is another."
        message = f"{what} has a manifest that cannot be used."
        raise PlanMismatchError(message, problems=problems, hint=hint) from exc


def _pinned_limit(data: PlanData) -> int:
    """The most bytes that the tensors of this manifest can take, header included."""
    header = sum(len(name) * 6 + 512 for name in data.pinned)
    return (
        4096 + header + sum(ITEM_BYTES[t.dtype] * math.prod(t.shape) for t in data.pinned.values())
    )


def _pinned_problems(data: PlanData, pinned: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    found = index_of(pinned)
    for name in sorted(found.keys() | data.pinned.keys()):
        here, wanted = found.get(name), data.pinned.get(name)
        if here != wanted:
            yield Problem(name, "pinned tensor differs", repr(here), repr(wanted))


# MERGED vet: Whether a plan can be what refitkit wrote: nothing in it contradicts anything else.
#
# It is asked of every plan that is read, before anything of it is used. Values are not looked at,
# and nothing is computed: calls are tried on tensors without data (:mod:`refitkit.recipe.store`).

_VALUES: dict[SlotState, tuple[type[object], ...]] = {
    SlotState.RECIPE: (SourceRef, CallRef),
    SlotState.PINNED: (PinnedRef, SourceRef, CallRef),
    SlotState.FROZEN: (type(None), PinnedRef),
    SlotState.UNMAPPED: (type(None),),
}
_SHA256 = re.compile("[0-9a-f]{64}")
_CALLS_SINCE = "refitplan/2"


def problems_of(data: PlanData) -> Iterator[Problem]:
    """What no plan that refitkit wrote can have."""
    facts = Facts(data)
    bad_calls = list(problems_of_calls(data, facts))
    yield from _problems_of_names(data)
    yield from _problems_of_statements(data)
    yield from bad_calls
    if bad_calls:
        return  # what rows say cannot be judged
    for row in data.ledger:
        yield from _problems_of_row(row, facts)
    yield from _problems_of_guards(data, facts)


def _problems_of_names(data: PlanData) -> Iterator[Problem]:
    slots = [row.slot for row in data.ledger]
    if fingerprint_of_slots(slots) != data.fingerprint.slots:
        yield Problem("fingerprint.slots", "does not match the ledger")
    if data.format != _CALLS_SINCE and (data.calls or data.guards):
        yield Problem("format", "has no calls and no guards", data.format, _CALLS_SINCE)
    for what, names in (
        ("slot", [f"{slot.engine}/{slot.name}" for slot in slots]),
        ("leaf", [leaf.fqn for leaf in data.leaves]),
        ("tied name", [name for tie in data.ties for name in tie]),
    ):
        yield from (Problem(n, f"{what} listed twice") for n, c in Counter(names).items() if c > 1)
    for slot in slots:
        if slot.shape is not None and math.prod(slot.shape) != slot.count:
            yield Problem(slot.name, "count", str(slot.count), str(slot.shape))
    yield from _problems_of_leaves(data)


def _problems_of_leaves(data: PlanData) -> Iterator[Problem]:
    leaves = {leaf.fqn: (leaf.dtype, leaf.shape) for leaf in data.leaves}
    for name in sorted({name for tie in data.ties for name in tie} - leaves.keys()):
        yield Problem(name, "tied, and no leaf of the program")
    for tie in data.ties:
        if len({leaves.get(name) for name in tie}) > 1:
            yield Problem(" = ".join(tie), "tied, and of several shapes or dtypes")
    yield from overlap_problems(data.leaves)
    for name, kept in data.pinned.items():
        if leaves.get(name, facts := (kept.dtype, kept.shape)) != facts:
            yield Problem(name, "kept, and unlike the leaf", f"{kept.dtype} {kept.shape}")


def _problems_of_statements(data: PlanData) -> Iterator[Problem]:
    """What it says of weights without a slot, and of slots that a strategy served."""
    for name in sorted(data.unreached.keys() - {leaf.fqn for leaf in data.leaves}):
        yield Problem(name, "said to need no slot, and no leaf of the program")
    listed = {"/".join(row.slot.key) for row in data.ledger}
    for need in data.needs:
        for slot in sorted(set(need.slots) - listed):
            yield Problem(slot, f"served by {need.name!r}, and no slot")


def _problems_of_row(row: LedgerRow, facts: Facts) -> Iterator[Problem]:
    name, value = row.slot.name, row.value
    if not isinstance(value, _VALUES[row.state]):
        yield Problem(name, "value does not fit its state", repr(value), str(row.state))
    elif value is None:
        if row.sources:
            yield Problem(name, "sources of a slot that has no recipe", str(row.sources))
    elif (reason := facts.missing(value)) is not None:
        yield Problem(name, *reason)
    else:
        yield from _unlike(row, value, facts)
        yield from _problems_of_sources(row, value, facts)


def _unlike(row: LedgerRow, value: Value, facts: Facts) -> Iterator[Problem]:
    """A value may have another shape than its slot, never another dtype or count."""
    found = facts.tensor(value)
    if (found.dtype, math.prod(found.shape)) != (row.slot.dtype, row.slot.count):
        wanted = f"{row.slot.dtype}, {row.slot.count} elements"
        yield Problem(row.slot.name, "differs from its recipe", f"{found}", wanted)


def _problems_of_sources(row: LedgerRow, value: Value, facts: Facts) -> Iterator[Problem]:
    name = row.slot.name
    if isinstance(value, PinnedRef):
        yield from _problems_of_overrides(row, facts)
        return
    wanted = facts.sources(value)
    if set(row.sources) != wanted or len(set(row.sources)) != len(row.sources):
        yield Problem(
            name, "its sources are not what it follows from", _list(row.sources), _list(wanted)
        )
    elif not wanted:
        yield Problem(name, "follows from nothing", hint="such a value is kept in the plan")


def _problems_of_overrides(row: LedgerRow, facts: Facts) -> Iterator[Problem]:
    """A source that has one of these names overrides what the plan keeps."""
    for fqn in row.sources:
        if row.state is SlotState.FROZEN:
            yield Problem(row.slot.name, "sources of a value that never changes", fqn)
        elif (reason := facts.missing(SourceRef(fqn=fqn))) is not None:
            yield Problem(row.slot.name, *reason)
        else:
            yield from _unlike(row, SourceRef(fqn=fqn), facts)


def _problems_of_guards(data: PlanData, facts: Facts) -> Iterator[Problem]:
    for number, guard in enumerate(data.guards):
        name = f"guards.{number}"
        if (reason := facts.missing(guard.value)) is not None:
            yield Problem(name, *reason)
            continue
        found = facts.tensor(guard.value)
        if (found.dtype, found.shape) != (guard.dtype, guard.shape):
            yield Problem(
                name, "differs from its value", f"{found}", f"{guard.dtype} {guard.shape}"
            )
        if not facts.sources(guard.value):
            yield Problem(name, "follows from nothing")
        if not _SHA256.fullmatch(guard.sha256):
            yield Problem(name, "is no sha256", guard.sha256[:80])


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


# MERGED vet_calls: Whether the calls of a plan can be made, without making them.
#
# First what is written (:mod:`refitkit.recipe.store`). Then every call is tried on tensors of
# torch's ``meta`` device, which have dtypes and shapes and no data, and its results are compared
# with what the plan says. So a file can neither run what it should not nor ask for memory out of
# proportion to its slots and leaves.

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


# MERGED vet_form: Whether calls are written well: nothing is tried for it.
#
# They are of ops that recipes may hold, with arguments that these take and references to what is
# there.

ANY_STRIDE = ("aten.as_strided", "aten._reshape_alias")
"""How names of ops start that take any sizes and strides."""
_INT64 = range(-(2**63), 2**63)
_AT_LEAST_ONE = frozenset(
    {
        *("chunks", "dilation", "downscale_factor", "group", "groups", "kernel_size"),
        *(
            "num_groups",
            "output_size",
            "sections",
            "split_size",
            "step",
            "stride",
            "upscale_factor",
        ),
    }
)
"""Numbers that some kernels divide by without a look."""


class Form:
    """One call as it is written."""

    def __init__(self, number: int, call: OpCall) -> None:
        self._call, self._number = call, number
        self._name = name_of(number, call)
        any_stride = call.op.startswith(ANY_STRIDE)
        self._positive = frozenset[str]() if any_stride else _AT_LEAST_ONE

    def problems(self, facts: Facts) -> Iterator[Problem]:
        """What is wrong with it."""
        if not ops.is_allowed(self._call.op):
            hint = f"It may be one of another version of torch than {torch.__version__}."
            yield Problem(self._name, "no op that a recipe may hold", hint=hint)
            return
        op = ops.overload(self._call.op)
        names = [argument.name for argument in op._schema.arguments]  # noqa: SLF001
        unknown = set(self._call.kwargs) - set(names[len(self._call.args) :])
        if unknown or len(self._call.args) > len(names):
            yield Problem(self._name, "arguments that the op does not take", str(sorted(unknown)))
            return
        yield from self._of_results(op)
        operands = operands_of(self._call)
        if not operands or (ops.writes_to_operand(op) and not _starts_with_tensor(self._call)):
            yield Problem(self._name, "lacks an operand")
        for value in operands:
            if (reason := facts.missing(value, self._number)) is not None:
                yield Problem(self._name, *reason)
        for name, argument in by_name(op, self._call.args, self._call.kwargs):
            yield from self._of_argument(name, argument)

    def _of_results(self, op: Any) -> Iterator[Problem]:
        stated = len(self._call.results)
        if stated != _number_of_results(op, stated):
            yield Problem(self._name, "another number of results", str(stated))
        if not _is_device_kind(self._call.device):
            yield Problem(self._name, "no kind of device", self._call.device[:80])

    def _of_argument(self, name: str, argument: Argument) -> Iterator[Problem]:
        try:
            decoded = decode_literal(argument)
        except ValueError as exc:
            yield Problem(self._name, f"argument {name}", hint=str(exc))
            return
        if (name in {"device", "generator"} and argument is not None) or (
            name == "pin_memory" and argument
        ):
            yield Problem(self._name, f"argument {name}", str(argument)[:80], "none")
        for atom in decoded if isinstance(decoded, list) else [decoded]:
            if isinstance(atom, int) and atom not in _INT64:
                yield Problem(self._name, f"argument {name}", hint="a number of more than 64 bits")
            elif name in self._positive and isinstance(atom, int) and atom < 1:
                yield Problem(self._name, f"argument {name}", str(atom), "at least 1")


def by_name(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name."""
    for argument, given in zip(op._schema.arguments, args, strict=False):  # noqa: SLF001
        yield argument.name, given
    yield from kwargs.items()


def _number_of_results(op: Any, stated: int) -> int:
    """How many an op gives; of a list of any length, as many as the plan says."""
    returns = op._schema.returns  # noqa: SLF001
    return stated if any("List" in str(one.type) for one in returns) else len(returns)


def _starts_with_tensor(call: OpCall) -> bool:
    return bool(call.args) and is_reference(call.args[0])


def _is_device_kind(text: str) -> bool:
    try:
        return text != "meta" and torch.device(text).type == text
    except RuntimeError:
        return False


def name_of(number: int, call: OpCall) -> str:
    """What problems call it."""
    return f"calls.{number} ({call.op[:80]})"


# MERGED vet_facts: What a plan says of the tensors that its recipes refer to.


class Facts:
    """It, for those who judge the plan and those who show it."""

    def __init__(self, data: PlanData) -> None:
        """Know them; nothing is checked.

        Args:
            data: The plan.
        """
        self._calls = data.calls
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._pinned = data.pinned
        self._followed = Followed(data.calls, data.ties)

    def missing(self, value: Value, before: int | None = None) -> tuple[str, str] | None:
        """Why a reference leads nowhere, and where it leads; None if it is good.

        Args:
            value: The reference.
            before: Only calls before this one are there.
        """
        if isinstance(value, SourceRef):
            return None if value.fqn in self._leaves else ("unknown source", value.fqn)
        if isinstance(value, PinnedRef):
            return None if value.name in self._pinned else ("unknown pinned tensor", value.name)
        last = len(self._calls) if before is None else before
        if value.call >= last:
            return "refers to a call that does not come before it", str(value.call)
        if value.output >= len(self._calls[value.call].results):
            return "refers to a result that does not exist", f"{value.call}.{value.output}"
        return None

    def tensor(self, value: Value) -> Tensor:
        """Dtype and shape; only of references that lead somewhere."""
        if isinstance(value, CallRef):
            return self._calls[value.call].results[value.output]
        found = (
            self._leaves[value.fqn] if isinstance(value, SourceRef) else self._pinned[value.name]
        )
        return Tensor(dtype=found.dtype, shape=found.shape)

    def sources(self, value: Value) -> frozenset[str]:
        """All names of all leaves that a value follows from."""
        return self._followed.by(value)
