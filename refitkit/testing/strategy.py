"""The suite for mapping strategies: inherit :class:`StrategySuite`, write requests and values."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.protocols import HoldsProgram, Mapped, MappingStrategy, MapRequest, SlotValue
from refitkit.recipe.sources import TensorMap
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip
from refitkit.testing.oracles import (
    PREFIX,
    CopiedPlan,
    MixedSource,
    ReadRecorder,
    WatchedSource,
    state_of_program,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAP = "MappingStrategy.map"
_MOST_SETS = 8  # of sources, and rows without any, that are checked one by one
_ON_SOURCES = (
    "Name every tensor that load reads. A value without sources counts as one that is computed "
    "from all weights, so refitkit does not notice a weight that reaches no slot."
)
_ON_WRITES = "Copy before writing: tensors belong to the caller."
_ON_STATE = "Keep no state between calls; do not write to sources."
Key = tuple[str, str]


class StrategySuite:
    """Every contract of :class:`refitkit.protocols.MappingStrategy`.

    Write ``make_strategy``, ``make_request`` and ``expected``; also ``make_lacking`` if possible.
    """

    def make_strategy(self) -> MappingStrategy:
        """A new strategy."""
        raise NotImplementedError("Write make_strategy: it returns a new strategy.")

    def make_request(self, seed: int) -> MapRequest:
        """A request that the strategy can map, with different weights for each seed."""
        raise NotImplementedError("Write make_request: it returns a MapRequest.")

    def expected(self, seed: int) -> Mapping[Key, torch.Tensor]:
        """The right values for ``make_request(seed)``, *computed without the strategy*.

        By (engine, slot): every row that the strategy has to map, and no row that it declines.
        """
        raise NotImplementedError("Write expected: the right values, by (engine, slot).")

    def make_lacking(self) -> MapRequest | None:
        """A request whose source lacks a tensor, so that the strategy has to decline some rows.

        None if the strategy declines no rows.
        """
        return None

    # -- identity ---------------------------------------------------------------------------

    def test_it_has_a_name_and_a_priority(self) -> None:
        """``name`` and ``priority`` are constants, because settings and reports contain them."""
        one: Any = self.make_strategy()
        if not isinstance(one, MappingStrategy):
            found = f"{type(one).__name__} lacks members."
            raise Breach("MappingStrategy", found, "Implement name, priority and map.")
        facts: list[Any] = [(s.name, s.priority) for s in (one, one, self.make_strategy())]
        name, priority = facts[0]
        if not isinstance(name, str) or not name or not isinstance(priority, int):
            found = f"name and priority are {name!r} and {priority!r}."
            raise Breach("MappingStrategy.name", found, "Set a name, and an integer priority.")
        if len(set(facts)) > 1:
            found = f"name and priority change: {facts}."
            raise Breach("MappingStrategy.name", found, "Make both constant.")

    # -- results of map ---------------------------------------------------------------------

    def test_values_are_bit_equal(self) -> None:
        """``map`` returns the right value for every expected slot, bit for bit."""
        # Two sets of weights: a strategy that caches values passes with one.
        for seed in (1, 2):
            mapped = self._mapped(self.make_request(seed))
            for key, wanted in self.expected(seed).items():
                name = "/".join(key)
                if key not in mapped.values:
                    why = mapped.declined.get(key, "without a reason")
                    found = f"{name!r} has no value: {why}."
                    raise Breach(_MAP, found, "Map every row that expected() lists.")
                if oracles.bits(mapped.values[key].load()) != oracles.bits(wanted):
                    found = f"the value of {name!r} differs from the right one in its bits."
                    raise Breach(_MAP, found, "Return only exact values.")

    def test_values_fit_their_slots(self) -> None:
        """Each value names the slot of its row, and has the slot's dtype and shape."""
        request = self.make_request(1)
        slots = {row.slot.key: row.slot for row in request.wanted}
        for key, value in self._mapped(request).values.items():
            name = "/".join(key)
            if value.slot != slots.get(key):
                found = f"values[{name!r}] is a value for {value.slot.key}."
                raise Breach(_MAP, found, "Return the slot of the requested row.")
            tensor = value.load()
            dtype = str(tensor.dtype).removeprefix("torch.")
            fits = dtype == value.slot.dtype and tensor.numel() == value.slot.count
            shape = value.slot.shape
            if not fits or (shape is not None and tuple(tensor.shape) != shape):
                found = f"the value of {name!r} is {dtype} {tuple(tensor.shape)}, but the slot is "
                found += f"{value.slot.dtype} {shape or value.slot.count}."
                raise Breach(_MAP, found, "Convert values in load.")

    def test_values_name_their_strategy_and_sources(self) -> None:
        """Each value names its strategy and existing tensors of the source, for reports."""
        for request in (self.make_request(1), self.make_lacking()):
            if request is not None:
                self._require_sources(request)

    def _require_sources(self, request: MapRequest) -> None:
        strategy, names = self.make_strategy(), set(request.source.names())
        for key, value in strategy.map(request).values.items():
            unknown = [name for name in value.sources if name not in names]
            if value.strategy != strategy.name or unknown:
                found = f"{'/'.join(key)!r} has strategy {value.strategy!r} and sources "
                found += f"{value.sources}."
                advice = "Name the strategy, and the tensors that load reads from the source."
                raise Breach("SlotValue", found, advice)

    def test_values_depend_on_their_sources_only(self) -> None:
        """A value stays the same if all tensors that its ``sources`` do not name are replaced.

        Without ``sources`` it is pinned, or it is computed from all weights together.
        """
        request, other = self.make_request(1), self.make_request(2)
        if isinstance(request.source, HoldsProgram):
            skip("the weights are in a program, so single tensors cannot be replaced")
        values = self._mapped(request).values
        wanted = self._loaded(Mapped(values))
        named = {key: value for key, value in values.items() if value.sources or value.pinned}
        # Values of equal sources are checked together, because mapping may take long.
        for sources in sorted({value.sources for value in named.values()})[:_MOST_SETS]:
            mixed = MixedSource(request.source, other.source, sources)
            mapped = self._mapped(replace(request, source=mixed)).values
            for key, value in named.items():
                is_checked = value.sources == sources and key in mapped
                if is_checked and oracles.bits(mapped[key].load()) != wanted["/".join(key)]:
                    found = f"the value of {'/'.join(key)!r} names the sources {sources}, but "
                    found += "depends on other tensors."
                    raise Breach("SlotValue.sources", found, _ON_SOURCES)
        self._require_named(request, [row for row in request.wanted if row.slot.key not in named])

    def _require_named(self, request: MapRequest, rows: Sequence[Any]) -> None:
        """Rows whose values name no sources must all read the same tensors: those of a program."""
        reads: dict[str, set[str]] = {}
        for row in rows[:_MOST_SETS]:
            source = ReadRecorder(request.source)
            # Mapped anew for each row: a strategy may compute all values when the first is loaded.
            mapped = self._mapped(replace(request, source=source, wanted=(row,)))
            self._loaded(mapped)
            reads["/".join(row.slot.key)] = set(source.read)
        every = set[str]().union(*reads.values())
        for name, read in reads.items():
            if read and read != every:
                found = f"the value of {name!r} names no sources, but reads "
                raise Breach(
                    "SlotValue.sources", f"{found}{oracles.quoted(sorted(read))}.", _ON_SOURCES
                )

    def test_identity_is_said_of_tensors_of_the_source(self) -> None:
        """A value with ``identity`` has the elements of a tensor that its ``sources`` name."""
        request = self.make_request(1)
        for key, value in self._mapped(request).values.items():
            if not value.identity or value.pinned:
                continue
            elements = oracles.bits(value.load())
            if elements not in [oracles.bits(request.source.get(name)) for name in value.sources]:
                found = f"the value of {'/'.join(key)!r} has identity, but is no tensor of "
                found += f"{value.sources}."
                advice = "Leave identity False for values that load computes."
                raise Breach("SlotValue.identity", found, advice)

    def test_formulas_can_be_compared(self) -> None:
        """``formula`` is hashable, and the same each time for the same weights; None is fine."""
        first, second = (self._mapped(self.make_request(1)).values for _ in range(2))
        for key, value in first.items():
            name = "/".join(key)
            try:
                hash(value.formula)
            except TypeError as exc:
                found = f"the formula of {name!r} cannot be hashed: {exc}."
                raise Breach(
                    "SlotValue.formula", found, "Use a tuple of numbers and text."
                ) from exc
            if key in second and value.formula != second[key].formula:
                found = (
                    f"the formula of {name!r} is another one each time: {value.formula!r}, then "
                )
                found += f"{second[key].formula!r}. A refit with delta never skips the slot."
                raise Breach("SlotValue.formula", found, "Use a tuple of numbers and text.")

    def test_rows_that_were_not_asked_for_are_not_answered(self) -> None:
        """A request for any one row returns no value of another row."""
        request = self.make_request(1)
        for row in request.wanted:
            mapped = self._mapped(replace(request, wanted=(row,)))
            others = sorted("/".join(key) for key in mapped.values if key != row.slot.key)
            if others:
                found = f"a request for {row.slot.name!r} alone returned {oracles.quoted(others)}."
                raise Breach(_MAP, found, "Map only the rows of request.wanted.")
        empty = self._mapped(replace(request, wanted=()))
        if empty.values:
            found = f"a request without rows returned {len(empty.values)} values."
            raise Breach(_MAP, found, "Map only the rows of request.wanted.")

    def test_what_is_not_served_is_declined_with_a_reason(self) -> None:
        """Every row has either a value, or a reason in words."""
        requests = [self.make_request(1), self.make_lacking()]
        for request in [one for one in requests if one is not None]:
            mapped = self._mapped(request)
            for row in request.wanted:
                key = row.slot.key
                if key not in mapped.values and not str(mapped.declined.get(key, "")).strip():
                    found = f"{row.slot.name!r} has neither a value nor a reason."
                    raise Breach("Mapped.declined", found, "Add a reason: reports show it.")
            both = sorted("/".join(key) for key in mapped.values.keys() & mapped.declined.keys())
            if both:
                found = f"rows have both a value and a reason: {oracles.quoted(both)}."
                raise Breach("Mapped.declined", found, "Decline only rows without a value.")

    def test_it_does_not_guess(self) -> None:
        """Rows that depend on a missing tensor are declined, whichever tensor is missing."""
        lacking, advice = self.make_lacking(), "Decline rows whose value is not provably right."
        named = self._named()
        if lacking is None and not named:
            skip("make_lacking() returned None, and values name no sources that can be left out")
        if lacking is not None:
            mapped = self._mapped(lacking)
            if not [row for row in lacking.wanted if row.slot.key not in mapped.values]:
                found = "the source lacks a tensor, but every row has a value."
                raise Breach(_MAP, found, advice)
        for name, keys in named.items():
            served = self._served({name: None})
            for key in keys & served.keys():
                # A tied weight, for example, may stand for the missing one.
                if served[key] != oracles.bits(self._right(key)):
                    found = f"without {name!r}, {'/'.join(key)!r} got another value."
                    raise Breach(_MAP, found, advice)

    def test_sources_that_do_not_fit_are_declined(self) -> None:
        """Weights of another shape or dtype are declined, or their value is right all the same.

        refitkit itself refuses them if they are leaves of the plan, so those are left out.
        """
        request = self.make_request(1)
        leaves = {leaf.fqn: (leaf.dtype, leaf.shape) for leaf in request.plan.data.leaves}
        advice = "In map, compare dtypes and shapes of request.source.info with the slot's."
        for name, keys in self._named().items():
            info, value = request.source.info(name), request.source.get(name)
            if leaves.get(name) == (info.dtype, info.shape):
                continue
            for other in (oracles.reversed_dimensions(value), oracles.with_more_digits(value)):
                if other is None:
                    continue
                served = self._served({name: other})
                for key in keys & served.keys():
                    right = self._right(key)
                    # Whether digits get lost shows only where elements are moved, not computed.
                    is_judged = other.dtype == value.dtype or self._only_moves(key, right)
                    same = other.dtype == value.dtype and served[key] == oracles.bits(right)
                    if is_judged and not same:
                        kind = str(other.dtype).removeprefix("torch.")
                        found = f"{name!r} in {kind} {tuple(other.shape)} instead of {info.dtype} "
                        found += f"{info.shape} was made into a value of {'/'.join(key)!r}."
                        raise Breach(_MAP, found, advice)

    def _named(self) -> dict[str, set[Key]]:
        """Slots by the names of the first sources that their values name; none of a program's."""
        request = self.make_request(1)
        if isinstance(request.source, HoldsProgram):
            return {}
        values = self._mapped(request).values
        names = sorted({name for value in values.values() for name in value.sources})
        return {
            name: {key for key, value in values.items() if name in value.sources}
            for name in names[:_MOST_SETS]
        }

    def _right(self, key: Key) -> torch.Tensor:
        return self._mapped(self.make_request(1)).values[key].load()

    def _only_moves(self, key: Key, right: torch.Tensor) -> bool:
        """Whether a value consists of elements of its sources."""
        request = self.make_request(1)
        sources = self._mapped(request).values[key].sources
        elements = [request.source.get(name).detach().reshape(-1) for name in sources]
        kinds = {tensor.dtype for tensor in elements}
        if kinds != {right.dtype} or len(torch.unique(right)) < 2:  # noqa: PLR2004 - not a constant
            return False
        return bool(torch.isin(right.detach().reshape(-1), torch.cat(elements)).all())

    def _served(self, changes: Mapping[str, torch.Tensor | None]) -> dict[Key, oracles.Bits]:
        """Bits of the fitting values for the first request, with some other tensors.

        Whatever is raised, and values that do not fit, stop a refit before anything is written.

        Args:
            changes: Other tensors by name; None: the source lacks it.
        """
        request = self.make_request(1)
        given = {name: request.source.get(name) for name in request.source.names()}
        some = {name: value for name, value in {**given, **changes}.items() if value is not None}
        found: dict[Key, oracles.Bits] = {}
        with suppress(Exception):
            mapped = self.make_strategy().map(replace(request, source=TensorMap(some)))
            for key, value in mapped.values.items():
                with suppress(Exception):
                    tensor, slot = value.load(), value.slot
                    shape = tuple(tensor.shape) if slot.shape is not None else None
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    if (dtype, shape, tensor.numel()) == (slot.dtype, slot.shape, slot.count):
                        found[key] = oracles.bits(tensor)
        return found

    def test_slots_of_other_layers_get_their_own_values(self) -> None:
        """A copy of all slots and weights, under the prefix ``second.``, is mapped too.

        A strategy that knows full names only needs two slots with different ``sources`` in
        ``make_request``.
        """
        first, other = self.make_request(1), self.make_request(2)
        values = self._mapped(first).values.values()
        if isinstance(first.source, HoldsProgram) or len({v.sources for v in values}) != 1:
            return  # the request of the author is the scene
        if not all(value.sources for value in values):
            return  # values of a program as a whole
        plan, keys = CopiedPlan(first.plan), {row.slot.key for row in first.wanted}
        copies = tuple(
            row
            for row in plan.copies_only().data.ledger
            if (row.slot.engine, row.slot.name.removeprefix(PREFIX)) in keys
        )
        copy = {PREFIX + name: other.source.get(name) for name in other.source.names()}
        right = {
            f"{engine}/{PREFIX}{name}": oracles.bits(value)
            for (engine, name), value in self.expected(2).items()
        }
        given: dict[str, oracles.Bits] = {}
        # With the copy alone, to find out whether the strategy knows slots by their full names.
        with suppress(Exception):
            alone = replace(first, plan=plan.copies_only(), source=TensorMap(copy), wanted=copies)
            given = self._loaded(self._mapped(alone))
        if given != right:
            skip("the strategy knows full names only: have make_request() return two slots")
        source = {name: first.source.get(name) for name in first.source.names()}
        both = TensorMap({**source, **copy})
        wanted = first.wanted + copies
        mapped = self._mapped(replace(first, plan=plan, source=both, wanted=wanted))
        one = {"/".join(key): oracles.bits(value) for key, value in self.expected(1).items()}
        wrong = oracles.differing(self._loaded(mapped), {**one, **right})
        if wrong:
            found = "with two copies of slots and weights, values are missing or wrong: "
            found += f"{oracles.quoted(wrong)}."
            raise Breach(_MAP, found, "Give each load the names of its own sources.")

    # -- side effects -----------------------------------------------------------------------

    def test_mapping_reads_no_tensors(self) -> None:
        """``map`` reads no data; only ``load`` does."""
        request = self.make_request(1)
        source = ReadRecorder(request.source)
        self._mapped(replace(request, source=source))
        if source.read:
            found = f"it read the tensors {oracles.quoted(sorted(source.read))}."
            raise Breach(_MAP, found, "Read in load: a refit may be refused before.")

    def test_the_same_answer_twice(self) -> None:
        """A second ``load`` and a second ``map`` return the same slots and the same bits."""
        request, strategy = self.make_request(1), self.make_strategy()
        first, second = strategy.map(request), strategy.map(request)
        # The first result is loaded twice, then a second result once.
        values = [self._loaded(mapped) for mapped in (first, first, second)]
        for found, method in ((values[1], "load"), (values[2], "map")):
            wrong = oracles.differing(found, values[0])
            if wrong:
                text = f"a second {method} returned other values: {oracles.quoted(wrong)}."
                raise Breach(_MAP, text, _ON_STATE)

    def test_requests_do_not_affect_one_another(self) -> None:
        """One strategy serves all refits of a pipeline; it answers each as a new one would."""
        candidates = [self.make_lacking(), self.make_request(2), self.make_request(1)]
        requests = [one for one in candidates if one is not None]
        strategy = self.make_strategy()
        answers = [strategy.map(request) for request in requests]
        for request, mapped in zip(requests, answers, strict=True):
            fresh = self._mapped(request)
            wrong = oracles.differing(self._loaded(mapped), self._loaded(fresh))
            wrong += ["/".join(key) for key in mapped.declined.keys() ^ fresh.declined.keys()]
            if wrong:
                found = f"after other requests, {oracles.quoted(sorted(set(wrong)))} are answered "
                raise Breach(_MAP, f"{found}in another way than by a new strategy.", _ON_STATE)
        first, other = self.make_request(1), self.make_request(2)

        def use(source: ReadRecorder) -> None:
            self._loaded(strategy.map(replace(first, source=source)))

        place = oracles.at_the_place_of_a_deleted(first.source, other.source, use)
        if place is None:
            return
        values = self._loaded(strategy.map(replace(other, source=place)))
        wrong = oracles.differing(values, self._loaded(self._mapped(other)))
        if wrong:
            found = f"a new source got the values of a deleted one: {oracles.quoted(wrong)}."
            raise Breach(_MAP, found, f"{_ON_STATE} An id is used again.")

    def test_loaded_values_stay_as_they_are(self) -> None:
        """A loaded tensor does not change when other values are loaded, in any refit."""
        strategy = self.make_strategy()
        loaded = {
            f"{'/'.join(key)} ({seed})": value.load()
            for seed in (1, 2)
            for key, value in strategy.map(self.make_request(seed)).values.items()
        }
        after = oracles.snapshot(loaded)
        again = {
            f"{name} ({seed})": found
            for seed in (1, 2)
            for name, found in self._loaded(self._mapped(self.make_request(seed))).items()
        }
        wrong = sorted({name.rpartition(" ")[0] for name in oracles.differing(after, again)})
        if wrong:
            found = f"values changed when others were loaded: {oracles.quoted(wrong)}."
            advice = "Return a new tensor, or one that nobody writes to: engines load several."
            raise Breach("SlotValue.load", found, advice)

    def test_sources_are_not_kept(self) -> None:
        """No tensor of a source is alive after the refit, or memory grows with each refit."""
        request, strategy = self.make_request(1), self.make_strategy()

        def use(source: WatchedSource) -> None:
            self._loaded(strategy.map(replace(request, source=source)))

        if kept := oracles.kept_of(request.source, use):
            found = f"tensors of the source are kept: {oracles.quoted(kept)}."
            raise Breach(_MAP, found, "Keep neither sources nor their tensors.")

    def test_nothing_is_changed(self) -> None:
        """Loading all values changes neither the plan, nor the source, nor its program.

        Not even to repair odd elements of the source.
        """
        request = self.make_request(1)
        # Plan data is frozen, so a changed plan has another data object.
        plan, before = request.plan.data, self._state(request)
        self._loaded(self._mapped(request))
        if request.plan.data != plan:
            raise Breach(_MAP, "it changed the plan.", "Only read the plan.")
        wrong = oracles.differing(self._state(request), before)
        if wrong:
            found = f"it changed the source or its program: {oracles.quoted(wrong)}."
            raise Breach(_MAP, found, _ON_WRITES)
        names = request.source.names()
        odd = TensorMap({n: oracles.with_odd_values(request.source.get(n)) for n in names})
        for source in map(WatchedSource, (request.source, odd)):
            # Odd elements may be refused.
            with suppress(Exception):
                self._loaded(self._mapped(replace(request, source=source)))
            if written := source.written():
                found = f"it wrote to tensors of the source: {oracles.quoted(written)}."
                raise Breach("SlotValue.load", found, _ON_WRITES)

    def _mapped(self, request: MapRequest) -> Mapped:
        mapped: Any = self.make_strategy().map(request)
        if not isinstance(mapped, Mapped):
            found = f"it returned a {type(mapped).__name__}."
            raise Breach(_MAP, found, "Return a refitkit.protocols.Mapped.")
        wrong = [v for v in mapped.values.values() if not isinstance(v, SlotValue)]
        if wrong:
            found = f"one of the values is a {type(wrong[0]).__name__}."
            raise Breach(_MAP, found, "Return refitkit.protocols.SlotValue objects.")
        return mapped

    @staticmethod
    def _loaded(mapped: Mapped) -> dict[str, oracles.Bits]:
        return {"/".join(key): oracles.bits(v.load()) for key, v in mapped.values.items()}

    @staticmethod
    def _state(request: MapRequest) -> dict[str, oracles.Bits]:
        source = request.source
        found = {name: oracles.bits(source.get(name)) for name in source.names()}
        return {**found, **state_of_program(source)}
