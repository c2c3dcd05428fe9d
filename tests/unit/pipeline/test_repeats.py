"""Refits like the last one: mapped once, and right with all that can differ."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.strategies.recipe import RecipeStrategy
from refitkit.model import CallRef, OpCall, PinnedRef, SourceRef, Tensor
from refitkit.program.bits import same_bits
from refitkit.protocols import Mapped, SlotValue, SteadyValues
from refitkit.recipe import TensorMap
from refitkit.recipe.replay import BatchStep, CallStep, _Run
from refitkit.recipe.steady import SteadyTensors
from tests.fakes import (
    FakeModule,
    OpenEngine,
    call_row,
    guard_of,
    leaf_for,
    make_module,
    make_plan,
    make_slot,
    op_call,
    pipeline_with,
    recipe_row,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class World:
    """A loaded fake, and how often a strategy was asked.

    Attributes:
        asked: Number of times.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *plugins: object, **settings: Any) -> None:
        self.module = make_module(2)
        self.pipeline = pipeline_with(*plugins, **settings)
        self.compiled = self.pipeline.load(self.module)
        self.asked = 0
        real = RecipeStrategy.map

        def counted(strategy: RecipeStrategy, request: Any) -> Mapped:
            self.asked += 1
            return real(strategy, request)

        patch.setattr(RecipeStrategy, "map", counted)

    def weights(self, fill: float) -> dict[str, torch.Tensor]:
        return weights_for(self.module, fill)

    def refit(self, weights: Any, **options: Any) -> Any:
        return self.pipeline.refit(self.compiled, weights, **options)

    def holds(self, weights: dict[str, torch.Tensor]) -> bool:
        found = self.module.by_slot()
        return all(same_bits(found[name], value) for name, value in weights.items())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_refits_to_other_tensors_are_mapped_once(world: World) -> None:
    reports = []
    for fill in (10.0, 20.0, 30.0):
        weights = world.weights(fill)
        reports.append(world.refit(weights).report)
        assert world.holds(weights)
    assert world.asked == 1
    assert reports[0].ledger == reports[2].ledger
    assert reports[0].bytes_written == reports[2].bytes_written


