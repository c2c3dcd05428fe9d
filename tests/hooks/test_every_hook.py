"""Every hook, called by the verb that calls it, with every argument that its specification has.

One test for each hook, called ``test_`` and the hook's name; the last tests see to it that none is
missing, and that each implements its hook with the exact arguments: a new argument is a new line
here, and so is one that goes.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import pytest
import torch

import refitkit
from refitkit import hookspecs
from refitkit.cli.main import main
from refitkit.errors import Problem, VerificationError, WeightMismatchError
from refitkit.host import make_host
from refitkit.model import LayerType, RefitReport, StageFinished, TensorInfo, VerificationResult
from refitkit.pipeline import Pipeline
from refitkit.protocols import Made, Mapped, SlotValue, Tools, WeightGroup
from refitkit.recipe import TensorMap
from tests.fakes import (
    BACKEND,
    FakeBackend,
    FakeModule,
    FakePlugin,
    OpenEngine,
    make_module,
    parts_of,
    plan_for,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from refitkit.config import Config
    from refitkit.protocols import WeightSource

HOOKS = {name: value for name, value in vars(hookspecs).items() if name.startswith("refitkit_")}


@dataclass
class Called:
    """Arguments of calls, in order."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    @property
    def once(self) -> tuple[Any, ...]:
        """The arguments of the only call."""
        (arguments,) = self.calls
        return arguments


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e0 = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e0(x)


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Net().eval(), (torch.ones(1, 3),))


def opened(pipeline: Pipeline) -> refitkit.CompiledModule:
    return pipeline.load(make_module())


def new_weights(compiled: refitkit.CompiledModule, fill: float = 3.0) -> dict[str, torch.Tensor]:
    module: Any = compiled.opened
    return weights_for(module, fill)


# -- one test for each hook ---------------------------------------------------------------------


def test_refitkit_register_backends() -> None:
    mine = FakeBackend()

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
            called(register)
            register(mine)

    called = Called()
    pipeline = Pipeline(plugins=[Plugin()])
    assert not called.calls
    assert pipeline.backend(BACKEND) is mine
    assert pipeline.backend(BACKEND) is mine
    assert len(called.calls) == 1


def test_refitkit_load_module() -> None:
    module = make_module()

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_load_module(self, target: object, config: Config, tools: Tools) -> Any:
            called(target, config, tools)
            return module if target == "mine://model" else None

    called = Called()
    pipeline = Pipeline(plugins=[Plugin()])
    assert pipeline.load("mine://model").opened is module
    target, config, tools = called.once
    assert (target, config) == ("mine://model", pipeline.config)
    assert "CONVOLUTION" in tools.layer_types
    with pytest.raises(refitkit.UnsupportedTargetError):
        pipeline.load("others://model")


def test_refitkit_load_weights() -> None:
    mine = TensorMap({"w": torch.ones(1)}, "weights of the hub")

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_load_weights(
            self,
            source: object,
            config: Config,
            open_weights: Callable[[object], WeightSource],
        ) -> Any:
            called(source, config)
            if source == "hub://twice":
                return open_weights("hub://weights")
            return mine if source == "hub://weights" else None

    called = Called()
    pipeline = Pipeline(plugins=[Plugin()])
    assert pipeline.open_weights("hub://weights") is mine
    assert called.once == ("hub://weights", pipeline.config)
    assert pipeline.open_weights("hub://twice") is mine
    assert [source for source, _ in called.calls[1:]] == ["hub://twice", "hub://weights"]
    assert pipeline.open_weights({"a": torch.ones(1)}) is not mine


def test_refitkit_partition() -> None:
    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_partition(
            self,
            program: torch.export.ExportedProgram,
            module: Any,
            backend: str,
            options: Mapping[str, Any],
            config: Config,
            tools: Tools,
        ) -> Mapping[str, Any] | None:
            called(program, module, backend, options, config, tools)
            return {"mine": program.state_dict} if backend == BACKEND else None

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    exported = program()
    plan = pipeline.plan(exported, backend=BACKEND, options={"depth": 3})
    assert {row.slot.engine for row in plan.ledger} == {"mine"}
    given, module, backend, options, config, tools = called.once
    assert given is exported
    assert (module, backend, options, config) == (None, BACKEND, {"depth": 3}, pipeline.config)
    assert "CONSTANT" in tools.layer_types


