"""The suite for mapping strategies: requests, and the values that are right for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from refitkit.protocols import Mapped, MappingStrategy, MapRequest, SlotValue
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip
from refitkit.testing.oracles import Watched, state_of_program

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_MAP = "MappingStrategy.map"
Key = tuple[str, str]


class StrategySuite:
    """Every contract of :class:`refitkit.protocols.MappingStrategy`.

    Write ``make_strategy``, ``make_request`` and ``expected``; ``make_lacking`` where there is a
    way.
    """

    def make_strategy(self) -> MappingStrategy:
        """A new strategy."""
        raise NotImplementedError("Write make_strategy: it returns a new strategy.")

    def make_request(self, seed: int) -> MapRequest:
        """A request that it can serve, with the weights of this seed; other ones for each."""
        raise NotImplementedError("Write make_request: what the strategy is asked.")

    def expected(self, seed: int) -> Mapping[Key, torch.Tensor]:
        """The right values for slots of ``make_request(seed)``, *found without the strategy*.

        All that it has to serve; of others it has to decline.
        """
        raise NotImplementedError("Write expected: the right values, by (engine, slot).")

    def make_lacking(self) -> MapRequest | None:
        """A request whose source lacks something, so that some rows cannot be served; None: none.

        A guess would be wrong there.
        """
        return None

    # -- what it is -------------------------------------------------------------------------

    def test_it_has_a_name_and_a_priority(self) -> None:
        """Both the same each time: they are written in settings and reports."""
        one: Any = self.make_strategy()
        if not isinstance(one, MappingStrategy):
            found = f"{type(one).__name__} lacks members."
            raise Breach("MappingStrategy", found, "Give it name, priority and map.")
        facts: list[Any] = [(s.name, s.priority) for s in (one, one, self.make_strategy())]
        name, priority = facts[0]
        if not isinstance(name, str) or not name or not isinstance(priority, int):
            found = f"they are {name!r} and {priority!r}."
            raise Breach("MappingStrategy.name", found, "Give a name and a whole number.")
        if len(set(facts)) > 1:
            found = f"they change: {facts}."
            raise Breach("MappingStrategy.name", found, "Give the same each time.")

    # -- what it answers --------------------------------------------------------------------

    def test_values_are_bit_equal(self) -> None:
        """Every slot that it should serve, with the value that is right, bit for bit."""
        for seed in (1, 2):
            mapped = self._mapped(self.make_request(seed))
            for key, wanted in self.expected(seed).items():
                name = "/".join(key)
                if key not in mapped.values:
                    why = mapped.declined.get(key, "without a reason")
                    raise Breach(_MAP, f"{name!r} is not served: {why}.", "Serve what it can.")
                if oracles.bits(mapped.values[key].load()) != oracles.bits(wanted):
                    found = f"the value of {name!r} is not, bit for bit, the right one."
                    raise Breach(_MAP, found, "Give no value that is not exact.")

    def test_values_fit_their_slots(self) -> None:
        """Each value is for the slot of its row, and has its dtype and shape."""
        request = self.make_request(1)
        slots = {row.slot.key: row.slot for row in request.wanted}
        for key, value in self._mapped(request).values.items():
            name = "/".join(key)
            if value.slot != slots.get(key):
                found = f"under {name!r} stands a value for {value.slot.key}."
                raise Breach(_MAP, found, "Give the slot of the row that was asked for.")
            tensor = value.load()
            dtype = str(tensor.dtype).removeprefix("torch.")
            fits = dtype == value.slot.dtype and tensor.numel() == value.slot.count
            shape = value.slot.shape
            if not fits or (shape is not None and tuple(tensor.shape) != shape):
                found = f"{name!r} gets {dtype} {tuple(tensor.shape)}, and is {value.slot.dtype} "
                raise Breach(_MAP, f"{found}{shape or value.slot.count}.", "Convert in load.")

    def test_values_name_their_strategy_and_sources(self) -> None:
        """Reports say where values come from: the strategy by its name, sources that exist."""
        request, strategy = self.make_request(1), self.make_strategy()
        names = set(request.source.names())
        for key, value in strategy.map(request).values.items():
            strange = [name for name in value.sources if name not in names]
            if value.strategy != strategy.name or strange:
                found = f"{'/'.join(key)!r} comes from {value.strategy!r} and {value.sources}."
                advice = "Name the strategy, and what it reads of the source."
                raise Breach("SlotValue", found, advice)

    def test_rows_that_were_not_asked_for_are_not_answered(self) -> None:
        """Asked for one row after another, it answers that one alone."""
        request = self.make_request(1)
        for row in request.wanted:
            mapped = self._mapped(replace(request, wanted=(row,)))
            foreign = sorted("/".join(key) for key in mapped.values if key != row.slot.key)
            if foreign:
                found = f"asked for {row.slot.name!r} alone, it gives {oracles.shown(foreign)}."
                raise Breach(_MAP, found, "Answer rows of request.wanted only.")
        empty = self._mapped(replace(request, wanted=()))
        if empty.values:
            found = f"asked for nothing, it gives {len(empty.values)} values."
            raise Breach(_MAP, found, "Answer rows of request.wanted only.")

    def test_what_is_not_served_is_declined_with_a_reason(self) -> None:
        """Every row that gets no value gets a reason, in words."""
        requests = [self.make_request(1), self.make_lacking()]
        for request in [one for one in requests if one is not None]:
            mapped = self._mapped(request)
            for row in request.wanted:
                key = row.slot.key
                if key not in mapped.values and not str(mapped.declined.get(key, "")).strip():
                    found = f"{row.slot.name!r} is not served, and nothing says why."
                    raise Breach("Mapped.declined", found, "Say why not: reports show it.")
            both = sorted("/".join(key) for key in mapped.values.keys() & mapped.declined.keys())
            if both:
                found = f"served and declined: {oracles.shown(both)}."
                raise Breach("Mapped.declined", found, "Decline what gets no value.")

    def test_it_does_not_guess(self) -> None:
        """Where the source lacks something, what follows from it is declined."""
        request = self.make_lacking()
        if request is None:
            skip("make_lacking() gives no source that lacks something")
        mapped = self._mapped(request)
        if not [row for row in request.wanted if row.slot.key not in mapped.values]:
            found = "the source lacks something, and every row got a value."
            raise Breach(_MAP, found, "Decline what cannot be proved right; never guess.")

    # -- how it answers ---------------------------------------------------------------------

    def test_mapping_reads_no_tensors(self) -> None:
        """``map`` promises; data is read in ``load``."""
        request = self.make_request(1)
        source = Watched(request.source)
        self._mapped(replace(request, source=source))
        if source.read:
            found = f"tensors were read while mapping: {oracles.shown(sorted(source.read))}."
            raise Breach(_MAP, found, "Read in load: a refit may be refused before it.")

    def test_the_same_answer_twice(self) -> None:
        """Asked again, and loaded again: the same slots, the same bits."""
        request, strategy = self.make_request(1), self.make_strategy()
        first, second = strategy.map(request), strategy.map(request)
        values = [self._loaded(mapped) for mapped in (first, first, second)]
        for found, when in ((values[1], "loaded again"), (values[2], "asked again")):
            wrong = oracles.differing(found, values[0])
            if wrong:
                text = f"{when}, values are other ones: {oracles.shown(wrong)}."
                raise Breach(_MAP, text, "Keep nothing between requests; leave sources alone.")

    def test_nothing_is_changed(self) -> None:
        """Plan, source and program are as before, when all values were loaded."""
        request = self.make_request(1)
        plan, before = request.plan.data, self._state(request)
        self._loaded(self._mapped(request))
        if request.plan.data != plan:
            raise Breach(_MAP, "the plan was changed.", "Only read it.")
        wrong = oracles.differing(self._state(request), before)
        if wrong:
            found = f"the source or its program was changed: {oracles.shown(wrong)}."
            raise Breach(_MAP, found, "Copy before writing: tensors are the caller's.")

    def _mapped(self, request: MapRequest) -> Mapped:
        mapped: Any = self.make_strategy().map(request)
        if not isinstance(mapped, Mapped):
            found = f"it answers with a {type(mapped).__name__}."
            raise Breach(_MAP, found, "Answer with refitkit.protocols.Mapped.")
        odd = [v for v in mapped.values.values() if not isinstance(v, SlotValue)]
        if odd:
            found = f"a value is a {type(odd[0]).__name__}."
            raise Breach(_MAP, found, "Give values of refitkit.protocols.SlotValue.")
        return mapped

    @staticmethod
    def _loaded(mapped: Mapped) -> dict[str, oracles.Bits]:
        return {"/".join(key): oracles.bits(v.load()) for key, v in mapped.values.items()}

    @staticmethod
    def _state(request: MapRequest) -> dict[str, oracles.Bits]:
        source = request.source
        found = {name: oracles.bits(source.get(name)) for name in source.names()}
        return {**found, **state_of_program(source)}
