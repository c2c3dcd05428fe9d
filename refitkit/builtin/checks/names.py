"""Missing and unexpected names, broken ties, wrong dtypes and shapes, unusable tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model.rules import FAMILIES
from refitkit.program.dtypes import are_alike, dtype_of, is_lossless
from refitkit.protocols import MadeOf
from refitkit.recipe.name_suggestions import WHOLE_SUBTREE, ignoring, names_under, unexpected
from refitkit.recipe.reads import broken_ties, broken_views, reads_of
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.model import Leaf, TensorInfo
    from refitkit.protocols import Plan, WeightSource


_SHOWN = 3
_MANY = 1000


class Names:
    """A source held against what a plan's program reads."""

    def __init__(self, plan: Plan, source: WeightSource) -> None:
        """Look at every name of the source once, at headers only."""
        self._reads, self._source = reads_of(plan), source
        self._names = source.names()
        known = self._reads.known
        whole = known.issuperset(self._names)  # as nearly always
        self._mine = self._names if whole else [name for name in self._names if name in known]
        self._infos = {name: source.info(name) for name in self._doubtful()}
        self._misfits = list(self._all_misfits())
        self._bad = {p.subject for p in self._misfits}

    def problems(self, *, partial: bool) -> Iterator[Problem]:
        """Everything that is wrong, missing names last."""
        if subtrees := self._subtrees():
            yield from subtrees
            return
        yield from self._unexpected(partial=partial)
        yield from self._misfits
        yield from self._broken_ties()
        yield from self._broken_views()
        if partial:
            yield from self._nothing_at_all()
        else:
            yield from self._missing()

    def usable(self) -> list[str]:
        """Names that slots will be filled from and whose headers are right."""
        needed = self._reads.needed
        return [n for n in self._names if n in needed and n not in self._bad]

    def _doubtful(self) -> Iterable[str]:
        """Names that need a closer look; all others are just what the program has."""
        if isinstance(self._source, TensorMap):
            return self._source.doubtful(self._mine, self._reads.wanted)
        return self._mine

    def _subtrees(self) -> list[Problem]:
        """Prefixes of whole models, where the source has no name that the program has."""
        if not self._names or not self._reads.known.isdisjoint(self._names):
            return []
        first = next(iter(self._reads.lacking(self._names)), "")
        ends = tuple(f".{name}" for name in self._reads.names_of([first]) if name)
        inside = {n.removesuffix(e) + "." for n in self._names for e in ends if n.endswith(e)}
        if len(inside) > _MANY:
            return []
        return [
            Problem(
                repr(prefix),
                WHOLE_SUBTREE,
                hint=f"set rules.subtree to {prefix!r}, or pass --subtree '{prefix}'",
            )
            for prefix, names in names_under(inside, self._names).items()
            if not self._reads.lacking([name.removeprefix(prefix) for name in names])
        ]

    def _unexpected(self, *, partial: bool) -> Iterator[Problem]:
        known = self._reads.known
        if len(self._mine) == len(self._names):
            return
        strange = [name for name in self._names if name not in known]
        if len(strange) <= _MANY:  # a module has few buffers that no state_dict would hold
            strange = [name for name in strange if self._source.info(name).persistent]
        complete = not partial and not self._reads.lacking(self._names)
        others = self._to_ignore(strange) if complete or partial else ""
        yield from unexpected(
            strange,
            known,
            "the model",
            self._source.info,
            given=self._mine,
            to_leave_out=others,
            complete=complete,
        )

    def _to_ignore(self, strange: Iterable[str]) -> str:
        """How to leave out entries that the program does not need, by the names that were given."""
        source, kept = self._source, set(self._mine)
        strange = dict.fromkeys(strange)
        while isinstance(source, MadeOf):
            kept = {name for one in kept for name in source.made_from(one)}
            strange = {name: None for one in strange for name in source.made_from(one)}
            source = source.given
        pattern = ignoring(strange, kept)
        if pattern:
            return (
                f"to leave it out, set rules.ignore to [{pattern!r}], or pass --ignore '{pattern}'"
            )
        return "to leave entries out, set rules.ignore to patterns, or pass --ignore PATTERN"

    def _all_misfits(self) -> Iterator[Problem]:
        """Entries that cannot become what the program reads under their names.

        What the program has but does not read must have the right shape all the same: otherwise
        the weights are those of another model.
        """
        for name, info in self._infos.items():
            leaf, needed = self._reads.leaves.get(name), name in self._reads.needed
            if info.unusable and needed:
                yield Problem(name, "unusable", info.unusable, _leaf_text(leaf))
            elif leaf and not info.unusable:
                yield from _differences(leaf, info, with_dtype=needed)

    def _broken_ties(self) -> Iterator[Problem]:
        """Names of one tensor for which the source has different tensors."""
        if self._reads.ties:
            good = set(self._names) - self._bad
            yield from broken_ties(self._reads.ties, good, self._source)

    def _broken_views(self) -> Iterator[Problem]:
        """Entries that are views of others in the model, and have other values in the source."""
        if self._reads.views:
            good = set(self._names) - self._bad
            yield from broken_views(self._reads.leaves, good, self._source)

    def _missing(self) -> Iterator[Problem]:
        """What the source must have and has under none of its names."""
        for name, needed_by in self._reads.lacking(self._names).items():
            yield self._lack(name, needed_by)

    def _lack(self, name: str, needed_by: list[str]) -> Problem:
        others = self._reads.names_of([name]) - {name}
        also = f", or its other names {tuple(sorted(others))}" if others else ""
        hint = f"pass it{also}"
        if needed_by and needed_by != [name]:
            more = f" and {len(needed_by) - _SHOWN} more" if len(needed_by) > _SHOWN else ""
            hint += f"; needed by {', '.join(map(repr, needed_by[:_SHOWN]))}{more}"
        if needed_by:
            hint += "; to leave such slots as they are: partial=True"
        return Problem(name, "missing", wanted=_leaf_text(self._reads.leaves.get(name)), hint=hint)

    def _nothing_at_all(self) -> Iterator[Problem]:
        if self._reads.of_slots.isdisjoint(self._names):
            found = f"{len(self._names)} names, none of a slot"
            yield Problem(self._source.description, "nothing to refit", found)


