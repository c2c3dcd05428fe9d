"""Names that should not be there, with what was perhaps meant."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from refitkit.model import TensorInfo

_SUGGESTIONS = 10


def unexpected(
    strange: Mapping[str, TensorInfo],
    known: Collection[str],
    whose: str,
    where: str = "",
    *,
    given: Collection[str] = (),
) -> Iterator[Problem]:
    """One problem for each name, with a prefix to take away or add, or a name much like it.

    Args:
        strange: What was found under names that are not known.
        known: Names that there could be.
        whose: Whose names those are, for messages: ``the model``.
        where: Where the names were found, if that has to be said.
        given: All names that were found: what is not among them is more likely meant.
    """
    if not strange:
        return  # as nearly always: the rest looks at every name
    prefix, lacking = _common_prefix(list(strange), known), _lacking_prefix(list(strange), known)
    there = set(given)
    meant = [name for name in known if name not in there]
    for number, (name, info) in enumerate(strange.items()):
        hint = f"{whose} has no such name"
        if prefix:
            hint = f"{whose}'s names have no prefix {prefix!r}: take it away"
        elif lacking:
            hint = f"{whose}'s names have the prefix {lacking!r}: put it before them"
        elif number < _SUGGESTIONS:  # each compares with every name that is known
            near = _nearest(name, meant) or _nearest(name, known)
            hint = f"did you mean {near[0]!r}?" if near else hint
        found = f"{info.dtype} {info.shape}"
        yield Problem(name, "unexpected", f"{found} in {where}" if where else found, hint=hint)


def _nearest(name: str, names: Collection[str]) -> list[str]:
    return get_close_matches(name, names, n=1, cutoff=0.8)


def _common_prefix(names: list[str], known: Collection[str]) -> str:
    """A prefix such as ``module.`` without which all of these names are known; empty if none."""
    if not names:
        return ""
    first = names[0]
    parts = [first[: i + 1] for i, letter in enumerate(first) if letter == "."]
    for prefix in parts:
        if all(n.startswith(prefix) and n.removeprefix(prefix) in known for n in names):
            return prefix
    return ""


def _lacking_prefix(names: list[str], known: Collection[str]) -> str:
    """A prefix such as ``model.`` with which all of these names are known; empty if none."""
    if not names:
        return ""
    prefixes = [one.removesuffix(names[0]) for one in known if one.endswith(f".{names[0]}")]
    return next((one for one in prefixes if all(one + name in known for name in names)), "")
