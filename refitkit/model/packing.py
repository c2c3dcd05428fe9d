"""Weights that one side has in one piece, and the other in parts."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from refitkit.model.base import Frozen


def _with_place(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError("it has to have one {}, for the part that differs from layer to layer")
    return text


Template = Annotated[str, AfterValidator(_with_place)]


class Pack(Frozen):
    """A weight that one side has in one piece, and the other side in parts.

    A rule says how the two are alike, and works in both directions: parts that are given become the
    piece that the program has, and a piece that is given becomes the parts that the program has.

    Parts that have as many dimensions as the piece lie one after another in it (``torch.cat``).
    Parts that have one less are stacked in a new dimension (``torch.stack``): experts.

    Attributes:
        into: Name of the piece, with ``{}`` for what differs: ``{}.qkv_proj.weight``.
        parts: Names of the parts, in their order in the piece, with ``{}`` for the same. With a
            ``*`` in each, for numbers from 0 on, the parts of each name are stacked in dimension 0
            first. A rule with one part renames it.
        dim: Dimension of the piece in which parts lie one after another, or are stacked. Heads that
            are interleaved in it cannot be told from heads that are not: know your model.
        transposed: Whether the last two dimensions of each part are exchanged in the piece, as in
            the ``Conv1D`` of transformers. A single part may have the name of the piece: then the
            weight is transposed in either direction.
    """

    into: Template
    parts: Annotated[tuple[Template, ...], Field(min_length=1)]
    dim: int = 0
    transposed: bool = False

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        stars = {part.count("*") for part in self.parts}
        if "*" in self.into or stars not in ({0}, {1}):
            raise ValueError(
                "a * stands for numbers: one in each part, or in none, and not in into"
            )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError("a part is named twice")
        if self.into in self.parts and not (len(self.parts) == 1 and self.transposed):
            raise ValueError("the piece has the name of a part")
        return self

    @property
    def numbered(self) -> bool:
        """Whether parts have numbers."""
        return "*" in self.parts[0]
