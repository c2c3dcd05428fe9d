"""The suite for weight transforms: requests, and what they have to become."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import WeightMismatchError
from refitkit.protocols import Made, WeightTransform
from refitkit.recipe.sources import TensorMap
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, skip
from refitkit.testing.oracles import Watched

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from refitkit.protocols import TransformRequest, WeightGroup

_GROUPS = "WeightTransform.groups"
_MAKE = "WeightGroup.make"


class TransformSuite:
    """Every contract of :class:`refitkit.protocols.WeightTransform`.

    Write ``make_transform``, ``make_request`` and ``expected``; ``make_alone`` and
    ``expected_errors`` where they mean something.

    Attributes:
        for_others: Names that it makes for a later transform to take: no leaves of the plan.
    """

    for_others: frozenset[str] = frozenset()

    def make_transform(self) -> WeightTransform:
        """A new transform."""
        raise NotImplementedError("Write make_transform: it returns a new transform.")

    def make_request(self, seed: int) -> TransformRequest:
        """A request with weights that it transforms; other ones for each seed, one plan."""
        raise NotImplementedError("Write make_request: a plan, and a source.")

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        """All that it has to make of ``make_request(seed)``, *found without the transform*."""
        raise NotImplementedError("Write expected: what has to be made, by FQN.")

    def make_alone(self) -> TransformRequest | None:
        """A request with a part of what belongs together, such as a scale without its weight."""
        return None

    def make_plain(self) -> TransformRequest | None:
        """A request in which it has no part: by default one with what the program reads."""
        return replace(self.make_request(1), source=TensorMap(self.expected(1)))

    def expected_errors(self, seed: int) -> Mapping[str, float] | None:  # noqa: ARG002 - for authors
        """The largest absolute error of what is made of a seed, by FQN; None: it measures none."""
        return None

    # -- what it makes ----------------------------------------------------------------------

    def test_it_has_a_name_and_a_priority(self) -> None:
        """The same each time: reports say the one, and the other decides what it is asked about."""
        one: Any = self.make_transform()
        if not isinstance(one, WeightTransform):
            found = f"{type(one).__name__} lacks members."
            raise Breach("WeightTransform", found, "Give it name, priority and groups.")
        facts: list[Any] = [(t.name, t.priority) for t in (one, one, self.make_transform())]
        name, priority = facts[0]
        if not isinstance(name, str) or not name or not isinstance(priority, int):
            found = f"they are {name!r} and {priority!r}."
            raise Breach("WeightTransform.name", found, "Give a name and a whole number.")
        if len(set(facts)) > 1:
            found = f"they change: {facts}."
            raise Breach("WeightTransform.name", found, "Give the same each time.")

    def test_values_are_bit_equal(self) -> None:
        """All that has to be made, and nothing else, bit for bit."""
        for seed in (1, 2):
            made = self._made(self.make_transform(), self.make_request(seed))
            wrong = oracles.differing(oracles.snapshot(made), oracles.snapshot(self.expected(seed)))
            if wrong:
                found = f"what is made is not, bit for bit, what should be: {oracles.shown(wrong)}."
                raise Breach(_MAKE, found, "Make what the program's own conversion makes.")

    def test_groups_are_made_of_what_is_there(self) -> None:
        """They take names of the source, give leaves of the plan, and share neither."""
        request = self.make_request(1)
        names = set(request.source.names())
        leaves = {leaf.fqn for leaf in request.plan.data.leaves} | self.for_others
        given: list[str] = []
        for group in self._groups(self.make_transform(), request):
            strange = [name for name in group.takes if name not in names]
            strange += [name for name in group.gives if name not in leaves]
            if strange:
                found = f"neither source nor plan has {oracles.shown(strange)}."
                raise Breach(_GROUPS, found, "Take names of the source, give leaves of the plan.")
            given += group.gives
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            found = f"two groups give {oracles.shown(twice)}."
            raise Breach(_GROUPS, found, "What is made together is one group.")

    def test_groups_make_what_they_announce(self) -> None:
        """All members, no others, with the dtypes and shapes of ``gives``."""
        for group in self._groups(self.make_transform(), self.make_request(1)):
            values = self._make(group).values
            wrong = sorted(values.keys() ^ group.gives.keys())
            if wrong:
                found = f"announced or made, and not both: {oracles.shown(wrong)}."
                raise Breach(_MAKE, found, "Make all members of a group, or none.")
            for name, info in group.gives.items():
                is_ = str(values[name].dtype).removeprefix("torch."), tuple(values[name].shape)
                if is_ != (info.dtype, info.shape):
                    found = f"{name!r} is announced as {info.dtype} {info.shape}, and is {is_}."
                    raise Breach("WeightGroup.gives", found, "Announce what is made.")

    def test_a_part_of_a_group_is_refused(self) -> None:
        """A scale without its weight: a ``WeightMismatchError`` that names it."""
        request = self.make_alone()
        if request is None:
            skip("make_alone() gives no part of what belongs together")
        try:
            list(self.make_transform().groups(request))
        except WeightMismatchError as exc:
            told = {problem.subject for problem in exc.problems}
            if not told & set(request.source.names()):
                found = f"the error names {sorted(told)}, and none of the entries."
                raise Breach(_GROUPS, found, "Give a Problem for each entry.") from exc
            return
        except Exception as exc:
            found = f"a part of a group is answered with {type(exc).__name__}: {exc}."
            raise Breach(_GROUPS, found, "Raise WeightMismatchError.") from exc
        advice = "Raise WeightMismatchError: half of it would be live beside an old half."
        raise Breach(_GROUPS, "a part of a group is accepted.", advice)

    def test_what_needs_nothing_is_left_alone(self) -> None:
        """In entries that the program reads as they are, it has no part."""
        request = self.make_plain()
        if request is None:
            skip("make_plain() gives no request in which it has no part")
        groups = self._groups(self.make_transform(), request)
        if groups:
            found = f"it makes {oracles.shown(list(groups[0].gives))}, which the source has."
            raise Breach(_GROUPS, found, "Leave alone what the program reads as it is.")

    # -- how it makes it --------------------------------------------------------------------

    def test_grouping_reads_no_tensors(self) -> None:
        """``groups`` looks at names and infos; ``make`` reads, and only what it takes."""
        request = self.make_request(1)
        source = Watched(request.source)
        groups = self._groups(self.make_transform(), replace(request, source=source))
        if source.read:
            found = f"tensors were read: {oracles.shown(sorted(source.read))}."
            raise Breach(_GROUPS, found, "Read data in make.")
        for group in groups:
            source.read.clear()
            self._make(group)
            strange = sorted(set(source.read) - set(group.takes))
            if strange:
                found = f"it reads {oracles.shown(strange)}, which the group does not take."
                raise Breach("WeightGroup.takes", found, "Take all that is read.")

    def test_the_same_each_time(self) -> None:
        """Made again, of A, B and A: the same bits; what was made before stays as it is."""
        transform = self.make_transform()
        first = self._made(transform, self.make_request(1))
        kept = oracles.snapshot(first)
        self._made(transform, self.make_request(2))
        after = oracles.snapshot(first)
        again = oracles.snapshot(self._made(transform, self.make_request(1)))
        for values, when in ((after, "after others were made"), (again, "made again")):
            wrong = oracles.differing(values, kept)
            if wrong:
                found = f"{when}, what is made is another: {oracles.shown(wrong)}."
                raise Breach(_MAKE, found, "Keep nothing; draw nothing; make new tensors.")
        for group in self._groups(transform, self.make_request(1)):
            one, other = (oracles.snapshot(self._make(group).values) for _ in range(2))
            wrong = oracles.differing(one, other)
            if wrong:
                found = f"one group makes two things: {oracles.shown(wrong)}."
                raise Breach(_MAKE, found, "It is called for every look at the values.")

    def test_the_source_is_not_changed(self) -> None:
        """Its tensors are the caller's."""
        request = self.make_request(1)
        names = list(request.source.names())
        before = oracles.snapshot({name: request.source.get(name) for name in names})
        self._made(self.make_transform(), request)
        after = oracles.snapshot({name: request.source.get(name) for name in names})
        wrong = oracles.differing(after, before)
        if wrong:
            found = f"entries of the source were changed: {oracles.shown(wrong)}."
            raise Breach(_MAKE, found, "Copy before writing.")

    def test_measures_are_honest(self) -> None:
        """They name members, pass exactly where they are within their limit, and are true."""
        for group in self._groups(self.make_transform(), self.make_request(1)):
            for measure in self._make(group).measures:
                if measure.name not in group.gives:
                    found = f"it is of {measure.name!r}, which the group does not give."
                    raise Breach("Made.measures", found, "Name what was made.")
                if measure.ok is not (measure.max_abs_error <= measure.limit):
                    found = f"{measure.name!r}: ok is {measure.ok}, with an error of "
                    found += f"{measure.max_abs_error} and a limit of {measure.limit}."
                    raise Breach("Made.measures", found, "Within the limit is ok; nothing else.")

    def test_measures_tell_the_true_error(self) -> None:
        """Each error is the one that was found without the transform, to a millionth."""
        wanted = self.expected_errors(1)
        if wanted is None:
            skip("expected_errors() tells of none")
        groups = self._groups(self.make_transform(), self.make_request(1))
        measures = [measure for group in groups for measure in self._make(group).measures]
        found = {measure.name: measure.max_abs_error for measure in measures}
        if not wanted:
            raise SuiteError("expected_errors() is empty: return None where nothing is measured.")
        for name, error in wanted.items():
            if name not in found or abs(found[name] - error) > 1e-6 * max(error, 1e-30):
                text = f"the error of {name!r} is {error}, and it says {found.get(name)}."
                raise Breach("Made.measures", text, "Measure what was made against the given.")

    def _groups(self, transform: WeightTransform, request: TransformRequest) -> list[WeightGroup]:
        return list(transform.groups(request))

    def _made(
        self, transform: WeightTransform, request: TransformRequest
    ) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for group in self._groups(transform, request):
            made.update(self._make(group).values)
        return made

    @staticmethod
    def _make(group: WeightGroup) -> Made:
        made: Any = group.make()
        if not isinstance(made, Made):
            found = f"it gives a {type(made).__name__}."
            raise Breach(_MAKE, found, "Give refitkit.protocols.Made.")
        return made
