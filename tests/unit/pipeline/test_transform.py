"""Weights that become others on their way: all of a group or none, one owner for each entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.errors import (
    ConfigError,
    PluginError,
    Problem,
    VerificationError,
    WeightMismatchError,
)
from refitkit.model import Metric, OutputMeasure, TensorInfo
from refitkit.pipeline import Pipeline, transform
from refitkit.protocols import Made, MadeOf, TransformRequest, WeightGroup
from refitkit.recipe import TensorMap
from tests.fakes import CountingMapping, FakeModule, FakePlugin, OpenEngine, plan_for, same_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from refitkit.config import Config

FLOATS = {"w": torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, -1.0]]), "b": torch.ones(2)}
OTHER = {"w": torch.tensor([[9.0, 4.0, -2.0], [7.0, 1.0, 3.0]]), "b": torch.zeros(2)}


def quantized(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the engines below hold of a float matrix."""
    scale = value.abs().amax(1, keepdim=True) / 127
    return {"w.q": (value / scale).round().to(torch.int8), "w.scale": scale}


def module_of(value: torch.Tensor) -> FakeModule:
    return FakeModule([OpenEngine("e0", {**quantized(value), "b": torch.full((2,), 5.0)})])


class Quantizer:
    """Makes ``w.q`` and ``w.scale`` from ``w``; refuses a scale without its weight."""

    name = "quantizer"
    priority = 50

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit
        self.made = 0

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        names = request.source.names()
        if "w.scale" in names and not {"w", "w.q"} & set(names):
            raise WeightMismatchError("No weight.", problems=[Problem("w.scale", "alone")])
        if "w" in names:
            gives = {
                "w.q": TensorInfo(dtype="int8", shape=(2, 3)),
                "w.scale": TensorInfo(dtype="float32", shape=(2, 1)),
            }
            yield WeightGroup(("w",), gives, lambda: self.make(request.source.get("w")))

    def make(self, value: torch.Tensor) -> Made:
        self.made += 1
        found = quantized(value)
        error = float((found["w.q"] * found["w.scale"] - value).abs().max())
        measure = OutputMeasure(
            name="w.q", ok=error <= self.limit, max_abs_error=error, limit=self.limit
        )
        return Made(found, (measure,))


class Plugin:
    """Offers transforms."""

    def __init__(self, *transforms: Any, name: str = "quant") -> None:
        self.transforms = transforms
        self.name = name

    @refitkit.hookimpl
    def refitkit_weight_transforms(self) -> Iterable[Any]:
        return self.transforms


def pipeline_with(*transforms: Any) -> Pipeline:
    return Pipeline(plugins=[FakePlugin(), Plugin(*transforms)])


def compiled_by(pipeline: Pipeline, module: FakeModule) -> refitkit.CompiledModule:
    compiled = pipeline.load(module)
    compiled.plan = plan_for(module)
    return compiled


def holds(module: FakeModule) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: value.clone() for name, value in module.holds().items()}


def grouped(
    takes: tuple[str, ...] = ("w",),
    gives: tuple[str, ...] = ("w.q", "w.scale"),
    make: Callable[[], Any] | None = None,
) -> Any:
    """A transform with one group."""

    class Some:
        name, priority = "some", 50

        def groups(self, request: TransformRequest) -> list[WeightGroup]:
            infos = {name: TensorInfo(dtype="float32", shape=(2, 1)) for name in gives}
            return [WeightGroup(takes, infos, make or (lambda: Made({})))]

    return Some()


# -- what becomes of weights ------------------------------------------------------------------


def test_a_refit_takes_what_a_transform_makes() -> None:
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer())
    compiled = compiled_by(pipeline, module)
    report = pipeline.refit(compiled, OTHER, verify="weights").report
    assert same_state(holds(module), {**quantized(OTHER["w"]), "b": OTHER["b"]})
    assert report.source == "a state_dict of 2 entries through quantizer"
    (row,) = report.transforms
    assert (row.transform, row.plugin, row.takes) == ("quantizer", "quant", ("w",))
    assert row.gives == ("w.q", "w.scale")
    (measure,) = row.measures
    assert 0 < measure.max_abs_error < 9 / 127


def test_without_the_plugin_the_names_are_strange() -> None:
    module = module_of(FLOATS["w"])
    pipeline = Pipeline(plugins=[FakePlugin()])
    before = holds(module)
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(compiled_by(pipeline, module), OTHER)
    kinds = {(problem.subject, problem.kind) for problem in info.value.problems}
    assert kinds == {("w", "unexpected"), ("w.q", "missing"), ("w.scale", "missing")}
    assert same_state(holds(module), before)