def test_refitkit_mapping_strategies() -> None:
    class Ones:
        name, priority = "ones", 1

        def map(self, request: Any) -> Mapped:
            called(request)
            slots = [row.slot for row in request.wanted]
            return Mapped({s.key: SlotValue(s, "ones", (), lambda s=s: ones(s)) for s in slots})

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_mapping_strategies(self, config: refitkit.Config) -> list[Any]:
            assert isinstance(config, refitkit.Config)
            return [Ones()]

    def ones(slot: Any) -> torch.Tensor:
        return torch.ones(slot.shape)

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    report = pipeline.refit(compiled, new_weights(compiled)).report
    assert {row.strategy for row in report.ledger} == {"ones"}
    module: Any = compiled.opened
    assert all(bool((value == 1).all()) for value in module.holds().values())
    assert len(called.once[0].wanted) == len(report.ledger) == 2


def test_refitkit_weight_transports() -> None:
    class Mine:
        name = "mine"

        def open(self, init_info: Any, open_weights: Any) -> Mine:
            called(init_info, open_weights)
            return self

        def receive(self, update_info: Any) -> list[Any]:
            return [update_info["weights"]]

        def close(self) -> None: ...

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_weight_transports(self, config: Config) -> list[Any]:
            assert config is pipeline.config
            return [Mine()]

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    receiver = refitkit.WeightReceiver(compiled)
    receiver.init_weight_transfer_engine({"init_info": {"backend": "mine", "port": 3}})
    receiver.start_weight_update()
    receiver.update_weights(weights=new_weights(compiled))
    receiver.finish_weight_update()
    assert compiled.version == 1
    info, open_weights = called.once
    assert info == {"port": 3}
    assert open_weights({"a": torch.ones(1)}).names() == {"a"}


def test_refitkit_layer_types() -> None:
    pool = LayerType(name="POOL", interface="IPoolLayer", weights=(("values", "VALUES"),))

    class Backend(FakeBackend):
        def draft(self, parts: Any, module: Any, tools: Tools) -> Any:
            called(tools)
            return super().draft(parts, module, tools)

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
            register(Backend())

        @refitkit.hookimpl
        def refitkit_partition(self, program: Any, backend: str) -> Any:
            return parts_of(program) if backend == BACKEND else None

        @refitkit.hookimpl
        def refitkit_layer_types(self) -> list[LayerType]:
            return [pool]

    called = Called()
    Pipeline(plugins=[Plugin()]).plan(program(), backend=BACKEND)
    assert called.once[0].layer_types["POOL"] is pool


def test_refitkit_weight_transforms() -> None:
    class Doubled:
        """Makes the weight that the program reads of one that lies in the checkpoint as half."""

        name, priority = "doubled", 10

        def groups(self, request: Any) -> Iterable[WeightGroup]:
            if "w.half" in request.source.names():
                gives = {"w": TensorInfo(dtype="float32", shape=(2,))}
                yield WeightGroup(("w.half",), gives, lambda: self.made(request.source))

        def made(self, source: Any) -> Made:
            return Made({"w": source.get("w.half") * 2})

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_weight_transforms(self, config: Config) -> list[Any]:
            called(config)
            return [Doubled()]

    called = Called()
    pipeline = Pipeline({"plugin_settings": {"plugin": {"a": 1}}}, [FakePlugin(), Plugin()])
    module = FakeModule([OpenEngine("e0", {"w": torch.zeros(2)})])
    compiled = pipeline.load(module)
    pipeline.refit(compiled, {"w.half": torch.tensor([1.0, 2.0])}, plan=plan_for(module))
    assert module.holds()["e0/w"].tolist() == [2, 4]
    assert {one[0].plugin_settings["plugin"]["a"] for one in called.calls} == {1}


def test_refitkit_check() -> None:
    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_check(
            self,
            plan: Any,
            module: Any,
            source: Any,
            partial: bool,
            unchanged: Collection[str],
            deferred: Collection[str],
            same_headers: bool,
            config: Config,
        ) -> Iterable[Problem]:
            called(plan, module, source, partial, unchanged, deferred, same_headers, config)
            yield Problem("e0.bias", "not to my taste")

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    weights = new_weights(compiled)
    with pytest.raises(WeightMismatchError, match=r"e0\.bias: not to my taste"):
        pipeline.refit(compiled, weights)
    plan, module, source, partial, unchanged, deferred, same_headers, config = called.once
    assert not same_headers
    assert plan.data == compiled.plan.data
    assert module is compiled.opened
    assert set(source.names()) == set(weights)
    assert (partial, list(unchanged), config) == (False, [], pipeline.config)
    assert set(deferred) == set(weights)  # its engines can be read


