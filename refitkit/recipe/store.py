"""Plan files: encode, decode, and validate decoded plans.

A plan file is an uncompressed zip archive (:mod:`refitkit.files.archive`) with three members:

- ``manifest.json``: :class:`refitkit.model.PlanData` as JSON, which people can read. It holds the
  digests of the pinned tensors;
- ``pinned.safetensors``: the pinned tensors;
- ``manifest.sha256``: the digest of the manifest.

No pickle is read or written. The digest finds damage and manual edits. It does not prevent
forged plans, so every plan that is read is vetted before anything in it is used.

Read ``encode`` and ``decode`` first. ``problems_of`` then vets a plan in three layers. Statements
must not contradict one another. Calls must be well-formed (``_CallForm``). Calls must run on
torch's ``meta`` device with the results that the plan states (``_Trial``). Meta tensors have dtypes
and shapes but no data, so vetting computes nothing. A file can thus neither run what it should not
nor ask for memory out of proportion to its slots and leaves. ``TensorMetadata`` at the end looks up
the tensors that references refer to.
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
from refitkit.recipe.ops import LeafDependencies, decode_literal, is_reference, operands_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Argument, LedgerRow, OpCall, Value


MANIFEST = "manifest.json"
PINNED = "pinned.safetensors"
DIGEST = "manifest.sha256"
_MANIFEST_LIMIT = 1 << 28
_DIGEST_LIMIT = 65
_PARSE_ERRORS = (KeyError, RuntimeError, TypeError, ValueError, OverflowError)
"""Raised by safetensors and torch for headers that are well-formed but absurd."""
_WITHOUT_DIGEST = "refitplan/1"


def encode(data: PlanData, pinned: Mapping[str, torch.Tensor]) -> bytes:
    """The content of a plan file.

    Args:
        data: The plan.
        pinned: The tensors that it keeps, by name, on any device and in any layout.
    """
    file = io.BytesIO()
    # clones, because safetensors refuses tensors that share memory
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


def decode(content: bytes, label: str) -> tuple[PlanData, dict[str, torch.Tensor]]:
    """A plan and the tensors that it keeps, from the content of a plan file.

    Args:
        content: The whole file.
        label: Label of the plan in error messages.

    Raises:
        PlanMismatchError: The content is not a plan, is damaged, has another format version, or
            contradicts itself.
    """
    try:
        with Archive(io.BytesIO(content)) as archive:
            data = _manifest(archive, label)
            # the manifest limits the size, so that a small manifest cannot come with a huge member
            pinned = load_safetensors(archive.read(PINNED, _pinned_limit(data)))
    except (ArchiveError, SafetensorError, *_PARSE_ERRORS) as exc:
        raise_if_resource(exc, f"{label} cannot be read")
        raise PlanMismatchError(f"{label} is not a readable plan: {exc}.") from exc
    problems = [*problems_of(data), *_pinned_problems(data, pinned)]
    if problems:
        raise PlanMismatchError(f"{label} is damaged, or was edited.", problems=problems)
    return data, pinned


def index_of(pinned: Mapping[str, torch.Tensor]) -> dict[str, PinnedTensor]:
    """The manifest's entries for the tensors that a plan keeps, by name."""
    return {
        name: PinnedTensor(
            dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256=digest(tensor)
        )
        for name, tensor in pinned.items()
    }


