"""Names of a checkpoint as names of a program."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from refitkit.builtin.rules.packs import part_names
from refitkit.errors import Problem, WeightMismatchError
from refitkit.protocols import Made, WeightGroup

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from refitkit.model import Rules
    from refitkit.protocols import TransformRequest, WeightSource

_SHOWN = 5


class Names:
    """Leaves out what is not in the subtree, renames, and takes names of wrappers away."""

    name = "names"
    priority = 10

    def __init__(self, rules: Rules) -> None:
        """Follow rules."""
        self._rules = rules

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        """One for each name that becomes another, or nothing."""
        known = {leaf.fqn for leaf in request.plan.data.leaves}
        names = request.source.names()
        if not self._rules.subtree and known.issuperset(names):
            return
        for rule in self._rules.pack:
            known.update(*(part_names(rule, leaf.fqn) for leaf in request.plan.data.leaves))
        _require_inside(self._rules.subtree, names)
        found = {name: self._becomes(name, known) for name in names}
        _refuse_doubles(found)
        for name, new in found.items():
            if new != name:
                yield _renamed(request.source, name, new)

    def _becomes(self, name: str, known: Collection[str]) -> str:
        """Its new name, itself, or nothing."""
        subtree = self._rules.subtree
        if not name.startswith(subtree):
            return ""
        name = name.removeprefix(subtree)
        for rule in self._rules.rename:
            if re.fullmatch(rule.pattern, name):
                return re.sub(rule.pattern, rule.to, name, count=1)
        return next((one for one in self._unwrapped(name) if one in known), name)

    def _unwrapped(self, name: str) -> Iterator[str]:
        """The name, then without wrappers at its beginning, one by one, then without any."""
        wrappers = self._rules.wrappers
        parts = name.split(".")
        yield name
        rest = parts
        while len(rest) > 1 and rest[0] in wrappers:
            rest = rest[1:]
            yield ".".join(rest)
        yield ".".join(part for part in parts if part not in wrappers)


def _renamed(source: WeightSource, name: str, new: str) -> WeightGroup:
    if not new:
        return WeightGroup((name,), {}, lambda: Made({}))
    make = partial(_same, source, name, new)
    return WeightGroup((name,), {new: source.info(name)}, make, formula="as it is")


def _same(source: WeightSource, name: str, new: str) -> Made:
    return Made({new: source.get(name)})


def _refuse_doubles(found: dict[str, str]) -> None:
    """Refuse two names that become one."""
    firsts: dict[str, str] = {}
    problems = []
    for name, new in found.items():
        first = firsts.setdefault(new, name)
        if new and first != name:
            hint = f"{first!r} becomes {new!r}, too: leave out one of them"
            problems.append(Problem(name, "given twice", hint=hint))
    if problems:
        raise WeightMismatchError("Several names become one.", problems=problems)


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
