"""Plan files: ``manifest.json``, which a person can read, and ``pinned.safetensors``.

The manifest is :class:`refitkit.model.PlanData` as JSON; it has the digests of the tensors, and
``manifest.sha256`` has its own. All are members of an uncompressed zip archive
(:mod:`refitkit.recipe.archive`); no pickle is read or written. The digest finds damage and edits by
hand. It keeps nobody from writing another plan, so what is read is vetted (:mod:`.vet`).
"""

from __future__ import annotations

import hashlib
import io
import math
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from refitkit.errors import PlanMismatchError, Problem, raise_if_resource
from refitkit.model import FORMAT, PinnedTensor, PlanData
from refitkit.model.slot import ITEM_BYTES
from refitkit.program.bits import digest
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.archive import Archive, ArchiveError, write_archive
from refitkit.recipe.vet import problems_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