def _line(manifest: bytes) -> bytes:
    """Content of ``manifest.sha256``."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def _manifest(archive: Archive, label: str) -> PlanData:
    text = archive.read(MANIFEST, _MANIFEST_LIMIT)
    has_digest = DIGEST in archive.names()
    if has_digest and archive.read(DIGEST, _DIGEST_LIMIT) != _line(text):
        raise PlanMismatchError(
            f"{label} was changed after it was written.",
            problems=[Problem(MANIFEST, "does not match its digest", hint=f"see {DIGEST}")],
            hint="Make the plan again, or fetch the file again.",
        )
    data = _parsed(text, label)
    if not has_digest and data.format != _WITHOUT_DIGEST:
        raise ArchiveError(f"it has no member {DIGEST!r}")
    return data


def _parsed(text: bytes, label: str) -> PlanData:
    try:
        return PlanData.model_validate_json(text)
    except ValidationError as exc:
        problems = [
            Problem(
                subject=".".join(map(str, error["loc"])) or MANIFEST,
                kind=error["type"].replace("_", " "),
                # cut: inputs come from the file and may be huge
                found=repr(error["input"])[:80],
                hint=error["msg"],
            )
            for error in exc.errors()
        ]
        hint = f"This refitkit reads the format {FORMAT!r}; make the plan again if it is another."
        message = f"{label} has a manifest that cannot be used."
        raise PlanMismatchError(message, problems=problems, hint=hint) from exc


def _pinned_limit(data: PlanData) -> int:
    """The most bytes that ``pinned.safetensors`` of this manifest can have, header included."""
    header = sum(len(name) * 6 + 512 for name in data.pinned)  # JSON escapes take 6 bytes
    return (
        4096 + header + sum(ITEM_BYTES[t.dtype] * math.prod(t.shape) for t in data.pinned.values())
    )


def _pinned_problems(data: PlanData, pinned: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    index = index_of(pinned)
    for name in sorted(index.keys() | data.pinned.keys()):
        found, wanted = index.get(name), data.pinned.get(name)
        if found != wanted:
            yield Problem(name, "pinned tensor differs", repr(found), repr(wanted))


# -- statements -------------------------------------------------------------------------------

_VALUE_TYPES: dict[SlotState, tuple[type[object], ...]] = {
    SlotState.RECIPE: (SourceRef, CallRef),
    SlotState.PINNED: (PinnedRef, SourceRef, CallRef),
    SlotState.FROZEN: (type(None), PinnedRef),
    SlotState.UNMAPPED: (type(None),),
}
_SHA256 = re.compile("[0-9a-f]{64}")
_WITH_CALLS = "refitplan/2"


def problems_of(data: PlanData) -> Iterator[Problem]:
    """Problems that no plan written by refitkit has: contradictions, and calls that cannot run."""
    metadata = TensorMetadata(data)
    # first, because references of rows and guards are checked against calls
    call_problems = list(_problems_of_calls(data, metadata))
    yield from _problems_of_names(data)
    yield from _problems_of_statements(data)
    yield from call_problems
    if call_problems:
        return  # rows and guards refer to results of calls
    for row in data.ledger:
        yield from _problems_of_row(row, metadata)
    yield from _problems_of_guards(data, metadata)


def _problems_of_names(data: PlanData) -> Iterator[Problem]:
    slots = [row.slot for row in data.ledger]
    if fingerprint_of_slots(slots) != data.fingerprint.slots:
        yield Problem("fingerprint.slots", "does not match the ledger")
    if data.format != _WITH_CALLS and (data.calls or data.guards):
        yield Problem("format", "allows no calls and no guards", data.format, _WITH_CALLS)
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
        yield Problem(name, "tied, but not a leaf of the program")
    for tie in data.ties:
        if len({leaves.get(name) for name in tie}) > 1:
            yield Problem(" = ".join(tie), "tied, but of different shapes or dtypes")
    yield from overlap_problems(data.leaves)
    for name, pinned in data.pinned.items():
        if leaves.get(name, found := (pinned.dtype, pinned.shape)) != found:
            yield Problem(
                name, "pinned tensor differs from the leaf", f"{pinned.dtype} {pinned.shape}"
            )


def _problems_of_statements(data: PlanData) -> Iterator[Problem]:
    """Problems of the weights that need no slot, and of the slots that strategies filled."""
    for name in sorted(data.unreached.keys() - {leaf.fqn for leaf in data.leaves}):
        yield Problem(name, "listed as needing no slot, but not a leaf of the program")
    slots = {"/".join(row.slot.key) for row in data.ledger}
    for need in data.needs:
        for slot in sorted(set(need.slots) - slots):
            yield Problem(slot, f"filled by {need.name!r}, but not a slot")


def _problems_of_row(row: LedgerRow, metadata: TensorMetadata) -> Iterator[Problem]:
    name, value = row.slot.name, row.value
    if not isinstance(value, _VALUE_TYPES[row.state]):
        yield Problem(name, "value does not fit its state", repr(value), str(row.state))
    elif value is None:
        if row.sources:
            yield Problem(name, "has sources, but no recipe", str(row.sources))
    elif (reason := metadata.reference_problem(value)) is not None:
        yield Problem(name, *reason)
    else:
        yield from _type_mismatch(row, value, metadata)
        yield from _problems_of_sources(row, value, metadata)


def _type_mismatch(row: LedgerRow, value: Value, metadata: TensorMetadata) -> Iterator[Problem]:
    """A value may have another shape than its slot, but not another dtype or count."""
    found = metadata.tensor(value)
    if (found.dtype, math.prod(found.shape)) != (row.slot.dtype, row.slot.count):
        wanted = f"{row.slot.dtype}, {row.slot.count} elements"
        yield Problem(row.slot.name, "differs from its recipe", f"{found}", wanted)


def _problems_of_sources(
    row: LedgerRow, value: Value, metadata: TensorMetadata
) -> Iterator[Problem]:
    name = row.slot.name
    if isinstance(value, PinnedRef):
        yield from _problems_of_overrides(row, metadata)
        return
    wanted = metadata.sources(value)
    if set(row.sources) != wanted or len(set(row.sources)) != len(row.sources):
        yield Problem(
            name,
            "its sources are not the leaves that it depends on",
            _list(row.sources),
            _list(wanted),
        )
    elif not wanted:
        yield Problem(name, "depends on no leaf", hint="a plan pins the value of this kind of slot")


def _problems_of_overrides(row: LedgerRow, metadata: TensorMetadata) -> Iterator[Problem]:
    """Problems of the names under which a source overrides a pinned tensor."""
    for fqn in row.sources:
        if row.state is SlotState.FROZEN:
            yield Problem(row.slot.name, "has sources, but its value never changes", fqn)
        elif (reason := metadata.reference_problem(SourceRef(fqn=fqn))) is not None:
            yield Problem(row.slot.name, *reason)
        else:
            yield from _type_mismatch(row, SourceRef(fqn=fqn), metadata)


def _problems_of_guards(data: PlanData, metadata: TensorMetadata) -> Iterator[Problem]:
    for number, guard in enumerate(data.guards):
        name = f"guards.{number}"
        if (reason := metadata.reference_problem(guard.value)) is not None:
            yield Problem(name, *reason)
            continue
        found = metadata.tensor(guard.value)
        if (found.dtype, found.shape) != (guard.dtype, guard.shape):
            yield Problem(
                name, "differs from its value", f"{found}", f"{guard.dtype} {guard.shape}"
            )
        if not metadata.sources(guard.value):
            yield Problem(name, "depends on no leaf")
        if not _SHA256.fullmatch(guard.sha256):
            yield Problem(name, "is not a sha256", guard.sha256[:80])


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


# -- calls as they are written ------------------------------------------------------------------

_ANY_STRIDE = ("aten.as_strided", "aten._reshape_alias")
"""Starts of the names of ops that take arbitrary sizes and strides."""
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
"""Parameters that some kernels divide by without a check."""


def _problems_of_calls(data: PlanData, metadata: TensorMetadata) -> Iterator[Problem]:
    """Problems of all calls. Calls are tried on meta tensors only if all are well-formed."""
    form_problems = [
        problem
        for number, call in enumerate(data.calls)
        for problem in _CallForm(number, call).problems(metadata)
    ]
    if form_problems or not data.calls:
        yield from form_problems
        return
    with _disable_current_modes(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about ops concern the one who recorded
        trial_problems = list(_Trial(data, metadata).problems())
    yield from trial_problems


class _CallForm:
    """Checks of one call as it is written: an allowed op, its arguments, and its references."""

    def __init__(self, number: int, call: OpCall) -> None:
        self._call, self._number = call, number
        self._name = _name_of(number, call)
        # sizes and strides of these ops may be 0; the trial checks them
        takes_any_stride = call.op.startswith(_ANY_STRIDE)
        self._positive = frozenset[str]() if takes_any_stride else _AT_LEAST_ONE

    def problems(self, metadata: TensorMetadata) -> Iterator[Problem]:
        """Everything that is wrong with the call."""
        if not ops.is_allowed(self._call.op):
            hint = f"The op may exist in another version of torch than {torch.__version__}."
            yield Problem(self._name, "not an op that recipes may hold", hint=hint)
            return
        op = ops.overload(self._call.op)
        names = [argument.name for argument in op._schema.arguments]  # noqa: SLF001
        unknown = set(self._call.kwargs) - set(names[len(self._call.args) :])
        if unknown or len(self._call.args) > len(names):
            yield Problem(self._name, "arguments that the op does not take", str(sorted(unknown)))
            return
        yield from self._problems_of_results(op)
        operands = operands_of(self._call)
        if not operands or (ops.writes_to_operand(op) and not _starts_with_tensor(self._call)):
            yield Problem(self._name, "has no operand")
        for value in operands:
            if (reason := metadata.reference_problem(value, self._number)) is not None:
                yield Problem(self._name, *reason)
        for name, argument in _by_name(op, self._call.args, self._call.kwargs):
            yield from self._problems_of_argument(name, argument)

    def _problems_of_results(self, op: Any) -> Iterator[Problem]:
        stated = len(self._call.results)
        if stated != _number_of_results(op, stated):
            yield Problem(self._name, "wrong number of results", str(stated))
        if not _is_device_kind(self._call.device):
            yield Problem(self._name, "not a kind of device", self._call.device[:80])

    def _problems_of_argument(self, name: str, argument: Argument) -> Iterator[Problem]:
        try:
            decoded = decode_literal(argument)
        except ValueError as exc:
            yield Problem(self._name, f"argument {name}", hint=str(exc))
            return
        # recipes run where their operands are, and without random numbers
        if (name in {"device", "generator"} and argument is not None) or (
            name == "pin_memory" and argument
        ):
            yield Problem(self._name, f"argument {name}", str(argument)[:80], "none")
        for atom in decoded if isinstance(decoded, list) else [decoded]:
            if isinstance(atom, int) and atom not in _INT64:
                yield Problem(self._name, f"argument {name}", hint="a number of more than 64 bits")
            elif name in self._positive and isinstance(atom, int) and atom < 1:
                yield Problem(self._name, f"argument {name}", str(atom), "at least 1")


def _by_name(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of all arguments."""
    for parameter, value in zip(op._schema.arguments, args, strict=False):  # noqa: SLF001
        yield parameter.name, value
    yield from kwargs.items()


