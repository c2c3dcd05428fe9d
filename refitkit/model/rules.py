"""How names and forms of a checkpoint become those of a model, where they are not the same."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from refitkit.model.base import Frozen
from refitkit.model.families import FAMILIES
from refitkit.model.packing import Pack

WRAPPERS = (
    "module",
    "model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
"""Parts of names that wrappers put there: DataParallel, Lightning and transformers, modules that
``torch.compile`` made, fully sharded ones (of torch, and of older versions and fairscale), those
that compute again in the backward pass, and Lightning Fabric's."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as exc:
        raise ValueError(f"it is no regular expression: {exc}") from exc
    return text


def _family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"there are the families {', '.join(FAMILIES)}")
    return name


Pattern = Annotated[str, AfterValidator(_pattern)]


class Rename(Frozen):
    r"""A name for another.

    Attributes:
        pattern: Regular expression that a whole name has to match, such as ``encoder\.(.*)``.
        to: What it becomes; ``\1`` is the first group. As for :func:`re.sub`.
    """

    pattern: Pattern
    to: str

    @model_validator(mode="after")
    def _with_its_groups(self) -> Self:
        try:  # every string has an empty match, and only what matches has its replacement read
            re.sub(f"{self.pattern}|", self.to, "")
        except (re.error, IndexError) as exc:
            raise ValueError(f"{self.to!r} is no replacement for it: {exc}") from exc
        return self


class Rules(Frozen):
    r"""What is done to weights before they are held against what a program reads.

    Nothing is done to an entry that the program reads as it is, unless a rule of ``rename`` gives
    it another name of the program. What was done is in the report.

    Where these rules leave names that do not fit, and exactly one prefix to drop or add makes all
    names of the program fit, with their shapes, that is done without a rule and reported; never in
    a refit in part. Where several do, the error lists a rule for each.

    Attributes:
        subtree: Only names that begin with this count, without it; others are left out.
        ignore: Regular expressions for entries to leave out, such as ``lm_head\..*``: they match
            a whole name, with or without the subtree. A few entries that are no weights of any
            model, such as ``n_averaged`` and the state of optimizers, are always left out if the
            program does not have them.
        wrappers: Parts that are taken out of a name that the program does not have, if it has the
            name without some of them.
        rename: Rules of which the first that matches is followed.
        pack: Weights that the program has in one piece and the weights have in parts, or the other
            way round; see :class:`Pack`.
        families: Names of sets of such rules, for families of models: keys of
            :data:`refitkit.model.families.FAMILIES`. Rules of ``pack`` come first.
        cast: Whether an entry of another dtype than the program's is cast to it. ``no``: it is an
            error; ``lossless``: only where every value stays what it is; ``any``: between floats,
            and between integers.
    """

    subtree: str = ""
    ignore: tuple[Pattern, ...] = ()
    wrappers: tuple[str, ...] = WRAPPERS
    rename: tuple[Rename, ...] = ()
    pack: tuple[Pack, ...] = ()
    families: tuple[Annotated[str, AfterValidator(_family)], ...] = ()
    cast: Literal["no", "lossless", "any"] = "no"

    @property
    def packing(self) -> tuple[Pack, ...]:
        """All rules for pieces and parts, in the order in which they are tried."""
        return (*self.pack, *(rule for name in self.families for rule in FAMILIES[name]))
