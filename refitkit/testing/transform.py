"""The suite for weight transforms: inherit :class:`TransformSuite`, write requests and results."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import RefitError, WeightMismatchError
from refitkit.protocols import Made, WeightTransform
from refitkit.recipe.sources import TensorMap
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, skip
from refitkit.testing.oracles import PREFIX, CopiedPlan, ReadRecorder, WatchedSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from refitkit.model import OutputMeasure
    from refitkit.protocols import TransformRequest, WeightGroup

_GROUPS = "WeightTransform.groups"
_MAKE = "WeightGroup.make"
_MEASURES = "Made.measures"
_MOST = 8  # entries that are checked one by one
_ON_WRITES = "Copy before writing: tensors belong to the caller."


class TransformSuite:
    """Every contract of :class:`refitkit.protocols.WeightTransform`.

    Write ``make_transform``, ``make_request`` and ``expected``; also ``make_alone`` and
    ``expected_errors`` if they apply.

    Attributes:
        for_others: Names that the transform makes as inputs of a later transform; they are not
            leaves of the plan.
    """

    for_others: frozenset[str] = frozenset()

    def make_transform(self) -> WeightTransform:
        """A new transform."""
        raise NotImplementedError("Write make_transform: it returns a new transform.")

    def make_request(self, seed: int) -> TransformRequest:
        """A request whose weights the transform converts: one plan, other weights for each seed."""
        raise NotImplementedError("Write make_request: it returns a TransformRequest.")

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        """All tensors to make from ``make_request(seed)``, *computed without the transform*."""
        raise NotImplementedError("Write expected: the tensors to make, by FQN.")

    def make_alone(self) -> TransformRequest | None:
        """A request with an incomplete group, such as a scale without its weight; None: none."""
        return None

    def make_plain(self) -> TransformRequest | None:
        """A request that the transform ignores; None: none.

        By default its source has the tensors of ``expected``, which the program reads unchanged.
        """
        return replace(self.make_request(1), source=TensorMap(self.expected(1)))

    def expected_errors(self, seed: int) -> Mapping[str, float] | None:  # noqa: ARG002 - for authors
        """The largest absolute errors of ``expected(seed)``, by FQN, against the given weights.

        None if the transform measures no errors.
        """
        return None

    # -- results ----------------------------------------------------------------------------

    def test_it_has_a_name_and_a_priority(self) -> None:
        """``name`` and ``priority`` are constants: reports show one, the other sets the order."""
        one: Any = self.make_transform()
        if not isinstance(one, WeightTransform):
            found = f"{type(one).__name__} lacks members."
            raise Breach("WeightTransform", found, "Implement name, priority and groups.")
        facts: list[Any] = [(t.name, t.priority) for t in (one, one, self.make_transform())]
        name, priority = facts[0]
        if not isinstance(name, str) or not name or not isinstance(priority, int):
            found = f"name and priority are {name!r} and {priority!r}."
            raise Breach("WeightTransform.name", found, "Set a name, and an integer priority.")
        if len(set(facts)) > 1:
            found = f"name and priority change: {facts}."
            raise Breach("WeightTransform.name", found, "Make both constant.")

    def test_values_are_bit_equal(self) -> None:
        """The groups make exactly the expected tensors, bit for bit."""
        # Two sets of weights: a transform that caches values passes with one.
        for seed in (1, 2):
            made = self._made(self.make_transform(), self.make_request(seed))
            wrong = oracles.differing(oracles.snapshot(made), oracles.snapshot(self.expected(seed)))
            if wrong:
                found = f"tensors differ from the expected ones in bits: {oracles.quoted(wrong)}."
                raise Breach(_MAKE, found, "Compute what the program's own conversion computes.")

    def test_weights_of_other_layers_are_made_too(self) -> None:
        """A copy of all entries, under the prefix ``second.``, is converted beside the first.

        A transform that knows full names only needs two groups in ``make_request``.
        """
        first, other = self.make_request(1), self.make_request(2)
        plan = CopiedPlan(first.plan)
        copy = {PREFIX + name: other.source.get(name) for name in other.source.names()}
        wanted = {PREFIX + name: value for name, value in self.expected(2).items()}
        # With the copy alone, to find out whether the transform knows weights by their full names.
        alone = replace(first, plan=plan.copies_only(), source=TensorMap(copy))
        try:
            given = {
                name for group in self._groups(self.make_transform(), alone) for name in group.gives
            }
        except RefitError:
            given = set()
        if given != wanted.keys():
            # The request of the author is the scene for such transforms.
            if len(self._groups(self.make_transform(), first)) > 1:
                return
            skip("the transform knows full names only: have make_request() return two groups")
        source = {name: first.source.get(name) for name in first.source.names()}
        both = replace(first, plan=plan, source=TensorMap({**source, **copy}))
        made = oracles.snapshot(self._made(self.make_transform(), both))
        wrong = oracles.differing(made, oracles.snapshot({**self.expected(1), **wanted}))
        if wrong:
            found = (
                f"with two copies of the weights, {oracles.quoted(wrong)} are missing or wrong; "
            )
            found += "with either copy alone they are right."
            raise Breach(_GROUPS, found, "Return a group for every match, not only for the first.")

    def test_groups_are_made_of_what_is_there(self) -> None:
        """Groups take names of the source and give leaves of the plan; no two give the same."""
        request = self.make_request(1)
        names = set(request.source.names())
        # A later transform may take the results, so they need not be leaves of the program.
        leaves = {leaf.fqn for leaf in request.plan.data.leaves} | self.for_others
        given: list[str] = []
        for group in self._groups(self.make_transform(), request):
            unknown = [name for name in group.takes if name not in names]
            unknown += [name for name in group.gives if name not in leaves]
            if unknown:
                found = f"neither source nor plan has {oracles.quoted(unknown)}."
                raise Breach(_GROUPS, found, "Take names of the source, give leaves of the plan.")
            given += group.gives
        repeated = sorted({name for name in given if given.count(name) > 1})
        if repeated:
            found = f"two groups give {oracles.quoted(repeated)}."
            raise Breach(_GROUPS, found, "Put tensors that are made together into one group.")

    def test_groups_make_what_they_announce(self) -> None:
        """``make`` returns exactly the tensors of ``gives``, with their dtypes and shapes."""
        for group in self._groups(self.make_transform(), self.make_request(1)):
            values = self._make(group).values
            wrong = sorted(values.keys() ^ group.gives.keys())
            if wrong:
                found = f"names are only in gives or only made: {oracles.quoted(wrong)}."
                raise Breach(_MAKE, found, "Make exactly the tensors of gives.")
            for name, info in group.gives.items():
                made = str(values[name].dtype).removeprefix("torch."), tuple(values[name].shape)
                if made != (info.dtype, info.shape):
                    found = f"{name!r} is announced as {info.dtype} {info.shape}, but make "
                    found += f"returned {made[0]} {made[1]}."
                    advice = "Announce the dtype and shape of the made tensor."
                    raise Breach("WeightGroup.gives", found, advice)

    def test_formulas_are_hashable(self) -> None:
        """``formula`` can be hashed, because revisions contain it; None is fine."""
        for group in self._groups(self.make_transform(), self.make_request(1)):
            try:
                hash(group.formula)
            except TypeError as exc:
                found = f"the formula of the group that gives {oracles.quoted(list(group.gives))} "
                found += f"is not hashable: {exc}."
                advice = "Return a tuple of texts and numbers, for example, without lists in it."
                raise Breach("WeightGroup.formula", found, advice) from exc

    def test_lone_entries_are_refused_or_left_alone(self) -> None:
        """Without one of the entries of a group, or with one result alone, nothing crashes.

        In full and in partial refits. The transform refuses, or leaves the entries to the checks.
        """
        request = self.make_request(1)
        for what, weights in self._incomplete(request):
            for partial in (False, True):
                some = replace(request, source=TensorMap(weights), partial=partial)
                refit = f"{what}, in a {'partial' if partial else 'full'} refit,"
                self._require_no_crash(some, refit)

    def _incomplete(
        self, request: TransformRequest
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Sets of weights that lack a part of a group, each with a description."""
        source = {name: request.source.get(name) for name in request.source.names()}
        results = self.expected(1)
        for group in self._groups(self.make_transform(), request):
            for name in group.takes if len(group.takes) > 1 else ():
                rest = {other: value for other, value in source.items() if other != name}
                yield f"a checkpoint without {name!r}", rest
            others = {name: value for name, value in source.items() if name not in group.takes}
            for name in group.gives if len(group.gives) > 1 else ():
                if name in results:
                    yield f"a lone {name!r}", {**others, name: results[name]}

    def _require_no_crash(self, request: TransformRequest, what: str) -> None:
        advice = "Raise WeightMismatchError that names the entries, or return no group for them."
        groups: list[WeightGroup] = []
        try:
            groups = self._groups(self.make_transform(), request)
            if all(name in request.source.names() for group in groups for name in group.takes):
                for group in groups:
                    self._make(group)
        except RefitError as exc:
            if not exc.message.strip():
                text = f"{what} raised {type(exc).__name__} without a message."
                raise Breach(_GROUPS, text, "Explain which entries are missing.") from exc
        except Exception as exc:
            text = f"{what} raised {type(exc).__name__}: {exc}."
            raise Breach(_GROUPS, text, advice) from exc
        names = set(request.source.names())
        unknown = sorted({name for group in groups for name in group.takes} - names)
        if unknown:
            found = f"{what} gave a group that takes {oracles.quoted(unknown)}, which the source "
            raise Breach(_GROUPS, f"{found}does not have.", advice)

    def test_a_part_of_a_group_is_refused(self) -> None:
        """An incomplete group raises a ``WeightMismatchError`` that names its entries.

        In partial refits too: there the other entries of the group would keep their old values.
        """
        request = self.make_alone()
        if request is None:
            skip("make_alone() returned None, so no group can be incomplete")
        self._require_refused(request, "an incomplete group")
        if not request.partial:
            some = replace(request, partial=True)
            self._require_refused(some, "an incomplete group in a partial refit")

    def _require_refused(self, request: TransformRequest, what: str) -> None:
        try:
            list(self.make_transform().groups(request))
        except WeightMismatchError as exc:
            subjects = {problem.subject for problem in exc.problems}
            # The entry that is there, or the one that is missing.
            entries = {*request.source.names(), *self.make_request(1).source.names()}
            if not subjects & entries:
                found = f"the problems name {sorted(subjects)}, but no entry of the checkpoint."
                raise Breach(_GROUPS, found, "Add a Problem for each entry.") from exc
            return
        except Exception as exc:
            found = f"{what} raised {type(exc).__name__}: {exc}."
            raise Breach(_GROUPS, found, "Raise WeightMismatchError.") from exc
        advice = "Raise WeightMismatchError: otherwise old and new members would be mixed."
        raise Breach(_GROUPS, f"{what} was accepted.", advice)

    def test_entries_with_other_dimensions_are_not_reshaped(self) -> None:
        """An entry whose dimensions are reversed is refused, left alone, or turned back.

        Some programs save ``(in, out)`` where others save ``(out, in)``: as many elements, in
        another order.
        """
        request, expected = self.make_request(1), self.expected(1)
        wanted = oracles.snapshot(expected)
        given = {name: request.source.get(name) for name in request.source.names()}
        groups = self._groups(self.make_transform(), request)
        for name in [name for group in groups for name in group.takes][:_MOST]:
            turned = oracles.reversed_dimensions(given[name])
            if turned is None:
                continue
            other = replace(request, source=TensorMap({**given, name: turned}))
            made: dict[str, torch.Tensor] = {}
            # Whatever is raised stops the refit before anything is written.
            with suppress(Exception):
                made = self._made(self.make_transform(), other)
            # refitkit itself refuses results that do not have the shapes of the program.
            fitting = {
                n: v for n, v in made.items() if n in wanted and v.shape == expected[n].shape
            }
            wrong = [n for n, found in oracles.snapshot(fitting).items() if found != wanted[n]]
            if wrong:
                text = f"{name!r} of shape {tuple(turned.shape)} instead of "
                text += f"{tuple(given[name].shape)} was made into {oracles.quoted(wrong)}."
                raise Breach(_GROUPS, text, "Compare shapes, and not only numbers of elements.")

    def test_what_needs_nothing_is_left_alone(self) -> None:
        """The transform returns no groups for weights that the program reads unchanged."""
        request = self.make_plain()
        if request is None:
            skip("make_plain() returned None, so the transform ignores no request")
        groups = self._groups(self.make_transform(), request)
        if groups:
            found = f"it makes {oracles.quoted(list(groups[0].gives))}, which the source has."
            raise Breach(_GROUPS, found, "Return no group for weights that the program reads.")

    # -- side effects and measures ----------------------------------------------------------

    def test_grouping_reads_no_tensors(self) -> None:
        """``groups`` looks at names and infos; ``make`` reads, and only what it takes."""
        request = self.make_request(1)
        source = ReadRecorder(request.source)
        groups = self._groups(self.make_transform(), replace(request, source=source))
        if source.read:
            found = f"it read the tensors {oracles.quoted(sorted(source.read))}."
            raise Breach(_GROUPS, found, "Read data in make.")
        for group in groups:
            # Reads of other groups do not count.
            source.read.clear()
            self._make(group)
            unnamed = sorted(set(source.read) - set(group.takes))
            if unnamed:
                found = f"make read {oracles.quoted(unnamed)}, which the group does not take."
                raise Breach("WeightGroup.takes", found, "Name all tensors that make reads.")

    def test_the_same_each_time(self) -> None:
        """Weights A, then B, then A again give equal bits; earlier results do not change."""
        transform = self.make_transform()
        first = self._made(transform, self.make_request(1))
        # Snapshot now: a transform with one buffer overwrites its first result below.
        kept = oracles.snapshot(first)
        self._made(transform, self.make_request(2))
        after = oracles.snapshot(first)
        again = oracles.snapshot(self._made(transform, self.make_request(1)))
        advice = "Keep no state, use no random numbers, and return new tensors."
        for values, when in (
            (after, "earlier results changed"),
            (again, "equal weights gave other results"),
        ):
            wrong = oracles.differing(values, kept)
            if wrong:
                found = f"{when} after other weights were made: {oracles.quoted(wrong)}."
                raise Breach(_MAKE, found, advice)
        # The pipeline may call make several times in one refit.
        for group in self._groups(transform, self.make_request(1)):
            one, other = (oracles.snapshot(self._make(group).values) for _ in range(2))
            wrong = oracles.differing(one, other)
            if wrong:
                found = f"two calls for one group gave different bits: {oracles.quoted(wrong)}."
                raise Breach(_MAKE, found, advice)
        self._require_no_cache(transform, advice)

    def _require_no_cache(self, transform: WeightTransform, advice: str) -> None:
        """Convert other weights from a source with the ``id`` of a deleted one."""
        first, other = self.make_request(1), self.make_request(2)

        def use(source: ReadRecorder) -> None:
            self._made(transform, replace(first, source=source))

        source = oracles.at_the_place_of_a_deleted(first.source, other.source, use)
        if source is None:
            return
        made = oracles.snapshot(self._made(transform, replace(other, source=source)))
        wrong = oracles.differing(made, oracles.snapshot(self.expected(2)))
        if wrong:
            found = f"a new source got the results of a deleted one: {oracles.quoted(wrong)}."
            raise Breach(_MAKE, found, f"{advice} An id is used again.")

    def test_the_source_is_not_changed(self) -> None:
        """``make`` does not write to tensors of the source, not even to repair odd elements."""
        request = self.make_request(1)
        names = list(request.source.names())
        before = oracles.snapshot({name: request.source.get(name) for name in names})
        self._made(self.make_transform(), request)
        after = oracles.snapshot({name: request.source.get(name) for name in names})
        wrong = oracles.differing(after, before)
        if wrong:
            found = f"it changed tensors of the source: {oracles.quoted(wrong)}."
            raise Breach(_MAKE, found, _ON_WRITES)
        # Anew: what a first run has reshaped in place may be refused now.
        new = self.make_request(1).source
        odd = TensorMap({n: oracles.with_odd_values(new.get(n)) for n in names})
        for source in map(WatchedSource, (new, odd)):
            # Odd elements may be refused.
            with suppress(Exception):
                self._made(self.make_transform(), replace(request, source=source))
            if written := source.written():
                found = f"it wrote to tensors of the source: {oracles.quoted(written)}."
                raise Breach(_MAKE, found, _ON_WRITES)

    def test_measures_are_honest(self) -> None:
        """Each measure names a tensor of the group, and is ok exactly if within its limit."""
        for group in self._groups(self.make_transform(), self.make_request(1)):
            for measure in self._make(group).measures:
                if measure.name not in group.gives:
                    found = f"a measure names {measure.name!r}, which the group does not give."
                    raise Breach(_MEASURES, found, "Name a made tensor.")
                within = measure.max_abs_error <= measure.limit or bool(measure.metrics)
                if measure.ok is not (within and not measure.failed):
                    found = f"{measure.name!r} has ok={measure.ok}, the error "
                    found += f"{measure.max_abs_error} and the limit {measure.limit}."
                    raise Breach(_MEASURES, found, "Set ok to whether the error is within it.")

    def test_measures_tell_the_true_error(self) -> None:
        """Each error equals the one of ``expected_errors``, within one millionth of it.

        The error is ``max_abs_error``, or one of the ``metrics`` if the measure does not set it.
        """
        wanted = self.expected_errors(1)
        if wanted is None:
            skip("expected_errors() returned None, so the transform measures nothing")
        groups = self._groups(self.make_transform(), self.make_request(1))
        measures = [measure for group in groups for measure in self._make(group).measures]
        told = {measure.name: _errors_in(measure) for measure in measures}
        if not wanted:
            raise SuiteError("expected_errors() is empty: return None if nothing is measured.")
        for name, error in wanted.items():
            errors = told.get(name, [])
            if not any(abs(found - error) <= 1e-6 * max(error, 1e-30) for found in errors):
                text = f"the largest absolute error of {name!r} is {error}, but its measure says "
                text += f"{' and '.join(map(str, errors)) or 'nothing'}."
                advice = "Set max_abs_error to the error of the made tensor against the given one."
                raise Breach(_MEASURES, text, advice)

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
            found = f"it returned a {type(made).__name__}."
            raise Breach(_MAKE, found, "Return a refitkit.protocols.Made.")
        return made


def _errors_in(measure: OutputMeasure) -> list[float]:
    if "max_abs_error" in measure.model_fields_set or not measure.metrics:
        return [measure.max_abs_error]
    return [metric.value for metric in measure.metrics]
