"""The transform that gives entries of a checkpoint the names of the program.

It applies the rules ``subtree``, ``ignore`` and ``rename``, lets ``name_matching`` find what these
do not explain, and refuses names that cannot be used. If nothing fits, it looks for families of
``pack`` rules that do, so that the error can name them.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from refitkit.builtin.rules.name_matching import NameMatcher
from refitkit.errors import Problem, WeightMismatchError
from refitkit.model.rules import FAMILIES
from refitkit.protocols import Made, WeightGroup
from refitkit.recipe.foreign import info_of
from refitkit.recipe.reads import reads_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from refitkit.builtin.rules.name_matching import NameMatch
    from refitkit.model import Rules
    from refitkit.protocols import TransformRequest, WeightSource

_SHOWN = 5


class NameTransform:
    """Renames entries, and leaves out those that the program does not need.

    Rules of the user come first. Then wrapper parts are removed. If names still do not match, the
    only prefix or subtree with which all of them match is used.

    Attributes:
        name: Name of the transform in reports.
        priority: Place in the order of transforms: names come first.
    """

    name = "names"
    priority = 10

    def __init__(self, rules: Rules) -> None:
        """Create a transform that applies these rules."""
        self._rules = rules
        self._ignored = [re.compile(pattern) for pattern in rules.ignore]

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """Yield a group for each renamed entry, and groups for entries that are left out.

        Raises:
            WeightMismatchError: The subtree does not exist, the names match in several ways, two
                names become one, or the weights are in another layout. The error lists all
                problems of the first kind that is found.
        """
        names, reads = request.source.names(), reads_of(request.plan)
        rules = self._rules
        # Nearly always the source has the program's names, and nothing has to be done.
        if not (rules.subtree or rules.ignore) and reads.known.issuperset(names):
            renamed = {name: self._rename(name) for name in names} if rules.rename else {}
            # Rules may still exchange names of the program.
            if not any(new != name and new in reads.known for name, new in renamed.items()):
                return
        _require_subtree(rules.subtree, names)
        outside, ignored, kept = self._apply_rules(names)
        matcher = NameMatcher(reads, request.source, rules, kept)
        match = _choose(matcher, partial=request.partial)
        extras = matcher.known_extras(match)
        removed = {*extras, *match.outside}
        # Unmatched names stay: another transform may take them, and the checks report the rest.
        targets = {n: match.targets.get(n, new) for n, new in kept.items() if n not in removed}
        _refuse_duplicates(targets)
        yield from (_leave_out((name,)) for name in outside)
        yield from _leave_out_with_note(ignored, "matched by rules.ignore")
        yield from _leave_out_with_note(extras, "not model weights")
        yield from _leave_out_with_note(match.outside, f"not under {match.dropped!r}")
        note = _note(match)
        for name, new in targets.items():
            if new != name:
                yield _renaming(request.source, name, new, note)

    def _apply_rules(self, names: Iterable[str]) -> tuple[list[str], list[str], dict[str, str]]:
        """Return names outside the subtree, ignored names, and other names with their new names."""
        subtree = self._rules.subtree
        if not (subtree or self._ignored or self._rules.rename):
            return [], [], {name: name for name in names}
        outside, ignored, kept = list[str](), list[str](), dict[str, str]()
        for name in names:
            if not name.startswith(subtree):
                outside.append(name)
                continue
            rest = name.removeprefix(subtree)
            if any(rule.fullmatch(name) or rule.fullmatch(rest) for rule in self._ignored):
                ignored.append(name)
            else:
                kept[name] = self._rename(rest)
        return outside, ignored, kept

    def _rename(self, name: str) -> str:
        """Return what the first rule that matches makes of a name."""
        for rule in self._rules.rename:
            if re.fullmatch(rule.pattern, name):
                return re.sub(rule.pattern, rule.to, name, count=1)
        return name


# -- groups and notes -------------------------------------------------------------------------


def _note(match: NameMatch) -> str:
    """Return a note for reports on how names were matched; empty if as given."""
    if match.dropped:
        return (
            f"names: took the weights under {match.dropped!r}: all names of the program are there"
        )
    if match.added:
        return f"names: added the prefix {match.added!r} to the names"
    if match.adds_wrappers:
        return "names: added wrapper parts that the names of the program have"
    return ""


def _leave_out_with_note(names: Collection[str], reason: str) -> Iterator[WeightGroup]:
    """Yield a group that takes all entries left out for one reason; none without entries."""
    if names:
        entries = "1 entry" if len(names) == 1 else f"{len(names)} entries"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(map(repr, list(names)[:_SHOWN]))
        yield _leave_out(tuple(names), f"names: left out {entries} ({reason}): {shown}{more}")


def _leave_out(names: tuple[str, ...], note: str = "") -> WeightGroup:
    return WeightGroup(names, {}, lambda: Made({}), note=note)


def _renaming(source: WeightSource, name: str, new: str, note: str = "") -> WeightGroup:
    make = partial(_read_as, source, name, new)
    return WeightGroup((name,), {new: info_of(source, name)}, make, formula="as it is", note=note)


def _read_as(source: WeightSource, name: str, new: str) -> Made:
    return Made({new: source.get(name)})


# -- names that cannot be used ----------------------------------------------------------------


def _require_subtree(subtree: str, names: Collection[str]) -> None:
    """Check the rule ``subtree``.

    Raises:
        WeightMismatchError: No name begins with the subtree, or it lacks its final dot.
    """
    inside = [name.removeprefix(subtree) for name in names if name.startswith(subtree)]
    lacks_dot = bool(subtree) and bool(inside) and all(rest.startswith(".") for rest in inside)
    if inside and not lacks_dot:
        return
    if not names:
        return
    if lacks_dot:
        hint = f"did you mean {subtree + '.'!r}?"
    else:
        tops = sorted({name.partition(".")[0] for name in names})
        more = f" and {len(tops) - _SHOWN} more" if len(tops) > _SHOWN else ""
        hint = f"names begin with {', '.join(map(repr, tops[:_SHOWN]))}{more}"
        # In {"state_dict": {"model.weight": ...}} the subtree "model." is "state_dict.model.".
        above = {n.partition(f".{subtree}")[0] for n in names if f".{subtree}" in n}
        if subtree.endswith(".") and len(above) == 1:
            hint = f"did you mean {f'{above.pop()}.{subtree}'!r}?"
    raise WeightMismatchError(
        "No names are under rules.subtree.",
        problems=[Problem(repr(subtree), "no such subtree", hint=hint)],
    )


def _choose(matcher: NameMatcher, *, partial: bool) -> NameMatch:
    """Return the match to use.

    Raises:
        WeightMismatchError: See ``NameMatcher.choose``. Or the match is incomplete, and families
            of rules make it complete.
    """
    try:
        match = matcher.choose(partial=partial)
    except WeightMismatchError:
        # Weights that seem to be of another model may be in another layout.
        if not matcher.can_be_complete:
            _refuse_other_layouts(matcher)
        raise
    if not partial and not matcher.has_all(match):
        _refuse_other_layouts(matcher)
    return match


def _refuse_other_layouts(matcher: NameMatcher) -> None:
    """Try families of rules that the user has not named, alone and in pairs.

    Raises:
        WeightMismatchError: Some of them make the weights complete. The error lists these.
    """
    named = matcher.rules.families
    others = [
        name for name in FAMILIES if name not in named and matcher.with_families(name).has_packs
    ]
    for count in (1, 2):
        fitting = [
            families
            for families in combinations(others, count)
            if matcher.with_families(*families).can_be_complete
        ]
        if fitting:
            raise WeightMismatchError(
                "The weights are in another layout.",
                problems=[_family_problem(named, families) for families in fitting],
            )


def _family_problem(named: Iterable[str], families: Sequence[str]) -> Problem:
    """Return a problem whose hint adds families to those that the user has named."""
    rule = f"set rules.families to {[*named, *families]}"
    flags = " ".join(f"--family {family}" for family in families)
    return Problem(" and ".join(families), "fits", hint=f"to take it, {rule}, or pass {flags}")


def _refuse_duplicates(targets: dict[str, str]) -> None:
    """Check that no two entries get the same name.

    Args:
        targets: New name of each entry.

    Raises:
        WeightMismatchError: Entries get equal names; the error lists all of them.
    """
    firsts: dict[str, str] = {}
    problems = []
    for name, new in targets.items():
        first = firsts.setdefault(new, name)
        if new and first != name:
            flag = f"--ignore '{re.escape(name)}'"
            hint = f"{first!r} becomes {new!r}, too: leave out one of them, as with {flag}"
            problems.append(Problem(name, "given twice", hint=hint))
    if problems:
        raise WeightMismatchError("Several names become one.", problems=problems)