def test_refitkit_verifiers() -> None:
    class Never:
        name = "never"

        def prepare(self, request: Any) -> Callable[[Any], VerificationResult]:
            called(request)
            return lambda _: VerificationResult(verifier="never", ok=False, note="as always")

    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_verifiers(self, config: refitkit.Config) -> list[Any]:
            assert isinstance(config, refitkit.Config)
            return [Never()]

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    with pytest.raises(VerificationError):
        pipeline.refit(compiled, new_weights(compiled), verify="never")
    assert called.once[0].module is compiled.opened
    assert pipeline.refit(compiled, new_weights(compiled), verify="none").report.changed


def test_refitkit_weights_changed() -> None:
    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_weights_changed(self, module: Any, report: RefitReport) -> None:
            called(module, report.outcome, module.holds())
            if len(called.calls) == 2:
                raise RuntimeError("its cache cannot be dropped")

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    pipeline.refit(compiled, new_weights(compiled, 3.0))
    with pytest.raises(refitkit.PluginError, match="its cache cannot be dropped"):
        pipeline.refit(compiled, new_weights(compiled, 9.0))
    modules, outcomes, held = zip(*called.calls, strict=True)
    assert set(map(id, modules)) == {id(compiled.opened)}
    assert outcomes == ("committed", "committed", "rolled-back")
    values = [one["e0/e0.weight"].flatten()[0].item() for one in held]
    assert values == [3.0, 9.0, 3.0]


def test_refitkit_event() -> None:
    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_event(self, event: Any) -> None:
            called(event)

    called = Called()
    pipeline = Pipeline(plugins=[FakePlugin(), Plugin()])
    compiled = opened(pipeline)
    pipeline.refit(compiled, new_weights(compiled))
    finished = [one.stage for (one,) in called.calls if isinstance(one, StageFinished)]
    assert {"map", "check", "stage", "commit"} <= set(finished)


def test_refitkit_register_commands(capsys: pytest.CaptureFixture[str]) -> None:
    class Plugin:
        name = "plugin"

        @refitkit.hookimpl
        def refitkit_register_commands(self, cli: click.Group) -> None:
            called(cli)
            cli.add_command(click.Command("hello", callback=lambda: click.echo("hello there")))

    called = Called()
    assert main(["hello"], [Plugin()]) == 0
    assert "hello there" in capsys.readouterr().out
    assert called.once[0].name == "refitkit"


# -- that none is missing -----------------------------------------------------------------------


def implementations() -> dict[str, dict[str, list[str]]]:
    """By test, the hooks that a plugin in it implements, with the names of their arguments."""
    tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        test.name.removeprefix("test_"): {
            node.name: [one.arg for one in node.args.args if one.arg != "self"]
            for node in ast.walk(test)
            if isinstance(node, ast.FunctionDef) and _is_marked(node)
        }
        for test in tests
    }


def _is_marked(node: ast.FunctionDef) -> bool:
    return "refitkit.hookimpl" in map(ast.unparse, node.decorator_list)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_with_its_exact_arguments(hook: str) -> None:
    found = implementations().get(hook, {})
    assert hook in found, f"write test_{hook}: a plugin that implements it, called by a verb"
    assert found[hook] == list(inspect.signature(HOOKS[hook]).parameters)


def test_every_test_of_a_hook_is_of_one_that_exists() -> None:
    named = {name for name in implementations() if name.startswith("refitkit_")}
    assert named == HOOKS.keys()


def test_the_host_knows_the_same_hooks() -> None:
    everything = SimpleNamespace(name="everything")
    for name in HOOKS:
        setattr(everything, name, refitkit.hookimpl(specname=name)(lambda: None))
    assert set(make_host(plugins=[everything]).plugins()[-1].hooks) == HOOKS.keys()


def test_offers_are_made_with_the_settings() -> None:
    seen: dict[str, Any] = {}

    class Configured:
        name = "configured"

        @refitkit.hookimpl
        def refitkit_verifiers(self, config: refitkit.Config) -> list[Any]:
            seen["verifiers"] = config.plugin_settings["configured"]
            return []

        @refitkit.hookimpl
        def refitkit_mapping_strategies(self, config: refitkit.Config) -> list[Any]:
            seen["strategies"] = config.plugin_settings["configured"]
            return []

    settings = {"plugin_settings": {"configured": {"limit": 3}}}
    refitkit.Pipeline(settings, plugins=[Configured()]).get_ready()
    assert seen == {"verifiers": {"limit": 3}, "strategies": {"limit": 3}}