def _differences(leaf: Leaf, info: TensorInfo, *, with_dtype: bool) -> Iterator[Problem]:
    if with_dtype and info.dtype != leaf.dtype:
        cast = _cast_for(info.dtype, leaf.dtype)
        rule = f", or set rules.cast to {cast!r}, or pass --cast {cast}" if cast else ""
        hint = f"convert it yourself{rule}: refitkit never casts weights silently"
        if not leaf.persistent:
            hint = (
                "leave it out: no state_dict holds it, so the plan's value is kept; to set it, "
                "convert it yourself"
            )
        yield Problem(leaf.fqn, "dtype", info.dtype, leaf.dtype, hint)
    if info.shape != leaf.shape:
        hint = _on_transposed(leaf.fqn) if info.shape == leaf.shape[::-1] else ""
        yield Problem(leaf.fqn, "shape", str(info.shape), str(leaf.shape), hint)


def _on_transposed(name: str) -> str:
    """What to do about a weight that has the transposed shape.

    Ready rules are named, which transpose square weights of that kind, too: no shape shows those.
    """
    for family, rules in FAMILIES.items():
        if any(rule.transposed and name.endswith(rule.into.removeprefix("{}")) for rule in rules):
            how = f"set rules.families to [{family!r}], or pass --family {family}"
            return f"the transposed shape; to transpose all weights of this kind, {how}"
    return "the transposed shape"


def _cast_for(found: str, wanted: str) -> str:
    """The rule that makes one dtype of another; empty if none does."""
    before, after = dtype_of(found), dtype_of(wanted)
    if is_lossless(before, after):
        return "lossless"
    return "any" if are_alike(before, after) else ""


def _leaf_text(leaf: Leaf | None) -> str:
    return f"{leaf.dtype} {leaf.shape}" if leaf else ""