def as_module(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with parameters of these names."""
    holder = torch.nn.Module()
    for name, value in weights.items():
        child = holder
        *path, last = name.split(".")
        for part in path:
            if not hasattr(child, part):
                child.add_module(part, torch.nn.Module())
            child = getattr(child, part)
        child.register_parameter(last, torch.nn.Parameter(value))
    return holder


def test_a_module_may_follow_a_state_dict(world: World) -> None:
    holder = as_module(world.weights(7.0))
    world.refit(holder)
    world.refit({name: value.detach() + 1 for name, value in holder.state_dict().items()})
    with torch.no_grad():
        for value in holder.parameters():
            value.add_(2)
    report = world.refit(holder).report
    assert world.holds(dict(holder.state_dict()))
    assert "Module" in report.source


def test_no_tensor_is_kept_alive(world: World) -> None:
    world.refit(world.weights(1.0))
    weights = world.weights(2.0)
    seen = [weakref.ref(value) for value in weights.values()]
    world.refit(weights)
    del weights
    gc.collect()
    assert [one() for one in seen] == [None] * len(seen)


def test_no_tensor_is_kept_alive_by_a_refit_that_was_refused(world: World) -> None:
    world.refit(world.weights(1.0))
    weights = world.weights(2.0)
    weights["e1.bias"][0] = float("nan")
    seen = [weakref.ref(value) for value in weights.values()]
    with pytest.raises(refitkit.WeightMismatchError, match="finite"):
        world.refit(weights)
    del weights
    gc.collect()
    assert [one() for one in seen] == [None] * len(seen)
    good = world.weights(3.0)
    world.refit(good)
    assert world.holds(good)


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "dtype": lambda w: w.update({"e0.bias": w["e0.bias"].double()}),
    "shape": lambda w: w.update({"e0.weight": w["e0.weight"].T.contiguous()}),
    "missing": lambda w: w.pop("e1.bias"),
    "unexpected": lambda w: w.update(more=torch.ones(2)),
    "no tensor": lambda w: w.update({"e0.bias": [1.0, 2.0]}),
    "without data": lambda w: w["e0.weight"].untyped_storage().resize_(0),
    "meta": lambda w: w.update({"e0.bias": w["e0.bias"].to("meta")}),
    "not finite": lambda w: w["e1.weight"].fill_(float("inf")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_refused_at_first_is_refused_later(
    change: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = World(monkeypatch)
    problems = []
    for one in (first, world):
        if one is world:
            one.refit(one.weights(1.0))
            one.refit(one.weights(2.0))
        before = one.module.by_slot()
        weights = one.weights(3.0)
        CHANGES[change](weights)
        with pytest.raises(refitkit.RefitError) as info:
            one.refit(weights)
        assert one.holds(before)
        problems.append((type(info.value), info.value.problems))
    assert problems[0] == problems[1]
    good = world.weights(4.0)
    world.refit(good)
    assert world.holds(good)


LIKE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other strides": lambda value: value.T.contiguous().T if value.dim() > 1 else value,
    "negative bits": torch._neg_view,
    "parameters": torch.nn.Parameter,
    "views": lambda value: torch.stack([value, value])[1],
    "expanded": lambda value: value[..., :1].expand(value.shape),
}


@pytest.mark.parametrize("kind", LIKE)
def test_tensors_of_every_kind_may_follow(kind: str, world: World) -> None:
    for fill in (1.0, 2.0):
        world.refit(world.weights(fill))
    for fill in (3.0, 4.0, 5.0):
        weights = {name: LIKE[kind](value) for name, value in world.weights(fill).items()}
        world.refit(weights)
        assert world.holds({name: value.detach().clone() for name, value in weights.items()})
    world.refit(world.weights(6.0))
    assert world.holds(world.weights(6.0))


def test_partial_and_delta_refits_come_in_between(world: World) -> None:
    world.refit(world.weights(1.0))
    world.refit({"e0.bias": torch.full((2,), 50.0)}, partial=True)
    assert world.holds({**world.weights(1.0), "e0.bias": torch.full((2,), 50.0)})
    world.refit(world.weights(2.0), delta=True)
    assert world.holds(world.weights(2.0))
    result = world.refit(world.weights(3.0))
    assert world.holds(world.weights(3.0))
    result.undo()
    assert world.holds(world.weights(2.0))
    world.refit(world.weights(4.0))
    assert world.holds(world.weights(4.0))


def test_another_pipeline_maps_by_itself(world: World) -> None:
    world.refit(world.weights(1.0))
    other = pipeline_with(check_finite=False)
    weights = world.weights(2.0)
    weights["e0.bias"][0] = float("nan")
    other.refit(world.compiled, weights)
    assert world.holds(weights)
    assert world.asked == 2


def test_another_plan_is_followed(world: World) -> None:
    world.refit(world.weights(1.0))
    plan = world.compiled.plan
    assert plan is not None
    swapped = {"e0.bias": "e1.bias", "e1.bias": "e0.bias"}
    rows = [
        recipe_row(row.slot, swapped.get(row.slot.name, row.slot.name)) for row in plan.data.ledger
    ]
    weights = world.weights(2.0)
    weights["e0.bias"] = weights["e0.bias"] + 5
    world.refit(weights, plan=make_plan(rows))
    exchanged = {name: weights[swapped.get(name, name)] for name in weights}
    assert world.holds(exchanged)
    world.refit(weights)
    assert world.holds(weights)


class Picky:
    """A strategy of a plugin, which gives a value where a weight is negative."""

    name, priority = "picky", 1

    def map(self, request: Any) -> Mapped:
        self.asked = getattr(self, "asked", 0) + 1
        return Mapped({}, {})


class PickyPlugin:
    name = "picky"

    def __init__(self) -> None:
        self.strategy = Picky()

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Picky]:
        return [self.strategy]


class Checks:
    """A plugin that checks all weights, of each refit."""

    name = "seeing"

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.sources: list[Any] = []
        self.same: list[bool] = []

    @refitkit.hookimpl
    def refitkit_check(self, source: Any, same_headers: bool) -> list[Any]:
        self.seen.append(float(source.get("e0.bias")[0]))
        self.sources.append(source)
        self.same.append(same_headers)
        return []


def test_strategies_and_checks_of_plugins_are_asked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picky, checks = PickyPlugin(), Checks()
    world = World(monkeypatch, picky, checks)
    for fill in (1.0, 2.0, 3.0):
        world.refit(world.weights(fill))
    assert picky.strategy.asked == 3
    assert checks.seen == [float(world.weights(fill)["e0.bias"][0]) for fill in (1.0, 2.0, 3.0)]


def test_a_check_gets_the_weights_that_the_user_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks()
    world = World(monkeypatch, checks)
    fills = (1.0, 2.0, 3.0)
    for fill in fills:
        world.refit(world.weights(fill))
    assert world.asked == 1
    assert checks.seen == [float(world.weights(fill)["e0.bias"][0]) for fill in fills]
    # a plugin may keep a source, and each refit has its own
    kept = [float(source.get("e0.bias")[0]) for source in checks.sources]
    assert kept == checks.seen
    assert checks.same == [False, True, True]


def test_a_check_of_a_live_module_sees_what_no_state_dict_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = Checks()
    world = World(monkeypatch, checks)
    for fill in (1.0, 2.0, 3.0):
        holder = as_module(world.weights(fill))
        holder.register_buffer("mask", torch.ones(1), persistent=False)
        world.refit(holder)
    assert [list(source.left_out) for source in checks.sources] == [["mask"]] * 3


class OwnRecipe:
    """A strategy of another plugin that is called as the built-in one, and reads at once."""

    name, priority = "recipe", 10

    def map(self, request: Any) -> Mapped:
        values = {}
        for row in request.wanted:
            tensor = request.source.get(row.slot.name)
            values[row.slot.key] = SlotValue(
                row.slot, "recipe", (row.slot.name,), lambda t=tensor: t, identity=True
            )
        return Mapped(values, {})


class OwnPlugin:
    name = "own"

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[OwnRecipe]:
        return [OwnRecipe()]


def test_a_strategy_of_the_same_name_is_asked_each_time() -> None:
    module = make_module(2)
    pipeline = pipeline_with(OwnPlugin(), no_plugins={"strategies"})
    compiled = pipeline.load(module)
    for fill in (1.0, 2.0, 3.0):
        weights = weights_for(module, fill)
        pipeline.refit(compiled, weights)
        assert same_bits(module.by_slot()["e0.bias"], weights["e0.bias"])


def test_a_source_that_lost_an_entry_is_refused_as_at_first(world: World) -> None:
    weights = world.weights(1.0)
    source = TensorMap(weights)
    world.refit(source)
    del weights["e0.bias"]
    before = world.module.by_slot()
    with pytest.raises(refitkit.RefitError):
        world.refit(source)
    assert world.holds(before)


def test_nobody_can_change_the_values_that_come_again(world: World) -> None:
    seen: list[Any] = []
    engine = world.module.engines["e0"]
    real = engine.stage
    engine.stage = lambda values: (seen.append(values), real(values))[1]  # type: ignore[method-assign]
    for fill in (1.0, 2.0, 3.0):
        world.refit(world.weights(fill))
    assert seen[1] is seen[2]
    assert isinstance(seen[1], SteadyValues)
    with pytest.raises(AttributeError):
        seen[1].clear()
    assert list(seen[1]) == [seen[1][0], seen[1][1]] == [*seen[1][:2]]


def test_an_interrupted_refit_is_not_repeated(world: World) -> None:
    world.refit(world.weights(1.0))
    engine = world.module.engines["e1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.refit(world.weights(2.0))
    assert world.compiled.last_mapping is None
    assert world.holds(world.weights(1.0))
    world.refit(world.weights(3.0))
    assert world.holds(world.weights(3.0))


def test_a_check_may_replace_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replacing:
        name = "replacing"

        @refitkit.hookimpl
        def refitkit_check(self, source: Any) -> list[Any]:
            given["e0.bias"] = source.get("e0.bias") + 100
            return []

    world = World(monkeypatch, Replacing())
    for fill in (1.0, 2.0, 3.0):
        given = world.weights(fill)
        world.refit(given)
        assert world.holds(given)
        assert given["e0.bias"][0] > 100


def test_values_cannot_be_loaded_after_their_refit(world: World) -> None:
    kept: list[Any] = []
    engine = world.module.engines["e0"]
    real = engine.stage
    engine.stage = lambda values: (kept.append(values), real(values))[1]  # type: ignore[method-assign]
    for fill in (1.0, 2.0):
        world.refit(world.weights(fill))
    with pytest.raises(refitkit.SourceError, match="its refit has ended"):
        kept[-1][0].load()


def interrupted(_values: Any) -> Any:
    raise KeyboardInterrupt


# -- mappings that depend on more than plan and headers -------------------------------------------

ROOT, W = make_slot("root"), make_slot("w")
LEAVES = [leaf_for(ROOT, fqn="var"), leaf_for(W)]
SQRT = [op_call("sqrt.default", "@var")]
PLANS = {
    "taken": make_plan([recipe_row(ROOT, "var"), recipe_row(W)], leaves=LEAVES),
    "computed": make_plan([call_row(ROOT, 0, "var"), recipe_row(W)], leaves=LEAVES, calls=SQRT),
    "guarded": make_plan(
        [recipe_row(ROOT, "var"), recipe_row(W)],
        leaves=LEAVES,
        guards=(guard_of(SourceRef(fqn="w"), torch.ones(2)),),
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_only_what_follows_from_headers_is_kept(kind: str) -> None:
    pipeline = pipeline_with()
    module = FakeModule([OpenEngine("model", {"root": torch.ones(2), "w": torch.ones(2)})])
    compiled = pipeline.load(module)
    for number in (4.0, 9.0, 16.0):
        weights = {"var": torch.full((2,), number), "w": torch.ones(2)}
        pipeline.refit(compiled, weights, plan=PLANS[kind], verify="none")
        wanted = number**0.5 if kind == "computed" else number
        assert module.by_slot()["root"].tolist() == [wanted] * 2
        assert (compiled.last_mapping is not None) == (kind != "guarded")
    if kind == "guarded":
        other = {"var": torch.ones(2), "w": torch.zeros(2)}
        with pytest.raises(refitkit.UnmappedSlotError):
            pipeline.refit(compiled, other, plan=PLANS[kind], verify="none")


@pytest.mark.parametrize("option", ["partial", "delta", "reset_state"])
def test_the_mapping_of_an_unusual_refit_is_not_kept(option: str, world: World) -> None:
    world.refit(world.weights(1.0))
    assert world.compiled.last_mapping is not None
    world.refit(world.weights(2.0), **{option: True})
    assert world.compiled.last_mapping is None
    assert world.holds(world.weights(2.0))


# -- tensors whose headers say all that matters ---------------------------------------------------


class Subclass(torch.Tensor):
    """Runs code of its own when it is asked for an attribute."""


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def cut_off() -> torch.Tensor:
    value = torch.ones(4)[2:]
    value.untyped_storage().resize_(12)
    return value


ODD: dict[str, Callable[[], Any]] = {
    "nested": nested,
    "cut off": cut_off,
    "strided": lambda: torch.ones(3, 2).T,
    "negated": lambda: torch._neg_view(torch.ones(2, 3)),
    "conjugated": lambda: torch.ones(2, 3, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "a subclass": lambda: torch.ones(2, 3).as_subclass(Subclass),
    "a list": lambda: [1.0],
}


@pytest.mark.parametrize("kind", ["nested", "cut off"])
def test_odd_tensors_are_refused_as_at_first(kind: str, world: World) -> None:
    for refits in (0, 2):
        for fill in range(refits):
            world.refit(world.weights(float(fill)))
        weights = {**world.weights(5.0), "e0.bias": ODD[kind]()}
        with pytest.raises(refitkit.WeightMismatchError, match="does not fit"):
            world.refit(weights)


@pytest.mark.parametrize("kind", ODD)
def test_sources_with_odd_entries_are_not_steady(kind: str) -> None:
    plain = {"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(2))}
    assert SteadyTensors.of(TensorMap(plain)) is not None
    assert SteadyTensors.of(TensorMap({**plain, "c": ODD[kind]()})) is None


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_not_taken(kind: str) -> None:
    dtype = torch.complex64 if kind == "conjugated" else torch.float32
    shape = {"strided": (2, 3), "cut off": (2,)}.get(kind, (2, 3))
    steady = SteadyTensors.of(TensorMap({"a": torch.ones(shape, dtype=dtype)}))
    assert steady is not None
    assert steady.take(TensorMap({"a": torch.zeros(shape, dtype=dtype)}))
    assert not steady.take(TensorMap({"a": ODD[kind]()}))


def test_tied_tensors_are_taken_if_the_others_were_tied() -> None:
    one, two, three = (torch.full((2, 3), float(n)) for n in range(3))
    tied = SteadyTensors.of(TensorMap({"a": one, "b": two, "c": one}))
    apart = SteadyTensors.of(TensorMap({"a": one, "b": two, "c": three}))
    assert tied is not None
    assert apart is not None
    for taken, steady in ((True, tied), (False, apart)):
        assert steady.take(TensorMap({"a": two, "b": one, "c": two})) == taken
        assert steady.take(TensorMap({"a": two, "b": one, "c": three})) != taken
        assert not steady.take(TensorMap({"a": two, "b": one, "c": one})) or not taken


def test_tensors_of_a_function_transform_are_not_taken() -> None:
    steady = SteadyTensors.of(TensorMap({"a": torch.ones(2, 3)}))
    assert steady is not None
    taken = []

    def note(value: torch.Tensor) -> torch.Tensor:
        taken.append(steady.take(TensorMap({"a": value})))
        return value

    torch.func.vmap(note)(torch.ones(4, 2, 3))
    assert taken == [False]


def test_a_torch_without_that_comparison_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = TensorMap({"a": torch.ones(2)})
    assert SteadyTensors.of(source) is not None
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert SteadyTensors.of(source) is None


def test_steady_tensors_keep_none_alive() -> None:
    value = torch.ones(2, 3)
    steady = SteadyTensors.of(TensorMap({"a": value}))
    assert steady is not None
    steady.drop()
    kept = weakref.ref(value)
    del value
    gc.collect()
    assert kept() is None


def test_memory_that_was_freed_is_no_steady_tensor() -> None:
    value = torch.ones(2, 3)
    value.untyped_storage().resize_(8)
    assert SteadyTensors.of(TensorMap({"a": value})) is None


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(2, 3).double(), "b": torch.ones(2)},
        {"a": torch.ones(3, 2), "b": torch.ones(2)},
        {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.ones(2)},
        {"a": torch.ones(2, 3)},
        {"a": torch.ones(2, 3), "c": torch.ones(2)},
    ],
)
def test_tensors_with_other_headers_are_not_alike(other: dict[str, torch.Tensor]) -> None:
    first = SteadyTensors.of(TensorMap({"a": torch.ones(2, 3), "b": torch.ones(2)}))
    second = SteadyTensors.of(TensorMap(other))
    assert first is not None
    assert second is not None
    assert not first.take(TensorMap(other))
    assert not second.take(TensorMap({"a": torch.ones(2, 3), "b": torch.ones(2)}))
    assert second.get("a").data_ptr() == other["a"].data_ptr()


def test_tensors_that_were_given_away_are_not_like_others() -> None:
    given, kept = (TensorMap({"a": torch.ones(2)}) for _ in "ab")
    given.donate()
    first, second = SteadyTensors.of(given), SteadyTensors.of(kept)
    assert first is not None
    assert second is not None
    assert not first.take(kept)
    assert not second.take(given)
    assert first.gives_away("a")


class Offering:
    """A plugin that notes what it is asked for."""

    name = "offering"

    def __init__(self) -> None:
        self.asked: list[str] = []

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Any]:
        self.asked.append("strategies")
        return []

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> list[Any]:
        self.asked.append("verifiers")
        return []

    @refitkit.hookimpl
    def refitkit_weight_transforms(self) -> list[Any]:
        self.asked.append("transforms")
        return []


class Fussy:
    """A plugin whose weights have entries, and whose verifiers cannot be had."""

    name = "fussy"

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: Any) -> None:
        if isinstance(source, dict):
            next(iter(source))

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> list[Any]:
        raise RuntimeError("no verifiers here")


def test_warming_passes_over_plugins_that_fail() -> None:
    compiled = pipeline_with(Fussy()).load(make_module(), warm=True)
    compiled.warm()


@pytest.mark.parametrize("name", ["save", "load", "refit", "verify", "compile", "restore"])
def test_verbs_say_what_cannot_be_done(name: str) -> None:
    assert hasattr(getattr(refitkit.Pipeline, name), "__wrapped__")


def test_warming_asks_plugins_for_what_a_refit_needs() -> None:
    offering = Offering()
    compiled = pipeline_with(offering).load(make_module())
    assert offering.asked == []
    compiled.warm()
    assert sorted(offering.asked) == ["strategies", "transforms", "verifiers"]


# -- values that are computed ---------------------------------------------------------------------

A, B = make_slot("a"), make_slot("b")
TIED = [leaf_for(A, fqn="x"), leaf_for(A, fqn="x2")]


class Computing:
    """A module with one engine, refitted by a plan.

    Attributes:
        given: What the engine was given in the last refit, by slot.
        runs: Number of calls of the plan in the last refit.
    """

    def __init__(self, plan: refitkit.RefitPlan, patch: pytest.MonkeyPatch) -> None:
        self.plan, self.runs = plan, 0
        self.given: dict[str, SlotValue] = {}
        live = {row.slot.name: torch.ones(2) for row in plan.ledger}
        self.engine = OpenEngine("model", live)
        self.module = FakeModule([self.engine])
        self.pipeline = pipeline_with()
        self.compiled = self.pipeline.load(self.module)
        self.stage = self.engine.stage
        do = _Run._do
        patch.setattr(_Run, "_do", lambda run, step: self._counted(do, run, step))
        patch.setattr(self.engine, "stage", self._stage)

    def _counted(self, do: Any, run: Any, step: Any) -> None:
        self.runs += isinstance(step, CallStep | BatchStep)
        do(run, step)

    def _stage(self, values: Any) -> Any:
        self.given = {value.slot.name: value for value in values}
        return self.stage(values)

    def refit(self, weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
        self.runs = 0
        self.pipeline.refit(self.compiled, weights, plan=self.plan, verify="none")
        return {name: value.tolist() for name, value in self.module.by_slot().items()}


def a_chain(length: int, ties: Any) -> refitkit.RefitPlan:
    """Each slot is the negation of the one before; the first one of ``x``."""
    names = [f"s{number:02}" for number in range(length)]
    result = (Tensor(dtype="float32", shape=(2,)),)
    calls = [op_call("neg.default", "@x")]
    calls += [
        OpCall(op="aten.neg.default", args=(CallRef(call=at),), kwargs={}, results=result)
        for at in range(length - 1)
    ]
    sources = ("x", "x2") if ties else ("x",)
    rows = [call_row(make_slot(name), at, *sources) for at, name in enumerate(names)]
    return make_plan(rows, leaves=TIED if ties else TIED[:1], calls=calls, ties=ties)


@pytest.mark.parametrize("ties", [(), (("x", "x2"),)], ids=["alone", "tied"])
def test_each_call_runs_once_in_each_refit(ties: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Computing(a_chain(6, ties), monkeypatch)
    for number in (1.0, 2.0, 3.0, 4.0):
        found = one.refit({"x": torch.full((2,), number)})
        assert found == {f"s{at:02}": [number if at % 2 else -number] * 2 for at in range(6)}
        assert one.runs == 6
        assert one.compiled.last_mapping is not None


@pytest.mark.parametrize("ties", [(), (("x", "x2"),)], ids=["alone", "tied"])
def test_no_value_of_a_former_refit_is_left(ties: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Computing(a_chain(2, ties), monkeypatch)
    one.refit({"x": torch.ones(2)})
    all_of_them = one.stage

    def lazy(values: Any) -> Any:
        """Load one of the values only."""
        kept = [
            v if v.slot.name == "s01" else v._replace(load=lambda: torch.ones(2)) for v in values
        ]
        return all_of_them(kept)

    one.stage = lazy
    weights = {"x": torch.full((2,), 2.0)}
    one.refit(weights)
    seen = weakref.ref(weights["x"])
    del weights
    gc.collect()
    assert seen() is None
    one.stage = all_of_them
    assert one.refit({"x": torch.full((2,), 3.0)}) == {"s00": [-3.0] * 2, "s01": [3.0] * 2}


def of_a_constant(op: str) -> refitkit.RefitPlan:
    result = (Tensor(dtype="float32", shape=(2,)),)
    call = OpCall(op=f"aten.{op}", args=(PinnedRef(name="k"),), kwargs={}, results=result)
    return make_plan(
        [recipe_row(W), call_row(A, 0)],
        leaves=[leaf_for(W)],
        calls=[call],
        pinned={"k": torch.tensor([5.0, 6.0])},
    )


@pytest.mark.parametrize("op", ["alias.default", "neg.default"])
def test_a_constant_is_computed_once_and_no_engine_may_keep_it(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Computing(of_a_constant(op), monkeypatch)
    seen = []
    for number in range(4):
        found = one.refit({"w": torch.full((2,), float(number))})["a"]
        assert found == ([5.0, 6.0] if op == "alias.default" else [-5.0, -6.0])
        value = one.given["a"]
        tensor = value.load()
        assert value.keepable is not None
        assert not value.keepable(tensor)
        seen.append((one.runs, tensor.data_ptr()))
    assert [runs for runs, _ in seen] == [1, 0, 0, 0]
    assert len({address for _, address in seen[1:]}) == 1  # so engines need not copy it again


def test_no_engine_gets_tensors_with_a_history(world: World) -> None:
    seen: list[bool] = []
    engine = world.module.engines["e0"]
    real = engine.stage

    def stage(values: Any) -> Any:
        seen.extend(value.load().requires_grad for value in values)
        return real(values)

    engine.stage = stage  # type: ignore[method-assign]
    grad = torch.ones((), requires_grad=True)
    for factor in (torch.ones(()), torch.ones(()), grad, grad):
        world.refit({name: value * factor for name, value in world.weights(2.0).items()})
    assert seen
    assert not any(seen)
