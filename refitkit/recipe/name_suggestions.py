"""Names that should not be there, with what was perhaps meant."""

from __future__ import annotations

import re
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from refitkit.model import TensorInfo


WHOLE_SUBTREE = "a subtree has all names"
"""Kind of problem: the whole model lies under a prefix."""
ALL_NAMES = "all names are there"
"""Kind of problem: the whole model is there as it is, or with a prefix."""

_SUGGESTIONS = 10
_PATTERNS = 8
_LISTED = 10_000
"""So many unexpected names are listed one by one: a file may have millions."""
_NUMBER = re.compile(r"(?<=\\.)\d+(?=\\.)")


def unexpected(
    strange: Collection[str],
    known: Collection[str],
    whose: str,
    describe: Callable[[str], TensorInfo],
    where: str = "",
    *,
    given: Collection[str] = (),
    to_leave_out: str = "",
    complete: bool = False,
) -> Iterator[Problem]:
    """One problem for each name, with a prefix to take away or add, or a name much like it.

    Of millions of names the first are listed, and one problem counts all others.

    Args:
        strange: Names that were found and are not known.
        known: Names that there could be.
        whose: Whose names those are, for messages: ``the model``.
        describe: Returns the header of an entry.
        where: Where the names were found, if that has to be said: rules are for all weights, and
            cannot give other names to these.
        given: All names that were found: what is not among them is more likely meant.
        to_leave_out: What to do to leave all of them out; empty where that is not the answer.
        complete: Whether none is missing, so that no prefix is wrong.
    """
    if not strange:
        return  # as nearly always: the rest looks at every name
    there = set(given)
    meant = {name: None for name in known if name not in there}
    all_alike = "" if complete else _on_prefixes(strange, meant, whose, given, rules=not where)
    for number, name in enumerate(islice(strange, _LISTED)):
        hint = all_alike or f"{whose} has no such name"
        if number < _SUGGESTIONS and not all_alike:  # each compares with every name that is known
            near = _nearest(name, meant) or _nearest(name, known)
            hint = f"did you mean {near[0]!r}?" if near else hint
        hint += f"; {to_leave_out}" if to_leave_out and not all_alike else ""
        info = describe(name)
        found = info.unusable or f"{info.dtype} {info.shape}"
        yield Problem(name, "unexpected", f"{found} in {where}" if where else found, hint=hint)
    if len(strange) > _LISTED:
        hint = to_leave_out or f"{whose} has none of them"
        yield Problem(f"{len(strange) - _LISTED} more names", "unexpected", where, hint=hint)


def _on_prefixes(
    strange: Collection[str],
    known: Collection[str],
    whose: str,
    given: Collection[str],
    *,
    rules: bool,
) -> str:
    """What to do if one prefix is to be taken away, added or exchanged; nothing otherwise.

    Args:
        strange: Names that were found and are not known.
        known: Names that there could be, and that were not found.
        whose: Whose names those are.
        given: Names that were found and are known.
        rules: Whether rules can do it.
    """
    if prefix := _common_prefix(strange, known):
        how = _renaming(rf"{re.escape(prefix)}(.*)", r"\1") if rules else ""
        return f"{whose}'s names have no prefix {prefix!r}: take it away{how}"
    if prefix := _lacking_prefix(strange, known):
        how = _renaming(_all_of(strange, given), rf"{prefix}\1") if rules else ""
        return f"{whose}'s names have the prefix {prefix!r}: put it before them{how}"
    if rules and not given and (both := _other_prefix(strange, known)):
        how = _renaming(rf"{re.escape(both[0])}(.*)", rf"{both[1]}\1")
        return f"{whose}'s names begin with {both[1]!r} in place of {both[0]!r}: exchange it{how}"
    return ""


def _renaming(pattern: str, to: str) -> str:
    """How to give names that match a pattern another name; nothing without a pattern."""
    if not pattern:
        return ""
    rule = {"pattern": pattern, "to": to}
    return f", or set rules.rename to {[rule]}, or pass --rename '{pattern}={to}'"


def _all_of(strange: Iterable[str], given: Iterable[str]) -> str:
    """A regular expression that matches some names as a group, and no given ones; or nothing."""
    first = {name.partition(".")[0] for name in given}
    if not first:
        return "(.*)"
    tops = dict.fromkeys(name.partition(".")[0] for name in strange)
    if not first.isdisjoint(tops) or len(tops) > _PATTERNS:
        return ""
    return rf"((?:{'|'.join(map(re.escape, tops))})(?:\..*)?)"


def ignoring(strange: Iterable[str], kept: Collection[str], *, most: int = 8) -> str:
    """A regular expression that matches some names and no others, as short as it can be found.

    Args:
        strange: Names that it matches, each as a whole.
        kept: Names that it must not match.
        most: How many patterns it may be made of.

    Returns:
        It; empty where it would be long, or there is none.
    """
    inside = {name[:end] for name in kept for end in _dots(name)}
    found: dict[str, None] = {}
    for name in strange:
        ends = (end for end in _dots(name) if name[:end] not in inside)
        end = next(ends, None)
        if end is None and name in kept:
            return ""
        pattern = re.escape(name) if end is None else re.escape(name[:end]) + ".*"
        several = _NUMBER.sub(r"\\d+", pattern)
        if pattern in found or several in found:
            continue
        if not any(re.fullmatch(several, one) for one in kept):
            pattern = several
        found[pattern] = None
        if len(found) > most:
            return ""
    return "|".join(found)


def names_under(prefixes: Collection[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the prefix that they begin with; each prefix ends with a dot."""
    found: dict[str, list[str]] = {prefix: [] for prefix in sorted(prefixes)}
    for name in names if found else ():
        for end in _dots(name):
            if name[:end] in found:
                found[name[:end]].append(name)
    return found


def _dots(name: str) -> Iterator[int]:
    """Lengths of all beginnings of a name that end with a dot, the shortest first."""
    end = name.find(".") + 1
    while end:
        yield end
        end = name.find(".", end) + 1


def _nearest(name: str, names: Collection[str]) -> list[str]:
    return get_close_matches(name, names, n=1, cutoff=0.8)


def _common_prefix(names: Collection[str], known: Collection[str]) -> str:
    """A prefix such as ``module.`` without which all of these names are known; empty if none."""
    first = next(iter(names))
    for prefix in (first[:end] for end in _dots(first)):
        if all(n.startswith(prefix) and n.removeprefix(prefix) in known for n in names):
            return prefix
    return ""


def _other_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """A prefix of all of these names, and that of all known ones in its place; None if none."""
    first, one = next(iter(names)), next(iter(known), "")
    for other in (one[:end] for end in _dots(one)):
        if not all(name.startswith(other) for name in known):
            return None
        for begin in (first[:end] for end in _dots(first)):
            rests = [name.removeprefix(begin) for name in names if name.startswith(begin)]
            if len(rests) == len(names) and all(other + rest in known for rest in rests):
                return begin, other
    return None


def _lacking_prefix(names: Collection[str], known: Collection[str]) -> str:
    """A prefix such as ``model.`` with which all of these names are known; empty if none."""
    first = next(iter(names))
    prefixes = [one.removesuffix(first) for one in known if one.endswith(f".{first}")]
    return next((one for one in prefixes if all(one + name in known for name in names)), "")
