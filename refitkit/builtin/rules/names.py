"""Names of a checkpoint as names of a program."""

from __future__ import annotations

import re
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from refitkit.builtin.rules.readings import Readings
from refitkit.errors import Problem, WeightMismatchError
from refitkit.model.rules import FAMILIES
from refitkit.protocols import Made, WeightGroup
from refitkit.recipe.reads import reads_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from refitkit.builtin.rules.readings import Reading
    from refitkit.model import Rules
    from refitkit.protocols import TransformRequest, WeightSource

_SHOWN = 5


class Names:
    """Leaves out entries, and gives others the names of the program.

    Rules of the user come first. Then parts that wrappers added are taken out. If names still do
    not fit, ``readings.py`` looks for the only prefix or subtree with which all of them do.
    """

    name = "names"
    priority = 10

    def __init__(self, rules: Rules) -> None:
        """Follow rules."""
        self._rules = rules
        self._ignored = [re.compile(pattern) for pattern in rules.ignore]

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """One for each name that becomes another, or nothing; one for all that are left out.

        Raises:
            WeightMismatchError: Names cannot be meant, or can be meant in several ways; lists all.
        """
        names, reads = request.source.names(), reads_of(request.plan)
        rules = self._rules
        if not (rules.subtree or rules.ignore) and reads.known.issuperset(names):
            moved = {n: self._renamed(n) for n in names} if rules.rename else {}
            if not any(new != n and new in reads.known for n, new in moved.items()):
                return  # as nearly always; rules may exchange names of the program
        _require_inside(rules.subtree, names)
        outside, ignored, kept = self._sorted(names)
        readings = Readings(reads, request.source, rules, kept)
        reading = _chosen(readings, partial=request.partial)
        no_weights = readings.no_weights(reading)
        gone = {*no_weights, *reading.beside}
        found = {n: reading.found.get(n, new) for n, new in kept.items() if n not in gone}
        _refuse_doubles(found)
        yield from (_left_out((name,)) for name in outside)
        yield from _left_out_for(ignored, "named by rules.ignore")
        yield from _left_out_for(no_weights, "no weights of a model")
        yield from _left_out_for(reading.beside, f"not under {reading.dropped!r}")
        note = _how(reading)
        for name, new in found.items():
            if new != name:
                yield _renamed(request.source, name, new, note)

    def _sorted(self, names: Iterable[str]) -> tuple[list[str], list[str], dict[str, str]]:
        """Names outside the subtree, those that rules ignore, and all others with new names."""
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
                kept[name] = self._renamed(rest)
        return outside, ignored, kept

    def _renamed(self, name: str) -> str:
        for rule in self._rules.rename:
            if re.fullmatch(rule.pattern, name):
                return re.sub(rule.pattern, rule.to, name, count=1)
        return name


def _how(reading: Reading) -> str:
    """How names were read, if not as they are but for wrappers."""
    if reading.dropped:
        return f"names: took the weights under {reading.dropped!r}, where all of the program's are"
    if reading.added:
        return f"names: put {reading.added!r} before the names, as the program has them"
    if reading.puts_wrappers:
        return "names: put parts of wrappers into the names, as the program has them"
    return ""


def _left_out_for(names: Collection[str], why: str) -> Iterator[WeightGroup]:
    """All entries that are left out for one reason, if there are some."""
    if names:
        entries = "1 entry" if len(names) == 1 else f"{len(names)} entries"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(map(repr, list(names)[:_SHOWN]))
        yield _left_out(tuple(names), f"names: left out {entries}, {why}: {shown}{more}")


def _left_out(names: tuple[str, ...], note: str = "") -> WeightGroup:
    return WeightGroup(names, {}, lambda: Made({}), note=note)


def _renamed(source: WeightSource, name: str, new: str, note: str = "") -> WeightGroup:
    make = partial(_same, source, name, new)
    return WeightGroup((name,), {new: source.info(name)}, make, formula="as it is", note=note)


def _same(source: WeightSource, name: str, new: str) -> Made:
    return Made({new: source.get(name)})


def _refuse_doubles(found: dict[str, str]) -> None:
    """Refuse two names that become one."""
    firsts: dict[str, str] = {}
    problems = []
    for name, new in found.items():
        first = firsts.setdefault(new, name)
        if new and first != name:
            flag = f"--ignore '{re.escape(name)}'"
            hint = f"{first!r} becomes {new!r}, too: leave out one of them, as with {flag}"
            problems.append(Problem(name, "given twice", hint=hint))
    if problems:
        raise WeightMismatchError("Several names become one.", problems=problems)


def _chosen(readings: Readings, *, partial: bool) -> Reading:
    """The reading to take, if the weights are not in another layout."""
    try:
        reading = readings.chosen(partial=partial)
    except WeightMismatchError:
        if not readings.can_be_complete:  # it is of another model, as it seems
            _refuse_other_layouts(readings)
        raise
    if not partial and not readings.has_all(reading):
        _refuse_other_layouts(readings)
    return reading


def _refuse_other_layouts(readings: Readings) -> None:
    """Name the ready rules with which incomplete weights are whole, if there are some."""
    own = readings.rules.families
    others = [name for name in FAMILIES if name not in own and readings.with_families(name).packs]
    for number in (1, 2):
        fitting = [
            families
            for families in combinations(others, number)
            if readings.with_families(*families).can_be_complete
        ]
        if fitting:
            raise WeightMismatchError(
                "The weights are in another layout.",
                problems=[_family(own, families) for families in fitting],
            )


def _family(own: Iterable[str], families: Sequence[str]) -> Problem:
    """Ready rules that fit beside those that the user has named."""
    rule = f"set rules.families to {[*own, *families]}"
    flags = " ".join(f"--family {family}" for family in families)
    return Problem(" and ".join(families), "fits", hint=f"to take it, {rule}, or pass {flags}")


def _require_inside(subtree: str, names: Collection[str]) -> None:
    """Refuse a subtree that no name is in, or that ends before a dot."""
    rests = [name.removeprefix(subtree) for name in names if name.startswith(subtree)]
    dotted = bool(subtree) and bool(rests) and all(rest.startswith(".") for rest in rests)
    if dotted or (names and not rests):
        begin = sorted({name.partition(".")[0] for name in names})
        more = f" and {len(begin) - _SHOWN} more" if len(begin) > _SHOWN else ""
        hint = f"names begin with {', '.join(map(repr, begin[:_SHOWN]))}{more}"
        within = {n.partition(f".{subtree}")[0] for n in names if f".{subtree}" in n}
        if subtree.endswith(".") and len(within) == 1:  # {"state_dict": {"model.weight": ...}}
            hint = f"{f'{within.pop()}.{subtree}'!r} is meant"
        raise WeightMismatchError(
            "The rule subtree fits no names.",
            problems=[
                Problem(
                    repr(subtree),
                    "no such subtree",
                    hint=f"{subtree + '.'!r} is meant" if dotted else hint,
                )
            ],
        )