def test_weights_that_need_no_transform_go_as_they_are() -> None:
    """The very source: nothing stands between it and those who read it."""
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer())
    given = {**quantized(OTHER["w"]), "b": OTHER["b"]}
    report = pipeline.refit(compiled_by(pipeline, module), given).report
    assert same_state(holds(module), given)
    assert (report.transforms, report.source) == ((), "a state_dict of 3 entries")
    source = TensorMap(given)
    assert pipeline.open_weights(source, plan_for(module)) is source


def test_plans_and_verdicts_see_them_too() -> None:
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer())
    compiled = compiled_by(pipeline, module)
    pipeline.refit(compiled, OTHER)
    assert pipeline.verify(compiled, OTHER, with_="weights").ok
    with pytest.raises(VerificationError):
        pipeline.verify(compiled, FLOATS, with_="weights")
    read = refitkit.RefitPlan.from_bytes(plan_for(module).to_bytes(), opener=pipeline.open_weights)
    found = read.materialize(OTHER)["e0"]
    assert same_state(found, {**quantized(OTHER["w"]), "b": OTHER["b"]})


def test_in_part_and_by_delta() -> None:
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer())
    compiled = compiled_by(pipeline, module)
    report = pipeline.refit(compiled, {"w": OTHER["w"]}, partial=True).report
    assert report.slots_written == 2
    assert holds(module)["b"].tolist() == [5.0, 5.0]
    first = pipeline.refit(compiled, OTHER, delta=True).report
    second = pipeline.refit(compiled, {**OTHER, "b": torch.ones(2)}, delta=True).report
    assert (first.slots_written, second.slots_written) == (3, 1)
    third = pipeline.refit(compiled, {**OTHER, "w": FLOATS["w"]}, delta=True).report
    assert third.slots_written == 3
    assert same_state(holds(module), {**quantized(FLOATS["w"]), "b": OTHER["b"]})


def test_a_metric_outside_its_limit_fails_the_refit() -> None:
    class Noisy(Quantizer):
        def make(self, value: torch.Tensor) -> Made:
            metric = Metric(name="SQNR in dB", value=12.5, limit=20.0, at_least=True)
            measure = OutputMeasure(name="w.q", ok=metric.ok, metrics=(metric,))
            return Made(quantized(value), (measure,))

    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Noisy())
    compiled, before = compiled_by(pipeline, module), holds(module)
    with pytest.raises(VerificationError, match=r"SQNR in dB 12\.5, at least 20"):
        pipeline.refit(compiled, OTHER)
    assert same_state(holds(module), before)


def test_a_transform_is_told_what_is_asked() -> None:
    class Asked(Quantizer):
        requests: list[TransformRequest]

        def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
            self.requests.append(request)
            return super().groups(request)

    asked = Asked()
    asked.requests = []
    pipeline = pipeline_with(asked)
    compiled = compiled_by(pipeline, module_of(FLOATS["w"]))
    pipeline.refit(compiled, OTHER)
    pipeline.refit(compiled, OTHER, partial=True)
    first, second = asked.requests
    assert (first.partial, second.partial) == (False, True)
    assert first.plan is compiled.plan
    assert list(first.source.names()) == ["w", "b"]


def test_there_and_back_bit_for_bit() -> None:
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer())
    compiled = compiled_by(pipeline, module)
    pipeline.refit(compiled, FLOATS)
    first = holds(module)
    pipeline.refit(compiled, OTHER)
    assert not same_state(holds(module), first)
    pipeline.refit(compiled, FLOATS)
    assert same_state(holds(module), first)


def test_nothing_is_read_before_a_member_is_and_one_group_is_kept() -> None:
    quantizer = Quantizer()
    counting = CountingMapping(OTHER)
    source = pipeline_with(quantizer).open_weights(counting, plan_for(module_of(FLOATS["w"])))
    assert list(source.names()) == ["b", "w.q", "w.scale"]
    assert source.info("w.q") == TensorInfo(dtype="int8", shape=(2, 3))
    assert counting.reads["w"] == quantizer.made == 0
    source.get("w.q")
    source.get("w.scale")
    source.get("b")
    source.get("w.q")
    assert quantizer.made == 1
    for read in (source.info, source.get):
        with pytest.raises(KeyError):
            read("w")


class Renamer:
    """Takes ``outer.`` off all names; comes before the quantizer."""

    name, priority = "renamer", 10

    def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
        source = request.source
        for name in source.names():
            bare = name.removeprefix("outer.")
            if bare != name:
                yield WeightGroup(
                    (name,),
                    {bare: source.info(name)},
                    lambda name=name, bare=bare: Made({bare: source.get(name)}),
                )