def _number_of_results(op: Any, stated: int) -> int:
    """How many results an op returns. A list of any length has as many as the plan states."""
    returns = op._schema.returns  # noqa: SLF001
    return stated if any("List" in str(one.type) for one in returns) else len(returns)


def _starts_with_tensor(call: OpCall) -> bool:
    return bool(call.args) and is_reference(call.args[0])


def _is_device_kind(text: str) -> bool:
    try:
        return text != "meta" and torch.device(text).type == text
    except RuntimeError:
        return False


def _name_of(number: int, call: OpCall) -> str:
    """Subject of problems of a call."""
    return f"calls.{number} ({call.op[:80]})"


# -- calls on meta tensors ----------------------------------------------------------------------

_SPARE_BYTES = 1 << 26
_ONE_RESULT, _ALL_RESULTS = 16, 128
"""Limits of memory: multiples of the bytes of all slots, leaves and pinned tensors."""
_MAX_EXTRA_RESULTS = 4096
_AS_RESHAPE = frozenset({"aten.view.default", "aten._unsafe_view.default"})
"""Ops that work for some strides of their operand only. A plan does not state the strides of a
source, so the trial runs ``aten.reshape`` for them."""
_STATISTICS = frozenset(
    {
        "aten._native_batch_norm_legit.no_stats",
        "aten._weight_norm_interface.default",
        "aten.native_layer_norm.default",
    }
)
"""Ops whose statistics of half-precision tensors have another precision on CPUs than on ``meta``
(``torch/_decomp/decompositions.py``, ``ATen/native/WeightNorm.cpp``; torch 2.11 to 2.14)."""
_PRECISIONS = frozenset({"float16", "bfloat16", "float32"})
_RESULT_COUNT_PARAMETERS = {
    "unbind": "",
    "split": "split_size",
    "chunk": "chunks",
    "tensor_split": "sections",
}
"""The parameter that decides how many results an op returns, by op."""


