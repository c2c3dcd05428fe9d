"""The opened module: calls, probes, settings of its engines as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import LAYER_TYPES
from refitkit.builtin.torch_tensorrt.module import EngineFactory, TorchTensorRTOpened
from refitkit.builtin.torch_tensorrt.settings import settings_text
from refitkit.builtin.torch_tensorrt.targets import Target
from refitkit.errors import EngineError, InputMismatchError, PlanMismatchError
from refitkit.protocols import Tools
from tests.tensorrt.targets import compilation_settings

if TYPE_CHECKING:
    from refitkit.protocols import OpenedModule


TYPES = {one.name: one for one in LAYER_TYPES}


class Handle:
    """An engine that counts how often it is set up."""

    def __init__(self) -> None:
        self.set_ups = 0

    def set_up(self) -> None:
        self.set_ups += 1


class Counting(torch.nn.Module):
    """Changes a buffer in place, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor, *, fail: bool = False) -> torch.Tensor:
        self.calls += 1
        if fail:
            raise RuntimeError("the runtime said no")
        return x * self.scale * self.calls


def module_of(target: torch.nn.Module) -> tuple[TorchTensorRTOpened, Handle]:
    handle: Any = Handle()
    part = torch.fx.symbolic_trace(torch.nn.Identity())
    understood = Target(
        module=target, engines={"_run_on_acc_0": handle}, torch_parts={"rest": part}, settings=None
    )
    factory: Any = EngineFactory(engine=lambda one: ("engine", one), torch_part=lambda *one: one)
    return TorchTensorRTOpened(understood, factory, {"plan": b"1"}), handle


def test_it_lists_engines_and_parts() -> None:
    module, handle = module_of(Counting())
    assert module.engines["_run_on_acc_0"] == ("engine", handle)
    assert module.engines["rest"] == ("rest", module.target.torch_parts["rest"])
    assert module.attachments == {"plan": b"1"}
    opened: OpenedModule = module
    assert opened.backend == "torch_tensorrt"


def test_calls_have_no_gradient_history_and_set_engines_up() -> None:
    module, handle = module_of(Counting())
    output = module.run((torch.ones(1),), {})
    assert torch.equal(output, torch.tensor([2.0]))
    assert not output.requires_grad
    assert handle.set_ups == 1
    assert torch.is_grad_enabled()
    module.synchronize()


def test_a_probe_puts_buffers_back() -> None:
    module, _ = module_of(Counting())
    module.run((torch.ones(1),), {})
    buffer = module.target.module.calls
    assert torch.equal(module.probe((torch.ones(1),), {}), torch.tensor([4.0]))
    assert torch.equal(buffer, torch.ones(1))
    with pytest.raises(EngineError):
        module.probe((torch.ones(1),), {"fail": True})
    assert torch.equal(buffer, torch.ones(1))
    assert module.target.module.calls is buffer


def test_a_probe_of_buffers_that_were_made_under_inference_mode() -> None:
    module, _ = module_of(Counting())
    with torch.inference_mode():
        module.target.module.calls = torch.zeros(1)
    assert torch.equal(module.probe((torch.ones(1),), {}), torch.tensor([2.0]))
    assert torch.equal(module.target.module.calls, torch.zeros(1))


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2), {}), ((1,), {"other": 2}), ((1,), {"x": 1})]
)
def test_inputs_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module, handle = module_of(Counting())
    with pytest.raises(InputMismatchError):
        module.run(args, kwargs)
    assert handle.set_ups == 0


def test_a_failing_runtime_is_an_engine_error() -> None:
    module, _ = module_of(Counting())
    with pytest.raises(EngineError, match="the runtime said no"):
        module.run((torch.ones(1),), {"fail": True})


def test_settings_of_a_fingerprint_are_those_that_change_slots(torch_tensorrt: Any) -> None:
    plain = compilation_settings(torch_tensorrt)
    elsewhere = compilation_settings(
        torch_tensorrt,
        device=torch_tensorrt.Device("cuda:1"),
        timing_cache_path="elsewhere",
        dryrun=True,
        lazy_engine_init=True,
        offload_module_to_cpu=True,
        optimization_level=5,
    )
    assert settings_text(plain) == settings_text(elsewhere)
    for name, value in {
        "min_block_size": 3,
        "decompose_attention": True,
        "torch_executed_ops": {torch.ops.aten.sin.default},
        "use_fp32_acc": True,
        "truncate_double": True,
    }.items():
        other = settings_text(compilation_settings(torch_tensorrt, **{name: value}))
        changed = {key for key in other if other[key] != settings_text(plain)[key]}
        assert changed == {name}


def test_ops_have_the_same_text_as_objects_and_as_names(torch_tensorrt: Any) -> None:
    op = torch.ops.aten.sin.default
    texts = [
        settings_text(compilation_settings(torch_tensorrt, torch_executed_ops={one}))
        for one in (op, "torch.ops.aten.sin.default")
    ]
    assert texts[0] == texts[1]


# -- programs ---------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, act: Any = torch.relu) -> None:
        super().__init__()
        self.a, self.b, self.act = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(x)))


def program_of(seed: int, act: Any = torch.relu) -> Any:
    torch.manual_seed(seed)
    return torch.export.export(Net(act).eval(), (torch.randn(2, 4),))


class Named:
    """An engine as a target lists it."""

    name, input_names, output_names = "_run_on_acc_0", ("x",), ("output0",)


def planned_module(torch_tensorrt: Any) -> TorchTensorRTOpened:
    engine: Any = Named()
    understood = Target(
        module=Net(),
        engines={"_run_on_acc_0": engine},
        torch_parts={"kept": torch.fx.symbolic_trace(torch.nn.Identity())},
        settings=compilation_settings(torch_tensorrt, min_block_size=1),
    )
    factory: Any = EngineFactory(engine=lambda one: one, torch_part=lambda *one: one)
    return TorchTensorRTOpened(understood, factory)


def test_values_are_those_of_the_program_and_outlive_the_run(torch_tensorrt: Any) -> None:
    module, program = planned_module(torch_tensorrt), program_of(1)
    values = module.rebuilt(program, Tools(layer_types=TYPES))["_run_on_acc_0"]
    weights = program.state_dict
    assert torch.equal(values["a/linear_weight CONSTANT"], weights["a.weight"].reshape(-1))
    assert torch.equal(values["b/linear_1_bias CONSTANT"], weights["b.bias"])


def test_once_planned_a_program_with_other_ops_is_refused(torch_tensorrt: Any) -> None:
    """Its slots, inputs and outputs are the same, and the engine would go on with its own ops."""
    module, tools = planned_module(torch_tensorrt), Tools(layer_types=TYPES)
    module.interpreted(program_of(0), tools)
    module.interpreted(program_of(1), tools)
    with pytest.raises(PlanMismatchError) as info:
        module.rebuilt(program_of(1, torch.sigmoid), tools)
    assert any("sigmoid" in p.found and "relu" in p.wanted for p in info.value.problems)
    module.rebuilt(program_of(2), tools)


def test_a_program_with_other_parts_is_refused(torch_tensorrt: Any) -> None:
    module = planned_module(torch_tensorrt)
    other = torch.export.export(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(2, 4),), dynamic_shapes=None
    )
    with pytest.raises(PlanMismatchError) as info:
        module.interpreted(other, Tools(layer_types=TYPES))
    assert {p.kind for p in info.value.problems} == {"inputs"}
