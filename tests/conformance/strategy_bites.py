"""Broken strategies, at least one for each check of ``StrategySuite``."""

from __future__ import annotations

from typing import Any

import torch

from refitkit.protocols import Mapped, MapRequest, SlotValue
from refitkit.recipe import TensorMap
from refitkit.testing import StrategySuite
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import plan_for
from tests.conformance.bites import Bite

SHAPES = {"a": (2, 3), "b": (3,), "c": (1,)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


class Plain:
    """A correct strategy, which maps a slot to the tensor of its name."""

    name: Any = "plain"
    priority: Any = 30

    def map(self, request: MapRequest) -> Any:
        have = request.source.names()
        values = {
            row.slot.key: self.value(row.slot, request)
            for row in request.wanted
            if row.slot.name in have
        }
        declined = {
            row.slot.key: f"the source has no {row.slot.name!r}"
            for row in request.wanted
            if row.slot.name not in have
        }
        return Mapped(values, declined)

    def value(self, slot: Any, request: MapRequest) -> Any:
        return SlotValue(slot, self.name, (slot.name,), self.load(slot, request))

    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: request.source.get(slot.name)


class Good(StrategySuite):
    strategy: type[Plain] = Plain

    def make_strategy(self) -> Any:
        return self.strategy()

    def make_request(self, seed: int, *lacking: str) -> MapRequest:
        module = FakeModule([OpenEngine("e", {n: torch.zeros(s) for n, s in SHAPES.items()})])
        plan = plan_for(module)
        given = {name: value for name, value in weights(seed).items() if name not in lacking}
        return MapRequest(plan, module, TensorMap(given), plan.ledger)

    def expected(self, seed: int) -> dict[tuple[str, str], torch.Tensor]:
        return {("e", name): value for name, value in weights(seed).items()}

    def make_lacking(self) -> MapRequest:
        return self.make_request(1, "b")


class Packs(Plain):
    """A correct strategy, which maps ``<layer>.qk`` to ``<layer>.q`` above ``<layer>.k``."""

    def map(self, request: MapRequest) -> Any:
        values, declined = {}, {}
        for row in request.wanted:
            parts = self.parts(row.slot)
            if all(self.is_usable(row.slot, part, request) for part in parts):
                load = self.load(row.slot, request)
                values[row.slot.key] = SlotValue(row.slot, self.name, parts, load)
            else:
                declined[row.slot.key] = "its parts are missing, or do not fit"
        return Mapped(values, declined)

    def parts(self, slot: Any) -> tuple[str, ...]:
        layer = slot.name.removesuffix("qk")
        return f"{layer}q", f"{layer}k"

    def is_usable(self, slot: Any, part: str, request: MapRequest) -> bool:
        if part not in request.source.names():
            return False
        info = request.source.info(part)
        return (info.dtype, info.shape) == (slot.dtype, (2, 3))

    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: torch.cat([request.source.get(part) for part in self.parts(slot)])


class GoodPacks(Good):
    """One slot that has two sources, which are no leaves of the plan."""

    strategy = Packs

    def request(self, weights: dict[str, torch.Tensor]) -> MapRequest:
        module = FakeModule([OpenEngine("e", {"l.qk": torch.zeros(4, 3)})])
        plan = plan_for(module, leaves=())
        return MapRequest(plan, module, TensorMap(weights), plan.ledger)

    def drawn(self, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {f"l.{part}": torch.randn(2, 3, generator=g) for part in "qk"}

    def make_request(self, seed: int, *lacking: str) -> MapRequest:
        return self.request(self.drawn(seed))

    def expected(self, seed: int) -> dict[tuple[str, str], torch.Tensor]:
        return {("e", "l.qk"): torch.cat(list(self.drawn(seed).values()))}

    def make_lacking(self) -> MapRequest:
        return self.request({"l.q": self.drawn(1)["l.q"]})


BITES: list[Bite] = []


def breaks(check: str, says: str, good: type[Good] = Good) -> Any:
    def note(strategy: type) -> type:
        suite = type(strategy.__name__, (good,), {"strategy": strategy})
        BITES.append(Bite(f"test_{check}", suite, says, good))
        return strategy

    return note


@breaks("it_has_a_name_and_a_priority", "name and priority are '' and 30")
class Nameless(Plain):
    name = ""


@breaks("it_has_a_name_and_a_priority", "name and priority change: ")
class Fickle(Plain):
    count = 0

    @property
    def priority(self) -> int:  # type: ignore[override]
        self.count += 1
        return self.count


@breaks("it_has_a_name_and_a_priority", "MappingStrategy: Mapless lacks members")
class Mapless(Plain):
    map = property(lambda _: (_ for _ in ()).throw(AttributeError()))  # type: ignore[assignment]


@breaks("values_are_bit_equal", "the value of 'e/a' differs from the right one")
class Rounds(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: request.source.get(slot.name).half().float()


@breaks("values_are_bit_equal", "'e/b' has no value: too small")
class Picky(Plain):
    def map(self, request: MapRequest) -> Any:
        found = super().map(request)
        values = {key: value for key, value in found.values.items() if key[1] != "b"}
        return Mapped(values, {("e", "b"): "too small"})


@breaks("values_fit_their_slots", r"'e/a' is float32 \(6,\), but the slot is float32 \(2, 3\)")
class Flattens(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: request.source.get(slot.name).reshape(-1)


@breaks("values_fit_their_slots", "the value of 'e/a' is float64")
class Widens(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: request.source.get(slot.name).double()


@breaks("values_fit_their_slots", r"values\['e/a'\] is a value for")
class Renames(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return super().value(slot.model_copy(update={"engine": "f"}), request)


@breaks(
    "values_name_their_strategy_and_sources", "'e/a' has strategy 'plain' and sources .'module.a',."
)
class NamesStrangers(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return SlotValue(slot, self.name, (f"module.{slot.name}",), self.load(slot, request))


@breaks("values_name_their_strategy_and_sources", "'e/a' has strategy 'recipe'")
class Poses(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return SlotValue(slot, "recipe", (slot.name,), self.load(slot, request))


class _AnswersAll(Plain):
    def map(self, request: MapRequest) -> Any:
        slots = [row.slot for row in request.plan.data.ledger]
        return Mapped({slot.key: self.value(slot, request) for slot in slots})


breaks(
    "rows_that_were_not_asked_for_are_not_answered", "a request for 'a' alone returned 'e/b', 'e/c'"
)(_AnswersAll)


@breaks("what_is_not_served_is_declined_with_a_reason", "'b' has neither a value nor a reason")
class Silent(Plain):
    def map(self, request: MapRequest) -> Any:
        return Mapped(super().map(request).values)


@breaks(
    "what_is_not_served_is_declined_with_a_reason", "rows have both a value and a reason: 'e/a'"
)
class Undecided(Plain):
    def map(self, request: MapRequest) -> Any:
        found = super().map(request)
        return Mapped(found.values, {**found.declined, ("e", "a"): "perhaps"})


@breaks("it_does_not_guess", "the source lacks a tensor, but every row has a value")
class Guesses(Plain):
    def map(self, request: MapRequest) -> Any:
        return Mapped({row.slot.key: self.value(row.slot, request) for row in request.wanted})

    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: torch.zeros(slot.shape)


@breaks("mapping_reads_no_tensors", "it read the tensors 'a', 'b', 'c'")
class Eager(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        tensor = request.source.get(slot.name)
        return lambda: tensor


@breaks("the_same_answer_twice", "a second load returned other values: 'e/a'")
class Drifts(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        counts = iter(range(100))
        return lambda: request.source.get(slot.name) + next(counts)


@breaks("the_same_answer_twice", "a second map returned other values: 'e/a'")
class TakesOut(Plain):
    def __init__(self) -> None:
        self.given: set[str] = set()

    def map(self, request: MapRequest) -> Any:
        found = super().map(request)
        values = {key: value for key, value in found.values.items() if key not in self.given}
        self.given |= set(values)
        return Mapped(values, {key: "given before" for key in found.values if key not in values})


@breaks("nothing_is_changed", "it changed the source or its program: 'a', 'b', 'c'")
class InPlace(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: request.source.get(slot.name).add_(1)


@breaks("nothing_is_changed", "it changed the plan")
class Rewrites(Plain):
    def map(self, request: MapRequest) -> Any:
        plan: Any = request.plan
        plan.data = plan.data.model_copy(update={"backend": "mine"})
        return super().map(request)


@breaks("values_are_bit_equal", "it returned a dict")
class Dicts(Plain):
    def map(self, request: MapRequest) -> Any:
        return super().map(request).values


@breaks("values_are_bit_equal", "one of the values is a Tensor")
class Tensors(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return request.source.get(slot.name)


@breaks(
    "values_depend_on_their_sources_only",
    "the value of 'e/a' names no sources, but reads 'a'",
)
class NamesNone(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return super().value(slot, request)._replace(sources=())


@breaks(
    "values_depend_on_their_sources_only",
    r"the value of 'e/b' names the sources \('b',\), but depends on other tensors",
)
class NamesOneOfTwo(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        get, more = request.source.get, float(slot.name == "b")
        return lambda: get(slot.name) + more * get("c")


@breaks(
    "values_depend_on_their_sources_only",
    r"the value of 'e/a' names the sources \(\), but depends on other tensors",
)
class PinsNothing(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return super().value(slot, request)._replace(sources=(), pinned=True)


@breaks(
    "identity_is_said_of_tensors_of_the_source",
    r"the value of 'e/a' has identity, but is no tensor of \('a',\)",
)
class ComputesIdentity(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        load = self.load(slot, request)
        return SlotValue(slot, self.name, (slot.name,), lambda: -load(), identity=True)


@breaks("formulas_can_be_compared", "cannot be hashed")
class ListsItsFormula(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return super().value(slot, request)._replace(formula=["as", "it", "is"])


@breaks("formulas_can_be_compared", "another one each time")
class NewFormulaEachTime(Plain):
    def value(self, slot: Any, request: MapRequest) -> Any:
        return super().value(slot, request)._replace(formula=object())


@breaks("values_name_their_strategy_and_sources", "'e/l.qk' has strategy 'plain'", GoodPacks)
@breaks("it_does_not_guess", "the source lacks a tensor, but every row has a value", GoodPacks)
class FillsUp(Packs):
    """Takes zeros for a missing ``k``."""

    def is_usable(self, slot: Any, part: str, request: MapRequest) -> bool:
        return (part.endswith("k") and part not in request.source.names()) or super().is_usable(
            slot, part, request
        )

    def load(self, slot: Any, request: MapRequest) -> Any:
        names = request.source.names()
        return lambda: torch.cat(
            [request.source.get(p) if p in names else torch.zeros(2, 3) for p in self.parts(slot)]
        )


class GoodPacksEnough(GoodPacks):
    """A request that lacks a tensor, and shows nothing of ``FillsUp``."""

    def make_lacking(self) -> MapRequest:
        return self.request({"l.k": self.drawn(1)["l.k"]})


breaks("it_does_not_guess", "without 'l.k', 'e/l.qk' got another value", GoodPacksEnough)(FillsUp)


@breaks(
    "requests_do_not_affect_one_another",
    "after other requests, 'e/b' are answered in another way than by a new strategy",
)
class RemembersNames(Plain):
    """Keeps the names of the first source."""

    def map(self, request: MapRequest) -> Any:
        self.names = getattr(self, "names", set(request.source.names()))
        found = super().map(request)
        values = {key: value for key, value in found.values.items() if key[1] in self.names}
        return Mapped(values, {r.slot.key: "-" for r in request.wanted if r.slot.key not in values})


@breaks("requests_do_not_affect_one_another", "after other requests, 'e/a', 'e/b', 'e/c' are answ")
class RemembersTheLast(Plain):
    """Every load reads the source of the last request."""

    def map(self, request: MapRequest) -> Any:
        self.last = request
        return super().map(request)

    def load(self, slot: Any, request: MapRequest) -> Any:
        return lambda: self.last.source.get(slot.name)


@breaks("requests_do_not_affect_one_another", "a new source got the values of a deleted one: 'e/a'")
class CachesById(Plain):
    def __init__(self) -> None:
        self.held: dict[Any, torch.Tensor] = {}

    def load(self, slot: Any, request: MapRequest) -> Any:
        key, get = (id(request.source), slot.name), request.source.get
        return lambda: self.held.setdefault(key, get(slot.name))


BUFFER = torch.zeros(2, 3)


@breaks("loaded_values_stay_as_they_are", "values changed when others were loaded: 'e/a'")
class ReusesMemory(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        room = BUFFER.reshape(-1)[: slot.count].view(slot.shape)
        return lambda: room.copy_(request.source.get(slot.name))


@breaks("sources_are_not_kept", "tensors of the source are kept: 'a', 'b', 'c'")
class KeepsSources(Plain):
    def map(self, request: MapRequest) -> Any:
        self.seen = request
        return super().map(request)


@breaks("sources_are_not_kept", "tensors of the source are kept: 'a', 'b', 'c'")
class KeepsTensors(Plain):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def load(self, slot: Any, request: MapRequest) -> Any:
        def load() -> torch.Tensor:
            self.seen.append(request.source.get(slot.name))
            return self.seen[-1].clone()

        return load


@breaks("nothing_is_changed", "it wrote to tensors of the source: 'a', 'b', 'c'")
class MasksInPlace(Plain):
    def load(self, slot: Any, request: MapRequest) -> Any:
        def load() -> torch.Tensor:
            found = request.source.get(slot.name)
            return found.masked_fill_(found.abs() < 1e-30, 0)

        return load


@breaks(
    "sources_that_do_not_fit_are_declined",
    r"'l.k' in float64 \(2, 3\) instead of float32 \(2, 3\) was made into a value of 'e/l.qk'",
    GoodPacks,
)
class Casts(Packs):
    def is_usable(self, slot: Any, part: str, request: MapRequest) -> bool:
        return part in request.source.names() and request.source.info(part).shape == (2, 3)

    def load(self, slot: Any, request: MapRequest) -> Any:
        load = super().load(slot, request)
        return lambda: load().float()


@breaks(
    "sources_that_do_not_fit_are_declined",
    r"'l.k' in float32 \(3, 2\) instead of float32 \(2, 3\) was made into a value of 'e/l.qk'",
    GoodPacks,
)
class CountsElements(Packs):
    def is_usable(self, slot: Any, part: str, request: MapRequest) -> bool:
        if part not in request.source.names():
            return False
        info = request.source.info(part)
        return (info.dtype, info.count) == (slot.dtype, 6)

    def load(self, slot: Any, request: MapRequest) -> Any:
        get = request.source.get
        return lambda: torch.cat([get(part).reshape(2, 3) for part in self.parts(slot)])


@breaks(
    "slots_of_other_layers_get_their_own_values",
    "values are missing or wrong: 'e/l.qk'",
    GoodPacks,
)
class OneForAll(Packs):
    """Every load reads the parts of the last slot."""

    def load(self, slot: Any, request: MapRequest) -> Any:
        self.last = slot
        return lambda: torch.cat([request.source.get(part) for part in self.parts(self.last)])