@dataclass
class _Budget:
    """Bytes that results may still take.

    Attributes:
        one: Bytes of one result.
        all: Bytes of all results together.
    """

    one: int
    all: int


class _Trial:
    """Runs all calls, one after another, on meta tensors."""

    def __init__(self, data: PlanData, metadata: TensorMetadata) -> None:
        self._data, self._metadata = data, metadata
        self._results: list[Sequence[torch.Tensor]] = []
        self._inputs: dict[Value, torch.Tensor] = {}
        self._tried: dict[object, tuple[Sequence[torch.Tensor], tuple[int, ...]]] = {}
        size = _bytes_of_plan(data, metadata)
        self._budget = _Budget(
            _SPARE_BYTES + _ONE_RESULT * size, _SPARE_BYTES + _ALL_RESULTS * size
        )

    def problems(self) -> Iterator[Problem]:
        """The first problem, if there is one. Later calls depend on the results of earlier ones."""
        for number, call in enumerate(self._data.calls):
            try:
                self._run(call)
            except Exception as exc:  # noqa: BLE001 - meta kernels raise any type
                raise_if_resource(exc, f"{_name_of(number, call)} cannot be vetted")
                hint = str(exc).strip().split("\n", 1)[0]
                yield Problem(
                    _name_of(number, call), "cannot be run", type(exc).__name__, hint=hint
                )
                return

    def _run(self, call: OpCall) -> None:
        op = ops.overload(call.op)
        args = [self._resolved(argument) for argument in call.args]
        kwargs = {name: self._resolved(argument) for name, argument in call.kwargs.items()}
        stated = call.results
        # layers of a model repeat the same calls: each kind is tried once, but counted each time
        key = call.op, stated, _identity_of(args), _identity_of(kwargs.items())
        if key not in self._tried:
            by_name = dict(_by_name(op, args, kwargs))
            _check_number_of_results(op, by_name, len(stated))
            _check_bounds(call.op, by_name)
            self._tried[key] = self._try(op, args, kwargs, stated)
        results, sizes = self._tried[key]
        self._spend(sizes)
        self._results.append(results)

    def _try(
        self, op: Any, args: list[Any], kwargs: Mapping[str, Any], stated: Sequence[Tensor]
    ) -> tuple[Sequence[torch.Tensor], tuple[int, ...]]:
        """Results of a call, and the bytes of each storage that it allocates."""
        try:
            results = _run_op(op, args, kwargs)
        except NotImplementedError:  # shapes depend on values: take those that the plan states
            results = [_meta_tensor(tensor) for tensor in stated]
        found = [Tensor(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for t in results]
        if str(op) in _STATISTICS and _differ_in_precision(found[1:], stated[1:]):
            results = [results[0], *map(_meta_tensor, stated[1:])]
            found[1:] = stated[1:]
        if found != list(stated):
            raise _RefusedError(f"it returns {_shown(found)}, but the plan states {_shown(stated)}")
        # torch creates this view, but cannot read it
        if any(t.is_neg() and t.dtype == torch.bool for t in results):
            raise _RefusedError("a boolean tensor has no negative")
        # views share the storage of an operand, and take no memory of their own
        inputs = {_storage_id(t) for t in tree_leaves((args, dict(kwargs))) if torch.is_tensor(t)}
        storages = {
            _storage_id(t): t.untyped_storage() for t in results if _storage_id(t) not in inputs
        }
        return results, tuple(storage.nbytes() for storage in storages.values())

    def _resolved(self, argument: Argument) -> Any:
        if isinstance(argument, tuple):
            return [self._resolved(atom) for atom in argument]
        return self._tensor(argument) if is_reference(argument) else decode_literal(argument)

    def _tensor(self, value: Value) -> torch.Tensor:
        if isinstance(value, CallRef):
            return self._results[value.call][value.output]
        if value not in self._inputs:
            self._inputs[value] = _meta_tensor(self._metadata.tensor(value))
        return self._inputs[value]

    def _spend(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            self._budget.all -= size
            if size > self._budget.one or self._budget.all < 0:
                raise _RefusedError("results take far more memory than all slots and leaves")


class _RefusedError(Exception):
    """The reason why a call is refused."""


def _check_number_of_results(op: Any, by_name: Mapping[str, Any], stated: int) -> None:
    """Refuse calls that would create a tensor for each of many million rows."""
    # the meta kernel creates all results before their number could be compared
    packet = op._schema.name.removeprefix("aten::").removesuffix("_copy")  # noqa: SLF001
    parameter = _RESULT_COUNT_PARAMETERS.get(packet.removeprefix("unsafe_"))
    if parameter is None:
        return
    shape, dim, value = by_name["self"].shape, by_name.get("dim", 0), by_name.get(parameter, 1)
    if not (isinstance(dim, int) and -len(shape) <= dim < len(shape) and isinstance(value, int)):
        return  # torch raises a better error
    size = shape[dim]
    number = {"chunks": min(value, size), "sections": value}.get(parameter, size // value)
    if number > max(_MAX_EXTRA_RESULTS, 2 * stated):
        raise _RefusedError(f"it returns {number} results, but the plan states {stated}")


def _check_bounds(op: str, by_name: Mapping[str, Any]) -> None:
    """Refuse calls that would read or write memory outside their operand."""
    if not op.startswith(_ANY_STRIDE) or 0 in by_name["size"]:
        return
    first = by_name.get("storage_offset") or 0
    steps = ((n - 1) * step for n, step in zip(by_name["size"], by_name["stride"], strict=True))
    if first < 0 or first + sum(steps) >= by_name["self"].numel():
        raise _RefusedError("it is out of bounds of its operand")


def _run_op(op: Any, args: list[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Results of an op on meta tensors, under the conditions of a replay."""
    if ops.writes_to_operand(op):
        copy = args[0].clone(memory_format=torch.contiguous_format)
        op(copy, *args[1:], **kwargs)
        return [copy]
    if str(op) in _AS_RESHAPE:
        op = torch.ops.aten.reshape.default
    if str(op).startswith(_ANY_STRIDE):  # a replay makes the operand alone in its storage
        args = [args[0].clone(memory_format=torch.contiguous_format), *args[1:]]
    result = op(*args, **kwargs)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - data_ptr of meta tensors is 0


def _identity_of(arguments: Iterable[Any]) -> object:
    """A key: calls of one op whose arguments have equal keys give equal results on ``meta``."""
    return tuple(
        (
            one.dtype,
            tuple(one.shape),
            one.stride(),
            one.storage_offset(),
            one.untyped_storage().nbytes(),
        )
        if isinstance(one, torch.Tensor)
        else _identity_of(one)
        if isinstance(one, list | tuple)
        else (type(one), repr(one))
        for one in arguments
    )


def _differ_in_precision(found: Sequence[Tensor], stated: Sequence[Tensor]) -> bool:
    """Whether tensors have equal shapes, and differ only between a few precisions."""
    return [t.shape for t in found] == [t.shape for t in stated] and all(
        t.dtype in _PRECISIONS for t in (*found, *stated)
    )


def _meta_tensor(tensor: Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device="meta")


def _bytes_of_plan(data: PlanData, metadata: TensorMetadata) -> int:
    """Bytes of all slots, of the leaves that calls read, and of pinned tensors."""
    used = {v for call in data.calls for v in operands_of(call) if isinstance(v, SourceRef)}
    sizes = [(t.dtype, t.shape) for t in map(metadata.tensor, used)]
    sizes += [(t.dtype, t.shape) for t in data.pinned.values()]
    slots = sum(row.slot.nbytes for row in data.ledger)
    return slots + sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in sizes)


def _shown(tensors: Sequence[Tensor]) -> str:
    shown = ", ".join(f"{t.dtype} {t.shape}" for t in tensors[:4])
    return f"{len(tensors)} results" if len(tensors) > 4 else shown  # noqa: PLR2004 - a line of text


# -- references -------------------------------------------------------------------------------


class TensorMetadata:
    """Tensor metadata of a plan, for validation and display."""

    def __init__(self, data: PlanData) -> None:
        """Index the plan. Nothing is checked.

        Args:
            data: The plan.
        """
        self._calls = data.calls
        self._leaves = {leaf.fqn: leaf for leaf in data.leaves}
        self._pinned = data.pinned
        self._dependencies = LeafDependencies(data.calls, data.ties)

    def reference_problem(self, value: Value, before: int | None = None) -> tuple[str, str] | None:
        """Why a reference is invalid and what it refers to, or None if it is valid.

        Args:
            value: The reference.
            before: Number of the call that contains the reference. It may refer to earlier calls
                only. None allows all calls.
        """
        if isinstance(value, SourceRef):
            return None if value.fqn in self._leaves else ("unknown source", value.fqn)
        if isinstance(value, PinnedRef):
            return None if value.name in self._pinned else ("unknown pinned tensor", value.name)
        end = len(self._calls) if before is None else before
        if value.call >= end:
            return "refers to a call that does not come before it", str(value.call)
        if value.output >= len(self._calls[value.call].results):
            return "refers to a result that does not exist", f"{value.call}.{value.output}"
        return None

    def tensor(self, value: Value) -> Tensor:
        """Dtype and shape of the tensor that a valid reference refers to."""
        if isinstance(value, CallRef):
            return self._calls[value.call].results[value.output]
        tensor = (
            self._leaves[value.fqn] if isinstance(value, SourceRef) else self._pinned[value.name]
        )
        return Tensor(dtype=tensor.dtype, shape=tensor.shape)

    def sources(self, value: Value) -> frozenset[str]:
        """All names of all leaves that a value depends on."""
        return self._dependencies.of(value)
