"""The stage ``map``: order of strategies, who serves, who declines, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.config import Config
from refitkit.errors import ConfigError, PluginError, UnmappedSlotError
from refitkit.host import make_host
from refitkit.model import CallRef, LedgerRow, PinnedRef, SlotState, SourceRef
from refitkit.pipeline.context import Context
from refitkit.pipeline.mapping import map_slots, require_all_slots
from refitkit.protocols import Mapped, MapRequest, SlotValue
from refitkit.recipe import TensorMap
from tests.fakes import (
    FakeModule,
    OpenEngine,
    guard_of,
    make_plan,
    make_slot,
    op_call,
    recipe_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

A, B, C = (make_slot(name) for name in "abc")
PLAN = make_plan([recipe_row(slot) for slot in (A, B, C)])
MODULE = FakeModule([OpenEngine("model", {name: torch.zeros(2) for name in "abc"})])


class Strategy:
    """Serves some slots by name and declines the others, if asked."""

    def __init__(
        self,
        name: str,
        serves: Iterable[str],
        *,
        priority: int = 1,
        declines: bool = False,
        answer: Callable[[MapRequest], Mapped] | None = None,
    ) -> None:
        self.name, self.priority = name, priority
        self.serves, self.declines, self.answer = set(serves), declines, answer
        self.asked: list[tuple[str, ...]] = []

    def map(self, request: MapRequest) -> Mapped:
        self.asked.append(tuple(row.slot.name for row in request.wanted))
        if self.answer is not None:
            return self.answer(request)
        slots = {row.slot.name: row.slot for row in request.wanted}
        mine = {n: s for n, s in slots.items() if n in self.serves}
        rest = {s.key: "not mine" for n, s in slots.items() if n not in mine and self.declines}
        return Mapped({s.key: value_for(s, self.name) for s in mine.values()}, rest)


class Strategies:
    """A plugin that offers strategies."""

    def __init__(self, *strategies: Any, name: str = "strategies-plugin") -> None:
        self.name, self.strategies = name, strategies

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> tuple[Any, ...]:
        return self.strategies


def value_for(slot: Any, strategy: str) -> SlotValue:
    return SlotValue(slot, strategy, (slot.name,), lambda: torch.ones(2))


def mapped(*plugins: object, source: Any = None, plan: Any = PLAN, **settings: Any) -> Any:
    source = TensorMap(source or {})
    config = Config(**settings)
    return map_slots(Context(make_host(config, plugins), config), plan, MODULE, source, None)


def served(mapping: Any) -> dict[str, str]:
    return {row.slot: row.strategy for row in mapping.summary.rows}


def test_strategies_are_tried_by_priority_for_what_is_left() -> None:
    first, second = Strategy("first", "b", priority=1), Strategy("second", "bc", priority=20)
    mapping = mapped(Strategies(second, first), source={"a": torch.ones(2)})
    assert served(mapping) == {"a": "recipe", "b": "first", "c": "second"}
    assert first.asked == [("a", "b", "c")]
    assert second.asked == [("c",)]


def test_nobody_is_asked_once_all_is_served() -> None:
    last = Strategy("last", "abc", priority=20)
    mapped(Strategies(last), source=dict.fromkeys("abc", torch.ones(2)))
    assert last.asked == []


def test_the_configured_order_counts_and_leaves_others_out() -> None:
    one, two = Strategy("one", "ab", priority=1), Strategy("two", "ab", priority=2)
    mapping = mapped(Strategies(one, two), strategies=("two", "one"))
    assert served(mapping) == {"a": "two", "b": "two", "c": ""}
    assert two.asked == [("a", "b", "c")]
    assert one.asked == [("c",)]
    only = mapped(Strategies(one, two), strategies=("one",), source={"c": torch.ones(2)})
    assert served(only) == {"a": "one", "b": "one", "c": ""}


def test_a_configured_strategy_that_nobody_offers() -> None:
    with pytest.raises(ConfigError) as info:
        mapped(Strategies(Strategy("one", "")), strategies=("noe", "one", "tow"))
    assert [p.subject for p in info.value.problems] == ["noe", "tow"]
    assert "one, rebuild, recipe" in info.value.hint


def test_two_strategies_of_one_name() -> None:
    plugins = [Strategies(Strategy("x", ""), name="p"), Strategies(Strategy("x", ""), name="q")]
    with pytest.raises(PluginError, match=r"'p' and 'q' both offer 'x'.*mapping_strategies"):
        mapped(*plugins)


def test_a_strategy_of_a_built_in_name() -> None:
    with pytest.raises(PluginError, match=r"'strategies' and 'p' both offer 'recipe'"):
        mapped(Strategies(Strategy("recipe", ""), name="p"))


# -- two plugins, one slot ----------------------------------------------------------------------


def test_two_plugins_with_a_value_for_one_slot_are_an_error_that_names_both() -> None:
    one, two = Strategy("one", "ab", priority=7), Strategy("two", "bc", priority=7)
    with pytest.raises(PluginError, match=r"(?s)'one' of 'p' and 'two' of 'q'") as info:
        mapped(Strategies(one, name="p"), Strategies(two, name="q"))
    assert [problem.subject for problem in info.value.problems] == ["model/b"]
    assert "'one', 'two'" in info.value.hint
    assert "Config.strategies" in info.value.hint
    assert "--no-plugin" in info.value.hint


def test_all_slots_that_are_claimed_twice_are_listed() -> None:
    plugins = [Strategies(Strategy(n, "abc", priority=7), name=f"p-{n}") for n in ("x", "y", "z")]
    with pytest.raises(PluginError) as info:
        mapped(*plugins)
    assert {problem.subject for problem in info.value.problems} == {"model/a", "model/b", "model/c"}
    told = {problem.found for problem in info.value.problems}
    assert told == {"'x' of 'p-x' and 'y' of 'p-y'", "'y' of 'p-y' and 'z' of 'p-z'"}


def test_plugins_of_one_priority_may_serve_different_slots() -> None:
    one, two = Strategy("one", "a", priority=7), Strategy("two", "bc", priority=7)
    mapping = mapped(Strategies(one, name="p"), Strategies(two, name="q"))
    assert served(mapping) == {"a": "one", "b": "two", "c": "two"}


def test_a_built_in_and_a_plugin_of_its_priority_clash_too() -> None:
    mine = Strategies(Strategy("mine", "a", priority=10), name="p")
    with pytest.raises(PluginError, match=r"'recipe' of 'strategies' and 'mine' of 'p'"):
        mapped(mine, source={"a": torch.ones(2)})


def test_strategies_of_one_plugin_and_one_priority_go_by_their_order() -> None:
    one, two = Strategy("one", "ab", priority=7), Strategy("two", "bc", priority=7)
    mapping = mapped(Strategies(one, two))
    assert served(mapping) == {"a": "one", "b": "one", "c": "two"}
    assert two.asked == [("c",)]


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_a_configured_order_settles_it(order: tuple[str, str]) -> None:
    one, two = Strategy("one", "abc", priority=7), Strategy("two", "abc", priority=7)
    mapping = mapped(Strategies(one, name="p"), Strategies(two, name="q"), strategies=order)
    assert set(served(mapping).values()) == {order[0]}


def test_built_in_strategies_have_an_order() -> None:
    offers = make_host().offers("refitkit_mapping_strategies").values()
    assert {offer.plugin for offer in offers} == {"strategies", "torch_tensorrt"}
    priorities = [offer.item.priority for offer in offers]
    assert len(set(priorities)) == len(priorities) == 3


def test_reasons_of_all_that_declined_are_told() -> None:
    shy, choosy = Strategy("shy", "", declines=True), Strategy("choosy", "b", declines=True)
    mapping = mapped(Strategies(shy, choosy))
    rows = {row.slot: row for row in mapping.summary.rows}
    assert "shy: not mine" in rows["a"].reason
    assert "choosy: not mine" in rows["a"].reason
    assert "recipe: the source has no 'a'" in rows["a"].reason
    assert rows["b"].strategy == "choosy"
    with pytest.raises(UnmappedSlotError) as info:
        require_all_slots(mapping, TensorMap({}))
    assert [p.subject for p in info.value.problems] == ["model/a", "model/c"]
    assert "choosy: not mine" in info.value.problems[0].hint
    assert "partial=True" in info.value.hint


def test_all_served_is_enough() -> None:
    require_all_slots(mapped(Strategies(Strategy("all", "abc"))), TensorMap({}))


def test_frozen_rows_need_nobody() -> None:
    frozen = LedgerRow(slot=B, state=SlotState.FROZEN, reason="a literal")
    strategy = Strategy("mine", "a")
    mapping = mapped(Strategies(strategy), plan=make_plan([recipe_row(A), frozen]))
    assert strategy.asked == [("a",)]
    require_all_slots(mapping, TensorMap({}))


def test_another_strategy_may_serve_an_unmapped_slot() -> None:
    unmapped = LedgerRow(slot=B, state=SlotState.UNMAPPED, reason="nobody knows")
    plan = make_plan([unmapped])
    with pytest.raises(UnmappedSlotError, match="nobody knows"):
        require_all_slots(mapped(plan=plan), TensorMap({}))
    mapping = mapped(Strategies(Strategy("knows", "b", priority=99)), plan=plan)
    assert served(mapping) == {"b": "knows"}


def answering(answer: Callable[[MapRequest], Mapped]) -> Strategies:
    return Strategies(Strategy("odd", "", answer=answer))


@pytest.mark.parametrize(("strategy", "sources"), [(7, ("a",)), ("odd", (7,))])
def test_values_of_what_has_no_name_are_refused(strategy: Any, sources: Any) -> None:
    """The report, which is made after the commit, tells of them."""
    value = SlotValue(A, strategy, sources, lambda: torch.zeros(2))
    with pytest.raises(PluginError, match=r"'odd'.*are not strings"):
        mapped(answering(lambda _: Mapped({A.key: value})))


def test_values_that_nobody_asked_for_are_refused() -> None:
    foreign = make_slot("z")
    with pytest.raises(PluginError, match=r"'odd'.*not requested.*model/z"):
        mapped(answering(lambda request: Mapped({foreign.key: value_for(foreign, "odd")})))


def test_a_value_for_another_slot_than_its_key_says_is_refused() -> None:
    with pytest.raises(PluginError, match=r"'odd'.*model/a"):
        mapped(answering(lambda request: Mapped({A.key: value_for(B, "odd")})))


def test_a_strategy_that_fails_is_named() -> None:
    def fails(request: MapRequest) -> Mapped:
        raise ValueError("the reason")

    with pytest.raises(PluginError, match=r"'odd'.*ValueError: the reason") as info:
        mapped(answering(fails))
    assert isinstance(info.value.__cause__, ValueError)


def test_an_error_of_refitkit_passes_through() -> None:
    error = ConfigError("as it is")

    def fails(request: MapRequest) -> Mapped:
        raise error

    with pytest.raises(ConfigError) as info:
        mapped(answering(fails))
    assert info.value is error


def test_mapping_reads_no_weights() -> None:
    class Source(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            raise AssertionError(f"{fqn} was read")

    config = Config()
    source = Source(dict.fromkeys("abc", torch.ones(2)))
    mapping = map_slots(Context(make_host(config), config), PLAN, MODULE, source, None)
    assert len(mapping.values) == 3


# -- guards -----------------------------------------------------------------------------------

HELD = LedgerRow(slot=B, state=SlotState.FROZEN, value=PinnedRef(name="b"), reason="a literal")
LITERAL = LedgerRow(slot=C, state=SlotState.FROZEN, reason="a literal that nobody needs")
GUARDED = make_plan(
    [recipe_row(A), HELD, LITERAL],
    guards=[guard_of(SourceRef(fqn="a"), torch.ones(2), "bool() of a")],
    pinned={"b": torch.ones(2)},
)
HOLDS, BREAKS = {"a": torch.ones(2)}, {"a": torch.zeros(2)}


def test_with_guards_that_hold_frozen_slots_are_served_from_the_plan() -> None:
    rebuilds = Strategy("rebuilds", "abc", priority=99)
    mapping = mapped(Strategies(rebuilds), source=HOLDS, plan=GUARDED)
    assert served(mapping) == {"a": "recipe", "b": "recipe", "c": ""}
    assert rebuilds.asked == []


def test_with_a_broken_guard_another_strategy_serves_all_slots() -> None:
    rebuilds = Strategy("rebuilds", "abc", priority=99)
    mapping = mapped(Strategies(rebuilds), source=BREAKS, plan=GUARDED)
    assert served(mapping) == dict.fromkeys("abc", "rebuilds")
    require_all_slots(mapping, TensorMap(BREAKS))
    assert all(
        "recipe: " in row.reason and "bool() of a" in row.reason for row in mapping.summary.rows
    )


def test_of_several_guards_those_that_can_be_told_are() -> None:
    plan = make_plan(
        [recipe_row(A), recipe_row(B)],
        calls=[op_call("neg.default", "@a"), op_call("neg.default", "@b")],
        guards=[guard_of(CallRef(call=n), -torch.ones(2), f"bool() of {n}") for n in (0, 1)],
    )
    mapping = mapped(source={"b": torch.zeros(2)}, plan=plan)
    with pytest.raises(UnmappedSlotError) as info:
        require_all_slots(mapping, TensorMap({"b": torch.zeros(2)}))
    first, second, *_ = info.value.problems
    assert (first.subject, first.hint) == ("a", "the source has no 'a'")
    assert (second.subject, second.found, second.hint) == ("b", "[-0.0, -0.0]", "bool() of 1")


def test_a_broken_guard_that_nobody_else_can_serve_is_told_once() -> None:
    mapping = mapped(source=BREAKS, plan=GUARDED)
    with pytest.raises(UnmappedSlotError) as info:
        require_all_slots(mapping, TensorMap(BREAKS))
    guard, *slots = info.value.problems
    assert (guard.subject, guard.kind, guard.hint) == ("a", "guard", "bool() of a")
    assert (guard.found, guard.wanted) == ("[0.0, 0.0]", "[1.0, 1.0]")
    assert [p.subject for p in slots] == ["model/a", "model/b", "model/c"]
    assert "torch.export.export" in info.value.hint
    assert "refitkit.plan" in info.value.hint


@pytest.mark.parametrize("answer", [None, {}, Mapped({A.key: 3})], ids=str)  # type: ignore[dict-item]
def test_a_strategy_that_answers_something_else(answer: Any) -> None:
    plugin = Strategies(Strategy("odd", (), answer=lambda _: answer))
    with pytest.raises(PluginError, match="'odd'"):
        mapped(plugin)
