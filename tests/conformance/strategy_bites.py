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


BITES: list[Bite] = []


def breaks(check: str, says: str) -> Any:
    def note(strategy: type) -> type:
        suite = type(strategy.__name__, (Good,), {"strategy": strategy})
        BITES.append(Bite(f"test_{check}", suite, says, Good))
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
