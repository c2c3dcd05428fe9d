"""Faults of the reference that show only with its own code: docs/explanation/differences.md."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit import compat
from refitkit.builtin.torch_tensorrt import LAYER_TYPES, networks
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.parts import lower, partition_program
from refitkit.builtin.torch_tensorrt.recording import interpret, own_copy
from refitkit.builtin.torch_tensorrt.settings import settings_from_options
from refitkit.builtin.torch_tensorrt.targets import inspect_target
from refitkit.errors import PlanMismatchError
from refitkit.program.bits import same_bits
from refitkit.protocols import Tools
from tests.tensorrt.models import CASES
from tests.tensorrt.targets import (
    Model,
    build_parts,
    compilation_settings,
    compiled,
    upstream_part,
    use_runtime,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.parts import ProgramPart

pytestmark = pytest.mark.usefixtures("torch_tensorrt")

TYPES = {one.name: one for one in LAYER_TYPES}


def part_of(program: ExportedProgram) -> tuple[ProgramPart, Any]:
    """The one accelerated part of a program, and the settings that it was cut with."""
    settings = settings_from_options({"min_block_size": 1})
    (part,) = (
        p for p in partition_program(lower(own_copy(program), settings), settings).parts if p.inputs
    )
    return part, settings


def test_values_that_are_not_contiguous_outlive_their_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``to_trt_weights`` gives TensorRT the address of a contiguous copy that nobody keeps."""
    record = upstream_part("dynamo.conversion._ConversionContext").ConversionContext.record_weight

    def scattered(self: Any, name: str, value: torch.Tensor) -> None:
        turned = value.detach().mT.contiguous().mT if value.ndim > 1 else value
        record(self, name, turned)

    monkeypatch.setattr(
        "torch_tensorrt.dynamo.conversion._ConversionContext.ConversionContext.record_weight",
        scattered,
    )
    part, settings = part_of(CASES["odd"].program(0))
    network = Network(part, settings, TYPES)
    turned = {name for name, value in network.recorded.items() if not value.is_contiguous()}
    kept = {value.data_ptr() for value in network.scanned.values()}
    assert turned
    for name in turned:
        place = network._locations[name]
        read = networks.tensor_of(getattr(place.layer, place.attribute))
        assert read.data_ptr() in kept, name
        assert same_bits(read, network.recorded[name].contiguous().reshape(-1))


def test_a_program_gives_the_same_names_whenever_it_is_interpreted() -> None:
    """``get_node_name`` takes an item off the module stack at every call."""
    program = CASES["odd"].program(0)
    part, settings = part_of(program)
    first = Network(part, settings, TYPES).scanned.keys()
    assert Network(part, settings, TYPES).scanned.keys() != first  # the fault
    for _ in range(2):
        again, settings = part_of(program)
        assert Network(again, settings, TYPES).scanned.keys() == first


class Detached(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(torch.ops.aten.detach.default(x))


def test_the_callers_program_keeps_its_graph() -> None:
    """``pre_export_lowering`` works on the graph that it is given."""
    program = torch.export.export(Detached().eval(), (torch.ones(2, 4),))
    text, settings = str(program.graph), settings_from_options({"min_block_size": 1})
    lower(own_copy(program), settings)
    assert str(program.graph) == text
    lower(program, settings)
    assert str(program.graph) != text  # the fault


def test_the_callers_parameters_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """``offload_module_to_cpu`` moves the module's tensors, and with them the caller's."""
    utils = upstream_part("dynamo.utils")
    # here all are on the CPU: ``Module.to`` goes to another dtype in the way of another device
    monkeypatch.setattr(utils, "CPU_DEVICE", torch.float64)
    program = CASES["odd"].program(0)
    before = {name: value.dtype for name, value in program.state_dict.items()}
    utils.deallocate_module(own_copy(program).module())
    assert {name: value.dtype for name, value in program.state_dict.items()} == before
    utils.deallocate_module(program.module())
    assert {name: value.dtype for name, value in program.state_dict.items()} != before  # the fault


def test_the_drop_in_says_what_it_takes(torch_tensorrt: Any) -> None:
    """``needs_refit`` hides name, signature and documentation behind ``wrapper``."""
    theirs = torch_tensorrt.dynamo.refit_module_weights
    assert (theirs.__name__, theirs.__doc__) == ("wrapper", None)  # the fault
    ours = compat.refit_module_weights
    assert ours.__name__ == "refit_module_weights"
    said = set(re.findall(r"``(\w+)``", inspect.getdoc(ours) or ""))
    assert compat._signature().parameters.keys() <= said


class Other(Model):
    """Its parts have the same names, and it hands on one more tensor between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.cumsum(y * self.scale, 1) + torch.relu(y))  # type: ignore[no-any-return]


def test_children_of_the_same_names_are_not_the_same_engines(
    torch_tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference compares the names of children, and nothing else."""
    use_runtime(monkeypatch, torch_tensorrt, "python")
    executed = {"torch.ops.aten.mul.Tensor", "torch.ops.aten.cumsum.default"}
    settings = compilation_settings(torch_tensorrt, min_block_size=1, torch_executed_ops=executed)
    target = inspect_target(compiled(build_parts(torch_tensorrt), settings))
    assert target is not None
    tools = Tools(layer_types=TYPES)
    x = (torch.ones(2, 4),)
    assert interpret(torch.export.export(Model().eval(), x), target, tools).values
    with pytest.raises(PlanMismatchError) as info:
        interpret(torch.export.export(Other().eval(), x), target, tools)
    assert {p.kind for p in info.value.problems} == {"inputs", "outputs"}