@pytest.mark.parametrize("turned", [False, True])
def test_each_is_asked_about_what_those_before_it_made(turned: bool) -> None:
    transforms = [Quantizer(), Renamer()]
    pipeline = pipeline_with(*(transforms[::-1] if turned else transforms))
    module = module_of(FLOATS["w"])
    wrapped = {f"outer.{name}": value for name, value in OTHER.items()}
    report = pipeline.refit(compiled_by(pipeline, module), wrapped, verify="weights").report
    assert same_state(holds(module), {**quantized(OTHER["w"]), "b": OTHER["b"]})
    found = [(row.transform, row.takes, row.gives) for row in report.transforms]
    assert found == [
        ("renamer", ("outer.w",), ("w",)),
        ("renamer", ("outer.b",), ("b",)),
        ("quantizer", ("w",), ("w.q", "w.scale")),
    ]


def test_a_name_that_is_made_twice_one_after_another_is_refused() -> None:
    later = grouped(("b",), ("w.scale",))
    later.priority = 60
    pipeline = pipeline_with(Quantizer(), later)
    with pytest.raises(PluginError, match=r"'quantizer'.* and 'some'.* both make 'w\.scale'"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


def test_what_is_made_and_nobody_reads_is_unexpected() -> None:
    pipeline = pipeline_with(grouped(("w",), ("strange",)))
    with pytest.raises(WeightMismatchError, match="strange: unexpected"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


# -- what is refused --------------------------------------------------------------------------


def test_what_is_too_far_from_the_given_weights_is_not_committed() -> None:
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer(limit=1e-6))
    before = holds(module)
    with pytest.raises(VerificationError, match=r"w\.q: too far .* wanted at most 1e-06") as info:
        pipeline.refit(compiled_by(pipeline, module), OTHER, verify="none")
    assert info.value.report.outcome == "rolled-back"
    assert info.value.report.transforms[0].measures[0].ok is False
    assert same_state(holds(module), before)
    assert [staged.did for staged in module.engines["e0"].staged] == [["discard"]]


@pytest.mark.parametrize("partial", [False, True])
def test_problems_of_all_transforms_are_told_at_once(partial: bool) -> None:
    class Picky(Quantizer):
        name = "picky"

        def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
            raise WeightMismatchError("No.", problems=[Problem("b", "not nice")])

    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(Quantizer(), Picky())
    compiled, before = compiled_by(pipeline, module), holds(module)
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(compiled, {"w.scale": torch.ones(2, 1)}, partial=partial)
    assert [problem.subject for problem in info.value.problems] == ["w.scale", "b"]
    assert same_state(holds(module), before)


def test_a_refusal_without_problems_is_told_all_the_same() -> None:
    class Silent(Quantizer):
        def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
            raise WeightMismatchError("I do not like these.")

    pipeline = pipeline_with(Silent())
    with pytest.raises(WeightMismatchError, match=r"quantizer: refused.*I do not like these"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


def test_an_entry_that_is_given_and_made_is_refused() -> None:
    pipeline = pipeline_with(Quantizer())
    both = {**OTHER, "w.q": torch.zeros(2, 3, dtype=torch.int8)}
    with pytest.raises(WeightMismatchError, match=r"w\.q: given twice .*makes it from 'w'"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), both)


def test_what_is_made_may_have_the_name_of_what_was_taken() -> None:
    """A weight that is stored in another form under its own name."""
    double = grouped()
    double.groups = lambda request: [
        WeightGroup(
            ("b",),
            {"b": TensorInfo(dtype="float32", shape=(2,))},
            lambda: Made({"b": request.source.get("b") * 2}),
        )
    ]
    module = FakeModule([OpenEngine("e0", {"b": torch.zeros(2)})])
    pipeline = pipeline_with(double)
    pipeline.refit(compiled_by(pipeline, module), {"b": torch.ones(2)})
    assert holds(module)["b"].tolist() == [2.0, 2.0]


def test_two_plugins_that_make_the_same_are_both_named() -> None:
    second = Quantizer()
    second.name = "another"  # type: ignore[misc] # of the instance
    plugins = [FakePlugin(), Plugin(Quantizer()), Plugin(second, name="rival")]
    pipeline = Pipeline(plugins=plugins)
    with pytest.raises(PluginError, match=r"'quantizer'.*'quant'.*'another'.*'rival'.*'w\.q'"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


def test_two_transforms_of_one_name_are_refused() -> None:
    pipeline = Pipeline(
        plugins=[FakePlugin(), Plugin(Quantizer()), Plugin(Quantizer(), name="rival")]
    )
    with pytest.raises(PluginError, match=r"'quant' and 'rival' both offer 'quantizer'"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


BROKEN = {
    "takes what is not there": (grouped(takes=("nothing",)), "does not have: 'nothing'"),
    "makes less": (
        grouped(make=lambda: Made({})),
        "did not make the announced entries: 'w.q', 'w.scale'",
    ),
    "makes another dtype": (
        grouped(
            gives=("w.scale",),
            make=lambda: Made({"w.scale": torch.ones(2, 1, dtype=torch.float64)}),
        ),
        "did not make the announced entries: 'w.scale'",
    ),
    "makes no tensor": (
        grouped(gives=("w.scale",), make=lambda: Made({"w.scale": 1.0})),  # type: ignore[dict-item]
        "did not make the announced entries: 'w.scale'",
    ),
    "fails": (grouped(make=lambda: 1 / 0), "'some' of the plugin 'quant' .* failed: ZeroDivision"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_transform_is_named(case: str) -> None:
    transform, said = BROKEN[case]
    module = module_of(FLOATS["w"])
    pipeline = pipeline_with(transform)
    before = holds(module)
    given = {**OTHER, **{n: v for n, v in quantized(OTHER["w"]).items() if n == "w.q"}}
    if "w.q" in getattr(transform.groups(None)[0], "gives", {}):
        given = dict(OTHER)
    with pytest.raises(PluginError, match=said):
        pipeline.refit(compiled_by(pipeline, module), given)
    assert same_state(holds(module), before)


@pytest.mark.parametrize("priority", [None, "first"])
def test_a_transform_without_a_priority_is_named(priority: Any) -> None:
    transform = Quantizer()
    transform.priority = priority
    with pytest.raises(
        PluginError, match=r"'quantizer' of the plugin 'quant' .* has the priority "
    ):
        pipeline_with(transform).open_weights(OTHER, plan_for(module_of(FLOATS["w"])))


def test_a_transform_that_fails_while_it_looks_is_named() -> None:
    class Failing(Quantizer):
        def groups(self, request: TransformRequest) -> Iterator[WeightGroup]:
            raise ZeroDivisionError

    pipeline = pipeline_with(Failing())
    with pytest.raises(PluginError, match=r"'quantizer' of the plugin 'quant' .* failed: ZeroDiv"):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


# -- settings ---------------------------------------------------------------------------------


def test_plugins_find_their_settings() -> None:
    class Settled(Plugin):
        @refitkit.hookimpl
        def refitkit_weight_transforms(self, config: Config) -> Iterable[Any]:
            return [Quantizer(**config.plugin_settings["quant"])]

    settings = {"plugin_settings": {"quant": {"limit": 1e-6}}}
    pipeline = Pipeline(settings, plugins=[FakePlugin(), Settled()])
    with pytest.raises(VerificationError):
        pipeline.refit(compiled_by(pipeline, module_of(FLOATS["w"])), OTHER)


def test_settings_of_no_plugin_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"plugin_settings\.quont: no such plugin") as info:
        Pipeline({"plugin_settings": {"quont": {}}}, plugins=[Plugin(name="quant")])
    assert "quant" in info.value.hint


def test_what_was_made_tells_what_from() -> None:
    """Of what a group makes all that it takes, of all else the name itself."""
    pipeline = pipeline_with(Quantizer())
    plan = plan_for(module_of(FLOATS["w"]))
    made: Any = pipeline.open_weights({"w": FLOATS["w"], "b": FLOATS["b"]}, plan)
    assert isinstance(made, MadeOf)
    assert not isinstance(made.given, MadeOf)
    assert {name: made.made_from(name) for name in made.names()} == {
        "b": ("b",),
        "w.q": ("w",),
        "w.scale": ("w",),
    }
    assert set(made.given.names()) == {"w", "b"}
    with pytest.raises(KeyError):
        made.made_from("w")


def test_a_revision_tells_what_was_made_how_by_whom() -> None:
    class Source(TensorMap):
        def revision(self, fqn: str) -> Any:
            return revisions[fqn]

    def revision(formula: Any = "doubled", plugin: str = "mine", of: str = "w") -> Any:
        info = TensorInfo(dtype="float32", shape=(2,))
        gives = {"v": info, "w": info}
        group = WeightGroup(("w", "x"), gives, lambda: Made({}), formula=formula)
        offer = transform.TransformOffer(plugin, "transform", group)
        return transform.Transformed(Source(given), [offer]).revision(of)

    given = {"w": torch.zeros(2), "x": torch.zeros(2)}
    revisions: dict[str, Any] = {"w": 1, "x": 2}
    first = revision()
    assert first == revision()
    others = [revision(("doubled", 1)), revision(plugin="yours"), revision(of="v")]
    revisions["x"] = 3
    others.append(revision())
    assert len({first, *others}) == 5
    assert revision(None) is None
    revisions["x"] = None
    assert revision() is None
