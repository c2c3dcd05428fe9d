"""Check the headers of a source against what a program reads.

Problems are missing and unexpected names, wrong dtypes and shapes, unusable tensors, and tied names
or views with values of their own. Data is read for the last two only. Each problem has a hint with
the rule and the flag that solve it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model.rules import FAMILIES
from refitkit.program.dtypes import are_alike, dtype_of, is_lossless
from refitkit.protocols import MadeOf
from refitkit.recipe.foreign import info_of
from refitkit.recipe.name_suggestions import WHOLE_SUBTREE, ignoring, names_under, unexpected
from refitkit.recipe.reads import broken_ties, broken_views, reads_of
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from refitkit.model import Leaf, TensorInfo
    from refitkit.protocols import Plan, WeightSource


_SHOWN = 3
_MAX_SUBTREES = 1000
_MAX_HEADERS = 1000
"""Headers of more unexpected entries are not read: opening them would take long."""


class NameCheck:
    """Compares the names and headers of a source with those that a plan's program reads."""

    def __init__(self, plan: Plan, source: WeightSource, *, same_headers: bool = False) -> None:
        """Read the headers of the source.

        Args:
            plan: Plan whose program reads the weights.
            source: New weights, after all transforms.
            same_headers: Whether its headers are known to fit.
        """
        self._reads, self._source = reads_of(plan), source
        self._names = source.names()
        known = self._reads.known
        # Nearly always all names are known. Then a warm refit skips building a list of them.
        all_known = known.issuperset(self._names)
        self._known = self._names if all_known else [name for name in self._names if name in known]
        doubtful = () if same_headers else self._names_to_check()
        self._infos = {name: info_of(source, name) for name in doubtful}
        self._misfits = list(self._find_misfits())
        self._bad = {p.subject for p in self._misfits}

    def problems(self, *, partial: bool) -> Iterator[Problem]:
        """Yield all problems, missing names last.

        If the whole model lies under a prefix, only that is reported.

        Args:
            partial: Whether slots without a value keep theirs. Then nothing is missing, but at
                least one slot must get a value.
        """
        if subtrees := self._subtrees():
            yield from subtrees
            return
        yield from self._unexpected(partial=partial)
        yield from self._misfits
        # These read data, but only of entries without other problems.
        yield from self._broken_ties()
        yield from self._broken_views()
        if partial:
            yield from self._nothing_to_refit()
        else:
            yield from self._missing()

    def usable(self) -> list[str]:
        """Return names of entries that slots are filled from and that have no header problems."""
        needed = self._reads.needed
        return [n for n in self._names if n in needed and n not in self._bad]

    def _names_to_check(self) -> Iterable[str]:
        """Return known names whose headers may not be the program's."""
        # Describing each tensor of a large state_dict would dominate a warm refit. ``TensorMap``
        # compares them with the program much faster.
        if isinstance(self._source, TensorMap):
            return self._source.doubtful(self._known, self._reads.wanted)
        return self._known

    def _subtrees(self) -> list[Problem]:
        """Return prefixes under which the whole model lies, if no name of the source is known."""
        if not self._names or not self._reads.known.isdisjoint(self._names):
            return []
        first = next(iter(self._reads.lacking(self._names)), "")
        ends = tuple(f".{name}" for name in self._reads.names_of([first]) if name)
        inside = {n.removesuffix(e) + "." for n in self._names for e in ends if n.endswith(e)}
        if len(inside) > _MAX_SUBTREES:  # checking each would take long
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
        if len(self._known) == len(self._names):
            return
        unknown = [name for name in self._names if name not in known]
        # A live module has a few non-persistent buffers, which no state_dict holds.
        if len(unknown) <= _MAX_HEADERS:
            unknown = [name for name in unknown if info_of(self._source, name).persistent]
        complete = not partial and not self._reads.lacking(self._names)
        yield from unexpected(
            unknown,
            known,
            "the model",
            self._source.info,
            given=self._known,
            to_leave_out=self._ignore_hint(unknown) if complete or partial else "",
            complete=complete,
        )

    def _ignore_hint(self, unknown: Iterable[str]) -> str:
        """Return the rule and flag that leave out entries.

        ``rules.ignore`` matches names as the user gave them, so names are traced back through all
        transforms.
        """
        source, kept = self._source, set(self._known)
        unknown = dict.fromkeys(unknown)
        while isinstance(source, MadeOf):
            kept = {name for one in kept for name in source.made_from(one)}
            unknown = {name: None for one in unknown for name in source.made_from(one)}
            source = source.given
        pattern = ignoring(unknown, kept)
        if pattern:
            return (
                f"to leave it out, set rules.ignore to [{pattern!r}], or pass --ignore '{pattern}'"
            )
        return "to leave entries out, set rules.ignore to patterns, or pass --ignore PATTERN"

    def _find_misfits(self) -> Iterator[Problem]:
        """Yield unusable entries, and entries whose dtype or shape is not the program's.

        An entry that the program has but does not read must still have the right shape: otherwise
        the weights are those of another model. Its dtype does not matter.
        """
        for name, info in self._infos.items():
            leaf, needed = self._reads.leaves.get(name), name in self._reads.needed
            if info.unusable and needed:
                yield Problem(name, "unusable", info.unusable, _leaf_text(leaf))
            elif leaf and not info.unusable:
                yield from _header_problems(leaf, info, check_dtype=needed)

    def _broken_ties(self) -> Iterator[Problem]:
        """Yield tied names for which the source has different tensors."""
        if self._reads.ties:
            good = set(self._names) - self._bad
            yield from broken_ties(self._reads.ties, good, self._source)

    def _broken_views(self) -> Iterator[Problem]:
        """Yield entries that are views in the model, but do not have the values of their base."""
        if self._reads.views:
            good = set(self._names) - self._bad
            yield from broken_views(self._reads.leaves, good, self._source)

    def _missing(self) -> Iterator[Problem]:
        """Yield tensors that the source must have, but has under none of their names."""
        for name, needed_by in self._reads.lacking(self._names).items():
            yield self._missing_problem(name, needed_by)

    def _missing_problem(self, name: str, needed_by: list[str]) -> Problem:
        """Return the problem of one missing tensor.

        Args:
            name: First name of the tensor.
            needed_by: Names of the slots that need it.
        """
        others = self._reads.names_of([name]) - {name}
        also = f", or its other names {tuple(sorted(others))}" if others else ""
        hint = f"pass it{also}"
        if needed_by and needed_by != [name]:
            more = f" and {len(needed_by) - _SHOWN} more" if len(needed_by) > _SHOWN else ""
            hint += f"; needed by {', '.join(map(repr, needed_by[:_SHOWN]))}{more}"
        if needed_by:
            hint += "; to leave such slots as they are: partial=True"
        return Problem(name, "missing", wanted=_leaf_text(self._reads.leaves.get(name)), hint=hint)

    def _nothing_to_refit(self) -> Iterator[Problem]:
        if self._reads.of_slots.isdisjoint(self._names):
            found = f"{len(self._names)} names, none of a slot"
            yield Problem(self._source.description, "nothing to refit", found)


