"""Problems and hints for names that a model does not have, and patterns that match names.

``unexpected`` reports names that a model does not have, and suggests the intended ones: a prefix to
remove, add or replace, or a similar name. ``ignoring`` returns a regular expression for names to
leave out. ``names_under`` groups names by prefix. Files may have millions of names, so
``unexpected`` limits how many it lists and compares.
"""

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
"""Kind of the problem that all names of the model are there under a prefix."""
ALL_NAMES = "all names are there"
"""Kind of the problem that all names of the model are there, with or without a prefix."""

_SIMILAR_LIMIT = 10
_TOP_LEVEL_LIMIT = 8
_LISTED_LIMIT = 10_000
"""Number of unexpected names that are listed one by one. A file may have millions."""
_ESCAPED_NUMBER = re.compile(r"(?<=\\.)\d+(?=\\.)")
"""A number between dots, in the output of ``re.escape``: the index of a layer."""


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
    """A problem for each unexpected name, with a hint at the intended name or prefix.

    Lists at most 10,000 names. One more problem counts the others.

    Args:
        strange: Unexpected names: found, but not known.
        known: All names that could be there.
        whose: Owner of the known names, for messages: ``the model``.
        describe: Returns dtype and shape of an entry.
        where: Place where the names were found, for messages. If it is given, hints do not suggest
            rules, because rules apply to the weights of all places.
        given: Names that were found and are known. Other known names are more likely intended.
        to_leave_out: How to leave all unexpected names out. Empty if that is not the solution.
        complete: Whether no known name is missing, so that no prefix can be wrong.
    """
    if not strange:
        return  # the usual case; everything below looks at all names
    found_names = set(given)
    missing = {name: None for name in known if name not in found_names}
    prefix_hint = "" if complete else _prefix_hint(strange, missing, whose, given, rules=not where)
    for number, name in enumerate(islice(strange, _LISTED_LIMIT)):
        hint = prefix_hint or f"{whose} has no such name"
        # limited, because each search compares with every known name
        if number < _SIMILAR_LIMIT and not prefix_hint:
            similar = _most_similar(name, missing) or _most_similar(name, known)
            hint = f"did you mean {similar[0]!r}?" if similar else hint
        hint += f"; {to_leave_out}" if to_leave_out and not prefix_hint else ""
        info = describe(name)
        found = info.unusable or f"{info.dtype} {info.shape}"
        yield Problem(name, "unexpected", f"{found} in {where}" if where else found, hint=hint)
    if len(strange) > _LISTED_LIMIT:
        hint = to_leave_out or f"{whose} has none of them"
        yield Problem(f"{len(strange) - _LISTED_LIMIT} more names", "unexpected", where, hint=hint)


def _prefix_hint(
    strange: Collection[str],
    missing: Collection[str],
    whose: str,
    given: Collection[str],
    *,
    rules: bool,
) -> str:
    """What to do if all unexpected names have one wrong prefix. Empty if they do not.

    Args:
        strange: Unexpected names.
        missing: Known names that were not found.
        whose: Owner of the known names, for messages.
        given: Names that were found and are known.
        rules: Whether the hint may suggest a rule.
    """
    if prefix := _extra_prefix(strange, missing):
        rule = _rename_hint(rf"{re.escape(prefix)}(.*)", r"\1") if rules else ""
        return f"{whose}'s names have no prefix {prefix!r}: remove it{rule}"
    if prefix := _absent_prefix(strange, missing):
        rule = _rename_hint(_pattern_without(strange, given), rf"{prefix}\1") if rules else ""
        return f"{whose}'s names have the prefix {prefix!r}: add it{rule}"
    if rules and not given and (both := _wrong_prefix(strange, missing)):
        found, wanted = both
        rule = _rename_hint(rf"{re.escape(found)}(.*)", rf"{wanted}\1")
        return f"{whose}'s names begin with {wanted!r} instead of {found!r}: replace it{rule}"
    return ""


def _rename_hint(pattern: str, to: str) -> str:
    """How to rename all names that match a pattern. Empty if the pattern is empty."""
    if not pattern:
        return ""
    rule = {"pattern": pattern, "to": to}
    return f", or set rules.rename to {[rule]}, or pass --rename '{pattern}={to}'"


