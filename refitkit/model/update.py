"""Manifests: what a live update will bring, told before it arrives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName

Label = Annotated[str, Field(max_length=256)]


class UpdateEntry(Frozen):
    """One tensor of an update.

    Attributes:
        name: Name of the tensor; with several modules after the label of its module.
        dtype: Dtype, without ``torch.``.
        shape: Size of each dimension.
        digest: XXH3 hash of 128 bits of its bytes (contiguous, little endian), as hexadecimal text;
            empty if it is not checked.
        encoding: How its values come. ``full``: all of them.
    """

    name: str
    dtype: DtypeName
    shape: tuple[Dim, ...]
    digest: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    encoding: Literal["full"] = "full"


class UpdateManifest(Frozen):
    """All tensors of an update, and what it is for.

    Attributes:
        format: Name and version of the format.
        models: Fingerprint of the program (``plan.data.fingerprint.graph``) of each module, by its
            label; the label of a single module is empty. Others are not checked.
        version: Label of the weights that the update brings.
        base_version: Label of the weights that have to be live; None if it does not matter.
        entries: All tensors of the update.
    """

    format: Literal["refitkit-update/1"] = "refitkit-update/1"
    models: dict[str, str] = Field(default_factory=dict)
    version: Label = ""
    base_version: Label | None = None
    entries: tuple[UpdateEntry, ...] = ()
