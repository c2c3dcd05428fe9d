"""Plan files: ``manifest.json``, which a person can read, and ``pinned.safetensors``.

The manifest is :class:`refitkit.model.PlanData` as JSON. Both are members of an uncompressed zip
archive (:mod:`refitkit.recipe.archive`); no pickle is read or written.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from refitkit.errors import PlanMismatchError, Problem
from refitkit.model import FORMAT, PinnedRef, PinnedTensor, PlanData, SlotState, SourceRef
from refitkit.model.plan import fingerprint_of_slots
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.archive import Archive, ArchiveError, write_archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.model import Leaf, LedgerRow, Slot

MANIFEST = "manifest.json"
PINNED = "pinned.safetensors"
_MANIFEST_LIMIT = 1 << 28
_ODD = (KeyError, RuntimeError, TypeError, ValueError, OverflowError)
"""What safetensors and torch raise for headers that are well-formed and absurd."""
_KINDS: dict[SlotState, type[SourceRef | PinnedRef]] = {
    SlotState.RECIPE: SourceRef,
    SlotState.PINNED: PinnedRef,
}


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
    write_archive(file, {MANIFEST: manifest, PINNED: save_safetensors(tensors)})
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
            data = _manifest(archive.read(MANIFEST, _MANIFEST_LIMIT), what)
            pinned = load_safetensors(archive.read(PINNED, _pinned_limit(data)))
    except (ArchiveError, SafetensorError, *_ODD) as exc:
        raise PlanMismatchError(f"{what} is not a readable plan: {exc}.") from exc
    problems = [*_self_contradictions(data), *_pinned_problems(data, pinned)]
    if problems:
        raise PlanMismatchError(f"{what} was damaged or changed by hand.", problems=problems)
    return data, pinned


def index_of(pinned: Mapping[str, torch.Tensor]) -> dict[str, PinnedTensor]:
    """Index entries of the tensors that a plan keeps."""
    return {
        name: PinnedTensor(
            dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), sha256=_digest(tensor)
        )
        for name, tensor in pinned.items()
    }


def _manifest(text: bytes, what: str) -> PlanData:
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


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def _pinned_problems(data: PlanData, pinned: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    found = index_of(pinned)
    for name in sorted(found.keys() | data.pinned.keys()):
        here, wanted = found.get(name), data.pinned.get(name)
        if here != wanted:
            yield Problem(name, "pinned tensor differs", repr(here), repr(wanted))


def _self_contradictions(data: PlanData) -> Iterator[Problem]:
    """What no plan that refitkit wrote can have."""
    slots = [row.slot for row in data.ledger]
    if fingerprint_of_slots(slots) != data.fingerprint.slots:
        yield Problem("fingerprint.slots", "does not match the ledger")
    for what, names in (
        ("slot", [f"{slot.engine}/{slot.name}" for slot in slots]),
        ("leaf", [leaf.fqn for leaf in data.leaves]),
    ):
        yield from (Problem(n, f"{what} listed twice") for n, c in Counter(names).items() if c > 1)
    for slot in slots:
        if slot.shape is not None and math.prod(slot.shape) != slot.count:
            yield Problem(slot.name, "count", str(slot.count), str(slot.shape))
    leaves = {leaf.fqn: leaf for leaf in data.leaves}
    for name in sorted({name for tie in data.ties for name in tie} - leaves.keys()):
        yield Problem(name, "tied, and no leaf of the program")
    for row in data.ledger:
        yield from _row_contradictions(data, row, leaves)


def _row_contradictions(
    data: PlanData, row: LedgerRow, leaves: Mapping[str, Leaf]
) -> Iterator[Problem]:
    name, value = row.slot.name, row.value
    kind = _KINDS.get(row.state)
    if (kind is None) != (value is None) or (kind is not None and not isinstance(value, kind)):
        yield Problem(name, "value does not fit its state", repr(value), str(row.state))
    elif isinstance(value, SourceRef) and value.fqn not in row.sources:
        yield Problem(name, "its own source is not among its sources", value.fqn)
    elif isinstance(value, PinnedRef) and value.name not in data.pinned:
        yield Problem(name, "unknown pinned tensor", value.name)
    elif isinstance(value, PinnedRef):
        yield from _unlike(row.slot, data.pinned[value.name])
    yield from _source_contradictions(row, leaves)


def _source_contradictions(row: LedgerRow, leaves: Mapping[str, Leaf]) -> Iterator[Problem]:
    name = row.slot.name
    if row.value is None and row.sources:
        yield Problem(name, "sources of a slot that has no recipe", str(row.sources))
    for source in row.sources:
        if source not in leaves:
            yield Problem(name, "unknown source", source, "a leaf of the program")
        elif row.value is not None:
            yield from _unlike(row.slot, leaves[source])


def _unlike(slot: Slot, other: Leaf | PinnedTensor) -> Iterator[Problem]:
    """An identity recipe changes neither dtype nor shape."""
    if (slot.dtype, slot.shape or other.shape) != (other.dtype, other.shape):
        found = f"{other.dtype} {other.shape}"
        yield Problem(slot.name, "differs from its source", found, f"{slot.dtype} {slot.shape}")
