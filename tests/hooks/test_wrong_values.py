"""Wrong values from plugins: each is blamed on its plugin, by name, and changes nothing.

The error has to be a ``PluginError`` that names the plugin and the hook. The module holds its old
weights, bit for bit, and a refit without the plugin works.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import refitkit
from refitkit.model import OutputMeasure, StageStarted, TensorInfo, VerificationResult
from refitkit.protocols import Made, Mapped, PlanDraft, SlotValue, WeightGroup
from refitkit.recipe import TensorMap
from tests.fakes import (
    BACKEND,
    FakeBackend,
    FakePlugin,
    make_module,
    parts_of,
    pipeline_with,
    weights_for,
)
from tests.hooks.test_every_hook import program

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.pipeline import Pipeline

NAME = "acme"


class Acme:
    """A plugin that gives one value from one hook."""

    name = NAME

    def __init__(self, hook: str, give: Callable[..., Any]) -> None:
        def implementation() -> Any:
            return give()

        setattr(self, hook, refitkit.hookimpl(implementation))


def items(hook: str, *offered: Any) -> Acme:
    return Acme(hook, lambda: list(offered))


# -- where values enter ---------------------------------------------------------------------------


class Source:
    """A source of which one answer is wrong."""

    description = "weights of acme"

    def __init__(self, tensors: dict[str, torch.Tensor], **wrong: Any) -> None:
        right = TensorMap(tensors)
        for name in ("names", "info", "get"):
            setattr(self, name, getattr(right, name))
        for name, answer in wrong.items():
            setattr(self, name, answer)


def source(**wrong: Any) -> Acme:
    return Acme("refitkit_load_weights", lambda: Source(weights_for(make_module(), 3.0), **wrong))


ALL = weights_for(make_module(), 3.0)
SOURCES = {
    "a dict": lambda: Acme("refitkit_load_weights", lambda: {"e0.weight": torch.ones(1)}),
    "True": lambda: Acme("refitkit_load_weights", lambda: True),
    "half a source": lambda: Acme(
        "refitkit_load_weights", lambda: SimpleNamespace(names=lambda: ["e0.weight"])
    ),
    "names: None": lambda: source(names=lambda: None),
    "names: numbers": lambda: source(names=lambda: [1, 2]),
    "info: a dict": lambda: source(info=lambda _: {"dtype": "float32", "shape": (1,)}),
    "info: None": lambda: source(info=lambda _: None),
    "get: an array": lambda: source(get=lambda _: np.ones(1)),
    "get: None": lambda: source(get=lambda _: None),
    "get: another shape": lambda: source(get=lambda _: torch.ones(97)),
    "get: another dtype": lambda: source(get=lambda name: ALL[name].double()),
    "description: None": lambda: source(description=None),
}


class Strategy:
    name, priority = "acme's", 1

    def __init__(self, mapped: Callable[[Any], Any] = lambda _: Mapped({}), **wrong: Any) -> None:
        self.map = mapped
        for name, value in wrong.items():
            setattr(self, name, value)


def valued(make: Callable[[Any], Any]) -> Any:
    """A strategy that gives each slot what is made of it."""
    return Strategy(
        lambda request: Mapped({row.slot.key: make(row.slot) for row in request.wanted})
    )


def slot_value(slot: Any, **wrong: Any) -> SlotValue:
    value = SlotValue(slot, "acme's", (), lambda: torch.ones(slot.shape))
    return value._replace(**wrong)


HOOK = "refitkit_mapping_strategies"
STRATEGIES = {
    "no list": lambda: Acme(HOOK, lambda: 5),
    "no name": lambda: items(HOOK, object()),
    "name: a number": lambda: items(HOOK, Strategy(name=5)),
    "priority: None": lambda: items(HOOK, Strategy(priority=None)),
    "priority: a word": lambda: items(HOOK, Strategy(priority="high")),
    "no map": lambda: items(HOOK, Strategy(map=None)),
    "map: a dict": lambda: items(HOOK, Strategy(lambda _: {})),
    "map: None": lambda: items(HOOK, Strategy(lambda _: None)),
    "values: None": lambda: items(HOOK, Strategy(lambda _: Mapped(None))),  # type: ignore[arg-type]
    "values: of no slot": lambda: items(
        HOOK, Strategy(lambda _: Mapped({("e9", "w"): slot_value(SimpleNamespace(shape=(1,)))}))
    ),
    "a value: a tensor": lambda: items(HOOK, valued(lambda slot: torch.ones(slot.shape))),
    "a value: of another slot": lambda: items(
        HOOK, valued(lambda slot: slot_value(slot)._replace(slot=SimpleNamespace(key=("a", "b"))))
    ),
    "sources: None": lambda: items(HOOK, valued(lambda slot: slot_value(slot, sources=None))),
    "load: None": lambda: items(HOOK, valued(lambda slot: slot_value(slot, load=lambda: None))),
    "load: a list": lambda: items(HOOK, valued(lambda slot: slot_value(slot, load=lambda: [1.0]))),
    "load: no function": lambda: items(HOOK, valued(lambda slot: slot_value(slot, load=None))),
    "load: another shape": lambda: items(
        HOOK, valued(lambda slot: slot_value(slot, load=lambda: torch.ones(97)))
    ),
    "load: another dtype": lambda: items(
        HOOK, valued(lambda s: slot_value(s, load=lambda: torch.ones(s.shape, dtype=torch.int8)))
    ),
    "reasons: a list": lambda: items(HOOK, Strategy(lambda _: Mapped({}, ["why"]))),  # type: ignore[arg-type]
}


class Transform:
    name, priority = "acme's", 1

    def __init__(self, groups: Callable[[Any], Any], **wrong: Any) -> None:
        self.groups = groups
        for name, value in wrong.items():
            setattr(self, name, value)


FIRST, VALUE = next(iter(weights_for(make_module(), 1.0).items()))
INFO = TensorInfo(dtype="float32", shape=tuple(VALUE.shape))


def group(**wrong: Any) -> WeightGroup:
    made = Made({FIRST: torch.ones(INFO.shape)})
    return replace(WeightGroup((FIRST,), {FIRST: INFO}, lambda: made), **wrong)


def transform(*groups: Any) -> Acme:
    return items("refitkit_weight_transforms", Transform(lambda _: list(groups)))


TRANSFORMS = {
    "priority: None": lambda: items(
        "refitkit_weight_transforms", Transform(lambda _: [], priority=None)
    ),
    "no groups": lambda: items("refitkit_weight_transforms", Transform(None)),  # type: ignore[arg-type]
    "groups: None": lambda: items("refitkit_weight_transforms", Transform(lambda _: None)),
    "a group: a dict": lambda: transform({}),
    "takes: a string": lambda: transform(group(takes=FIRST)),
    "takes: None": lambda: transform(group(takes=None)),
    "takes: unknown": lambda: transform(group(takes=("nobody",))),
    "gives: a list": lambda: transform(group(gives=[FIRST])),
    "gives: a tuple": lambda: transform(group(gives={FIRST: (2,)})),
    "make: a dict": lambda: transform(group(make=lambda: {FIRST: torch.ones(INFO.shape)})),
    "make: None": lambda: transform(group(make=lambda: None)),
    "make: less": lambda: transform(group(make=lambda: Made({}))),
    "make: a list": lambda: transform(group(make=lambda: Made({FIRST: [1.0]}))),
    "make: another shape": lambda: transform(group(make=lambda: Made({FIRST: torch.ones(97)}))),
    "make: no function": lambda: transform(group(make=5)),
    "formula: unhashable": lambda: transform(group(formula=[1])),
}

CHECKS = {
    "no list": lambda: Acme("refitkit_check", lambda: 5),
    "a string": lambda: Acme("refitkit_check", lambda: "bad"),
    "strings": lambda: Acme("refitkit_check", lambda: ["bad"]),
    "an error": lambda: Acme("refitkit_check", lambda: [ValueError("bad")]),
}


class Verifier:
    name = "acme's"

    def __init__(self, prepare: Callable[[Any], Any]) -> None:
        self.prepare = prepare


def verifier(verdict: Any) -> Acme:
    return items("refitkit_verifiers", Verifier(lambda _: lambda _: verdict))


GOOD = VerificationResult(verifier="acme's", ok=True)
VERIFIERS = {
    "True": lambda: verifier(True),
    "None": lambda: verifier(None),
    "a dict": lambda: verifier({"ok": True}),
    "unchecked": lambda: verifier(VerificationResult.model_construct(ok=True, measures=5)),
    "contradicts itself": lambda: verifier(
        VerificationResult(
            verifier="acme's", ok=True, measures=(OutputMeasure(name="y", ok=False),)
        )
    ),
    "half": lambda: verifier(VerificationResult.model_construct(ok=True)),
    "of another": lambda: verifier(SimpleNamespace(ok=True, measures=(), note="", verifier="x")),
    "no prepare": lambda: items("refitkit_verifiers", Verifier(None)),  # type: ignore[arg-type]
    "prepare: None": lambda: items("refitkit_verifiers", Verifier(lambda _: None)),
    "prepare: a verdict": lambda: items("refitkit_verifiers", Verifier(lambda _: GOOD)),
    "no name": lambda: items("refitkit_verifiers", object()),
}

KINDS = {
    "refitkit_load_weights": SOURCES,
    HOOK: STRATEGIES,
    "refitkit_weight_transforms": TRANSFORMS,
    "refitkit_check": CHECKS,
    "refitkit_verifiers": VERIFIERS,
}
CASES = [
    pytest.param(hook, give, id=f"{hook.removeprefix('refitkit_')}-{name}")
    for hook, kinds in KINDS.items()
    for name, give in kinds.items()
]


@pytest.mark.parametrize(("hook", "give"), CASES)
def test_a_wrong_value_in_a_refit(hook: str, give: Callable[[], Acme]) -> None:
    pipeline = pipeline_with(give())
    module = make_module()
    compiled = pipeline_with().load(module)
    before = {name: value.clone() for name, value in module.by_slot().items()}
    weights: Any = "acme://weights" if hook == "refitkit_load_weights" else weights_for(module, 3.0)
    options = {"verify": "acme's"} if hook == "refitkit_verifiers" else {}
    with pytest.raises(refitkit.PluginError) as info:
        pipeline.refit(compiled, weights, **options)
    text = str(info.value)
    assert f"plugin {NAME!r}" in text
    assert hook in text
    held = module.by_slot()
    assert all(torch.equal(held[name], value) for name, value in before.items())
    good = weights_for(module, 4.0)
    pipeline_with().refit(compiled, good)
    assert compiled.version == 1


class Own(Source):
    """A source that its plugin knows again."""

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return 0


def test_plugins_get_their_own_sources() -> None:
    seen: list[Any] = []

    class Knowing:
        name = "knowing"

        @refitkit.hookimpl
        def refitkit_load_weights(self, source: object) -> Any:
            return own if source == "acme://weights" else None

        @refitkit.hookimpl
        def refitkit_check(self, source: Any) -> list[Any]:
            seen.append(source)
            return []

    own: Any = Own(weights_for(make_module(), 3.0))
    pipeline = pipeline_with(Knowing())
    compiled = pipeline.load(make_module())
    pipeline.refit(compiled, "acme://weights")
    pipeline.refit(compiled, own)
    assert all(one is own for one in seen)
    assert len(seen) == 2


def test_properties_of_engines_are_not_asked_before_their_time() -> None:
    module, asked = make_module(), []
    engine: Any = module.engines["e0"]
    real = type(engine)

    def memory(one: Any) -> Any:
        asked.append(one)
        return real.memory.fget(one)

    engine.__class__ = type("Late", (real,), {"memory": property(memory)})
    pipeline = pipeline_with(Acme("refitkit_load_module", lambda: module))
    compiled = pipeline.load("acme://module")
    assert asked == []
    pipeline.refit(compiled, weights_for(module, 5.0))
    assert compiled.version == 1


def test_an_engine_that_stages_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    compiled = pipeline_with().load(module)
    before = {name: value.clone() for name, value in module.by_slot().items()}
    last = list(module.engines.values())[-1]
    with monkeypatch.context() as patched:
        patched.setattr(last, "stage", lambda _values: None)
        with pytest.raises(refitkit.PluginError, match=r"stage\(\) gave None.* no .*commit"):
            pipeline_with().refit(compiled, weights_for(module, 3.0))
    assert all(torch.equal(module.by_slot()[name], value) for name, value in before.items())
    pipeline_with().refit(compiled, weights_for(module, 4.0))
    assert compiled.version == 1


@pytest.mark.parametrize("route", [None, 5, ("a",), (1, 2), "no property"])
def test_a_route_that_is_none_fails_no_refit(route: Any) -> None:
    module = make_module()
    engine: Any = module.engines["e0"]

    def told(_engine: Any) -> Any:
        if route == "no property":
            raise ZeroDivisionError
        return route

    engine.__class__ = type("Routed", (type(engine),), {"route": property(told)})
    compiled = pipeline_with().load(module)
    report = pipeline_with().refit(compiled, weights_for(module, 5.0)).report
    assert report.routes == ()
    assert compiled.version == 1


class Wrapping:
    """Wraps the hooks of others, and changes nothing."""

    name = "wrapping"

    @refitkit.hookimpl(wrapper=True)
    def refitkit_load_weights(self) -> Any:
        return (yield)

    @refitkit.hookimpl(wrapper=True)
    def refitkit_event(self) -> Any:
        return (yield)


def test_a_wrapper_is_not_blamed_for_what_it_wraps() -> None:
    pipeline = pipeline_with(Wrapping(), Acme("refitkit_load_weights", lambda: {"a": 1}))
    with pytest.raises(refitkit.PluginError, match=r"plugin 'acme' \(refitkit_load_weights\) gave"):
        pipeline.open_weights("acme://weights")


def test_a_wrapper_that_changes_the_result_is() -> None:
    class Replacing:
        name = "replacing"

        @refitkit.hookimpl(wrapper=True)
        def refitkit_load_weights(self) -> Any:
            yield
            return 5

    pipeline = pipeline_with(Replacing(), source())
    with pytest.raises(refitkit.PluginError, match=r"plugin 'replacing' .* gave 5, not a WeightS"):
        pipeline.open_weights("acme://weights")


def test_listeners_are_told_in_the_order_of_pluggy() -> None:
    told: list[str] = []

    def listener(name: str, **options: Any) -> Any:
        def hear(event: Any) -> None:
            if isinstance(event, StageStarted) and event.stage == "load":
                told.append(name)

        found = Acme("refitkit_event", lambda: None)
        found.name = name
        found.refitkit_event = refitkit.hookimpl(hear, **options)  # type: ignore[attr-defined]
        return found

    plugins = [listener("a"), listener("first", tryfirst=True), listener("b")]
    for more in ([], [Wrapping()]):
        told.clear()
        pipeline = pipeline_with(*plugins, *more)
        compiled = pipeline.load(make_module())
        pipeline.refit(compiled, weights_for(make_module(), 3.0))
        assert told == ["first", "b", "a"]


# -- outside of refits ----------------------------------------------------------------------------


class Backend:
    name = BACKEND

    def __init__(self, **wrong: Any) -> None:
        real = FakeBackend()
        for member in ("compile", "draft", "describe", "attachments"):
            setattr(self, member, wrong.get(member, getattr(real, member)))


def backend(whole: Any = None, **wrong: Any) -> Acme:
    plugin = Acme("refitkit_event", lambda: None)

    def implementation(register: Callable[[Any], None]) -> None:
        register(Backend(**wrong) if whole is None else whole)

    plugin.refitkit_register_backends = refitkit.hookimpl(implementation)  # type: ignore[attr-defined]
    return plugin


def opened(**wrong: Any) -> Acme:
    def give() -> Any:
        module = make_module()
        for name, value in wrong.items():
            setattr(module, name, value)
        return module

    return Acme("refitkit_load_module", give)


def load(pipeline: Pipeline) -> None:
    pipeline.load("acme://module")


def plan(pipeline: Pipeline) -> None:
    pipeline.plan(program(), backend=BACKEND)


def compiled(pipeline: Pipeline) -> None:
    pipeline.compile(program(), BACKEND)


def described(pipeline: Pipeline) -> None:
    pipeline.describe(__file__)


def plan_read(pipeline: Pipeline) -> None:
    pipeline.read_plan(__file__)


def plan_offline(pipeline: Pipeline) -> None:
    pipeline.plan(program(), backend="fake")


def copied(pipeline: Pipeline) -> None:
    pipeline.copy(pipeline.load("acme://module"))


def fails(*_: Any) -> Any:
    raise ZeroDivisionError("on purpose")


def own(**wrong: Any) -> Acme:
    """A plugin with a backend, which opens a module of it."""
    plugin = backend()
    plugin.refitkit_load_module = refitkit.hookimpl(lambda target: made)  # type: ignore[attr-defined]
    made = make_module()
    made.backend = BACKEND
    for name, value in wrong.items():
        setattr(made, name, value)
    return plugin


ENGINES: dict[str, Callable[[Any, Any], None]] = {
    "memory": lambda engine, _: setattr(
        engine, "__class__", type("Odd", (type(engine),), {"memory": {"bytes": 5}})
    ),
    "stage()": lambda engine, patch: patch.setattr(engine, "stage", lambda _: {"staged": True}),
    "changed()": lambda engine, patch: patch.setattr(
        engine, "stage", lambda _: SimpleNamespace(**dict.fromkeys(STAGED, lambda: "maybe"))
    ),
}
STAGED = ("changed", "commit", "rollback", "discard")


@pytest.mark.parametrize("member", ENGINES)
def test_a_wrong_value_of_an_engine(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = refitkit.Pipeline(plugins=[own()])
    compiled = pipeline.load("acme://module")
    module: Any = compiled.opened
    before = {name: value.clone() for name, value in module.by_slot().items()}
    engine = list(module.engines.values())[-1]
    kind = type(engine)
    with monkeypatch.context() as patch:
        ENGINES[member](engine, patch)
        with pytest.raises(refitkit.PluginError) as info:
            pipeline.refit(compiled, weights_for(module, 3.0))
    text = str(info.value)
    assert f"plugin {NAME!r} ({BACKENDS})" in text
    assert f"engines['e0'].{member}" in text
    assert all(torch.equal(module.by_slot()[name], value) for name, value in before.items())
    engine.__class__ = kind
    pipeline.refit(compiled, weights_for(module, 4.0))
    assert compiled.version == 1


@pytest.mark.parametrize("answer", [np.bool_(True), torch.tensor(True), 1])
def test_an_engine_may_compare_as_numpy_and_torch_do(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    compiled = pipeline_with().load(module)
    engine: Any = next(iter(module.engines.values()))
    real = engine.stage

    def stage(values: Any) -> Any:
        staged = real(values)
        monkeypatch.setattr(staged, "changed", lambda: answer)
        return staged

    monkeypatch.setattr(engine, "stage", stage)
    assert pipeline_with().refit(compiled, weights_for(module, 3.0)).report.changed is True


def test_a_source_whose_infos_fail_late_is_named() -> None:
    module, asked = make_module(), []
    right = TensorMap(weights_for(module, 3.0))

    def info(name: str) -> Any:
        asked.append(name)
        if len(asked) > 1:
            raise KeyError(name)
        return right.info(name)

    compiled = pipeline_with().load(module)
    with pytest.raises(refitkit.SourceError, match=rf"plugin '{NAME}'.*info\('e0.*failed: KeyEr"):
        pipeline_with(source(info=info)).refit(compiled, "acme://weights")
    asked.clear()
    pipeline_with(source(info=lambda n: asked.append(n) or right.info(n))).refit(
        compiled, "acme://weights"
    )
    assert sorted(asked) == sorted(right.names())


def test_a_source_that_fails_is_named() -> None:
    module = make_module()
    compiled = pipeline_with().load(module)
    with pytest.raises(refitkit.SourceError, match=rf"plugin '{NAME}'.*get\('e0.*failed: ZeroDiv"):
        pipeline_with(source(get=fails)).refit(compiled, "acme://weights")
    assert compiled.version == 0


LOADS, CUTS, LAYERS = "refitkit_load_module", "refitkit_partition", "refitkit_layer_types"
BACKENDS = "refitkit_register_backends"
OUTSIDE: dict[str, tuple[str, Callable[[Pipeline], None], Callable[[], Acme]]] = {
    "module: a dict": (LOADS, load, lambda: Acme(LOADS, lambda: {"a": 1})),
    "module: True": (LOADS, load, lambda: Acme(LOADS, lambda: True)),
    "module: without run": (LOADS, load, lambda: opened(run=None)),
    "module: engines a list": (LOADS, load, lambda: opened(engines=["e0", "e1"])),
    "module: engines of strings": (LOADS, load, lambda: opened(engines={"e0": "engine"})),
    "module: backend a number": (LOADS, load, lambda: opened(backend=5)),
    "parts: a list": (CUTS, plan, lambda: Acme(CUTS, lambda: ["e0"])),
    "parts: True": (CUTS, plan, lambda: Acme(CUTS, lambda: True)),
    "layer type: a string": (LAYERS, plan, lambda: items(LAYERS, "POOL")),
    "layer type: a dict": (LAYERS, plan, lambda: items(LAYERS, {"name": "POOL"})),
    "layer type: alike": (LAYERS, plan, lambda: items(LAYERS, SimpleNamespace(name="POOL"))),
    "backend: a string": (BACKENDS, plan, lambda: backend("acme's backend")),
    "backend: without compile": (BACKENDS, compiled, lambda: backend(compile=None)),
    "compile: a dict": (BACKENDS, compiled, lambda: backend(compile=lambda *_: {"a": 1})),
    "compile: None": (BACKENDS, compiled, lambda: backend(compile=lambda *_: None)),
    "draft: None": (BACKENDS, plan, lambda: backend(draft=lambda *_: None)),
    "draft: a dict": (BACKENDS, plan, lambda: backend(draft=lambda *_: {})),
    "draft: numbers as rows": (BACKENDS, plan, lambda: backend(draft=lambda *_: PlanDraft((1,)))),  # type: ignore[arg-type]
    "draft: no rows": (BACKENDS, plan, lambda: backend(draft=lambda *_: PlanDraft(None))),  # type: ignore[arg-type]
    "draft: fails": (BACKENDS, plan, lambda: backend(draft=fails)),
    "compile: fails": (BACKENDS, compiled, lambda: backend(compile=fails)),
    "parts: numbers": (CUTS, plan_offline, lambda: Acme(CUTS, lambda: {"e0": 5})),
    "describe: a list": (BACKENDS, described, lambda: backend(describe=lambda _: ["a"])),
    "describe: fails": (BACKENDS, described, lambda: backend(describe=fails)),
    "attachments: None": (BACKENDS, plan_read, lambda: backend(attachments=lambda _: None)),
    "attachments: texts": (BACKENDS, plan_read, lambda: backend(attachments=lambda _: {"a": "b"})),
    "attachments: fail": (BACKENDS, plan_read, lambda: backend(attachments=fails)),
    "module: attachments": (BACKENDS, load, lambda: own(attachments={"a": 1})),
    "reopen: None": (BACKENDS, copied, lambda: own(reopen=lambda: None)),
    "reopen: fails": (BACKENDS, copied, lambda: own(reopen=fails)),
}


FAILURES = {
    # programs and files may be at fault, too
    "compile: fails": refitkit.CompileError,
    "describe: fails": refitkit.UnsupportedTargetError,
    "attachments: fail": refitkit.UnsupportedTargetError,
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_wrong_value_outside_of_refits(case: str) -> None:
    hook, do, give = OUTSIDE[case]
    others: list[object] = [FakePlugin()] if hook != BACKENDS else [Cutter()]
    kind = FAILURES.get(case, refitkit.PluginError)
    with pytest.raises(kind) as info:
        do(refitkit.Pipeline(plugins=[*others, give()]))
    text = str(info.value)
    assert f"plugin {NAME!r}" in text
    assert hook in text


class Cutter:
    """Cuts programs for the backend of a plugin."""

    name = "cutter"

    @refitkit.hookimpl
    def refitkit_partition(self, program: Any, backend: str) -> Any:
        return parts_of(program) if backend == BACKEND else None