def _header_problems(leaf: Leaf, info: TensorInfo, *, check_dtype: bool) -> Iterator[Problem]:
    if check_dtype and info.dtype != leaf.dtype:
        cast = _cast_for(info.dtype, leaf.dtype)
        rule = f", or set rules.cast to {cast!r}, or pass --cast {cast}" if cast else ""
        hint = f"convert it yourself{rule}: refitkit never casts weights silently"
        if not leaf.persistent:  # a cast would lose bits of a value that the plan has exactly
            hint = (
                "leave it out: no state_dict holds it, so the plan's value is kept; to set it, "
                "convert it yourself"
            )
        yield Problem(leaf.fqn, "dtype", info.dtype, leaf.dtype, hint)
    if info.shape != leaf.shape:
        hint = _transposed_hint(leaf.fqn) if info.shape == leaf.shape[::-1] else ""
        yield Problem(leaf.fqn, "shape", str(info.shape), str(leaf.shape), hint)


def _transposed_hint(name: str) -> str:
    """Return a hint for a weight that has the transposed shape.

    It names a family of rules if one transposes such weights. The family also transposes square
    weights, whose shapes do not show that they are transposed.
    """
    for family, rules in FAMILIES.items():
        if any(rule.transposed and name.endswith(rule.into.removeprefix("{}")) for rule in rules):
            how = f"set rules.families to [{family!r}], or pass --family {family}"
            return f"the transposed shape; to transpose all weights of this kind, {how}"
    return "the transposed shape"


def _cast_for(found: str, wanted: str) -> str:
    """Return the value of ``rules.cast`` that casts one dtype to another; empty if none does."""
    before, after = dtype_of(found), dtype_of(wanted)
    if is_lossless(before, after):
        return "lossless"
    return "any" if are_alike(before, after) else ""


def _leaf_text(leaf: Leaf | None) -> str:
    return f"{leaf.dtype} {leaf.shape}" if leaf else ""