def _pattern_without(strange: Iterable[str], given: Iterable[str]) -> str:
    """A regular expression that captures unexpected names and matches no given one.

    It distinguishes them by their first parts only. Empty if that is not possible, or if the
    expression would be long.
    """
    given_tops = {name.partition(".")[0] for name in given}
    if not given_tops:
        return "(.*)"
    tops = dict.fromkeys(name.partition(".")[0] for name in strange)
    # deeper parts could distinguish them, but that pattern would be hard to read
    if not given_tops.isdisjoint(tops) or len(tops) > _TOP_LEVEL_LIMIT:
        return ""
    return rf"((?:{'|'.join(map(re.escape, tops))})(?:\..*)?)"


def _most_similar(name: str, names: Collection[str]) -> list[str]:
    return get_close_matches(name, names, n=1, cutoff=0.8)


def _extra_prefix(names: Collection[str], known: Collection[str]) -> str:
    """A prefix, such as ``module.``, without which all names are known. Empty if there is none."""
    first = next(iter(names))
    for prefix in (first[:end] for end in _prefix_lengths(first)):
        if all(n.startswith(prefix) and n.removeprefix(prefix) in known for n in names):
            return prefix
    return ""


def _absent_prefix(names: Collection[str], known: Collection[str]) -> str:
    """A prefix, such as ``model.``, with which all names are known. Empty if there is none."""
    first = next(iter(names))
    prefixes = [one.removesuffix(first) for one in known if one.endswith(f".{first}")]
    return next((one for one in prefixes if all(one + name in known for name in names)), "")


def _wrong_prefix(names: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The prefix of all names, and the one with which they are known. None if there is none."""
    first, first_known = next(iter(names)), next(iter(known), "")
    for wanted in (first_known[:end] for end in _prefix_lengths(first_known)):
        if not all(name.startswith(wanted) for name in known):
            return None  # longer prefixes of the known name are not common to all either
        for found in (first[:end] for end in _prefix_lengths(first)):
            rests = [name.removeprefix(found) for name in names if name.startswith(found)]
            if len(rests) == len(names) and all(wanted + rest in known for rest in rests):
                return found, wanted
    return None


def ignoring(strange: Iterable[str], kept: Collection[str], *, most: int = 8) -> str:
    """A short regular expression that matches some names and no others.

    Args:
        strange: Names to match, each as a whole.
        kept: Names that must not match.
        most: Largest number of alternatives.

    Returns:
        The expression. Empty if it would have more alternatives, or if there is none.
    """
    kept_prefixes = {name[:end] for name in kept for end in _prefix_lengths(name)}
    patterns: dict[str, None] = {}
    for name in strange:
        # the shortest prefix that no kept name has covers the whole subtree
        ends = (end for end in _prefix_lengths(name) if name[:end] not in kept_prefixes)
        end = next(ends, None)
        if end is None and name in kept:
            return ""
        pattern = re.escape(name) if end is None else re.escape(name[:end]) + ".*"
        # one pattern for all layers is shorter, unless it matches a kept name
        any_layer = _ESCAPED_NUMBER.sub(r"\\d+", pattern)
        if pattern in patterns or any_layer in patterns:
            continue
        if not any(re.fullmatch(any_layer, one) for one in kept):
            pattern = any_layer
        patterns[pattern] = None
        if len(patterns) > most:
            return ""
    return "|".join(patterns)


def names_under(prefixes: Collection[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the prefix that they begin with. A name can be under several prefixes.

    Args:
        prefixes: Prefixes, each ending with a dot.
        names: The names.
    """
    groups: dict[str, list[str]] = {prefix: [] for prefix in sorted(prefixes)}
    for name in names if groups else ():
        for end in _prefix_lengths(name):
            if name[:end] in groups:
                groups[name[:end]].append(name)
    return groups


def _prefix_lengths(name: str) -> Iterator[int]:
    """Lengths of all prefixes of a name that end with a dot, the shortest first."""
    end = name.find(".") + 1
    while end:
        yield end
        end = name.find(".", end) + 1
