"""The op, its converter and its mapper, on engines that TensorRT-RTX builds without a GPU.

The judge is TensorRT's builder, which is deterministic: what was refitted has to be, byte for byte,
what is built of the new weights from scratch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch
from refitkit_example.op import LAYER, gate

import refitkit

if TYPE_CHECKING:
    from pathlib import Path

BACKEND = "tensorrt_network"
OPTIONS = {"min_block_size": 1, "imports": ["refitkit_example.converter"]}
GATES = [f"_run_on_acc_0/{LAYER}{fqn} CONSTANT" for fqn in ("gate", "last.gate")]

pytestmark = pytest.mark.skipif(
    find_spec("torch_tensorrt") is None, reason="torch_tensorrt is not installed: refitkit[rtx]"
)


class Last(torch.nn.Module):
    """A gate deeper in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gate(x, self.gate, "last.gate")


class Net(torch.nn.Module):
    """Two layers and two gates."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(4, 6)
        self.gate = torch.nn.Parameter(torch.randn(6))
        self.head = torch.nn.Linear(6, 3)
        self.last = Last()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(gate(self.linear(x), self.gate, "gate")))


def program(seed: int) -> torch.export.ExportedProgram:
    """The same model with other weights."""
    return torch.export.export(Net(seed).eval(), (torch.ones(2, 4),))


@pytest.fixture(scope="module")
def first() -> refitkit.CompiledModule:
    """The model with weights 0, never refitted: refit copies of it."""
    return refitkit.compile(program(0), BACKEND, OPTIONS, prove=False)


@pytest.fixture
def compiled(first: refitkit.CompiledModule) -> refitkit.CompiledModule:
    """The model with weights 0, to refit."""
    return refitkit.Pipeline().copy(first)


def without(**settings: object) -> refitkit.Pipeline:
    """A pipeline as it is where this plugin is not installed."""
    return refitkit.Pipeline({"no_plugins": {"example"}, **settings})


def built(compiled: refitkit.CompiledModule, folder: Path) -> bytes:
    """The engine, as TensorRT-RTX reads it."""
    compiled.save(folder / "some.engine")
    return (folder / "some.engine").read_bytes()


def values(compiled: refitkit.CompiledModule) -> dict[str, torch.Tensor]:
    """Copies of what all slots hold."""
    return {
        f"{name}/{slot}": engine.read(slot).clone()
        for name, engine in compiled.engines.items()
        for slot in engine.slots
    }


def test_the_op_is_what_it_says() -> None:
    x, weight = torch.randn(5, 7), torch.randn(7)
    wanted = x * torch.tanh(weight.double()).float()
    assert torch.equal(gate(x, weight, "w"), wanted)
    assert torch.equal(gate(x, torch.stack([weight] * 2, 1)[:, 0], "w"), wanted)  # not contiguous


def test_the_ledger_says_that_nobody_saw_where_gates_come_from(
    first: refitkit.CompiledModule,
) -> None:
    states = {f"{row.slot.engine}/{row.slot.name}": row.state for row in first.plan.ledger}
    assert [name for name, state in states.items() if state == "unmapped"] == GATES
    assert set(states.values()) == {"unmapped", "recipe"}


def test_without_the_plugin_the_refit_is_refused_and_names_the_slots(
    compiled: refitkit.CompiledModule,
) -> None:
    before = values(compiled)
    pipeline = without(strategies=["recipe"])  # no run of the interpreter, which would take seconds
    with pytest.raises(refitkit.UnmappedSlotError) as info:
        pipeline.refit(compiled, program(1).state_dict)
    assert [problem.subject for problem in info.value.problems] == GATES
    after = values(compiled)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_the_plugin_a_gate_alone_cannot_be_refitted(
    compiled: refitkit.CompiledModule,
) -> None:
    with pytest.raises(refitkit.UnmappedSlotError) as info:
        without().refit(compiled, {"gate": torch.ones(6)}, partial=True)
    assert {problem.subject for problem in info.value.problems} >= set(GATES)


def test_with_the_plugin_the_engine_is_that_of_the_new_weights(
    compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    new = program(1)
    before = built(compiled, tmp_path)
    report = refitkit.refit(compiled, new.state_dict, verify="engine-bytes").report
    assert report.verification.ok
    served = {f"{row.engine}/{row.slot}": row.strategy for row in report.ledger}
    assert [name for name, strategy in served.items() if strategy == "example-gate"] == GATES
    assert set(served.values()) == {"example-gate", "recipe"}
    scratch = refitkit.compile(new, BACKEND, OPTIONS, prove=False)
    assert built(compiled, tmp_path) == built(scratch, tmp_path) != before


def test_there_and_back_again(compiled: refitkit.CompiledModule, tmp_path: Path) -> None:
    before = built(compiled, tmp_path)
    for seed in (1, 0):
        refitkit.refit(compiled, program(seed).state_dict)
    assert built(compiled, tmp_path) == before


def test_a_gate_alone(compiled: refitkit.CompiledModule) -> None:
    before, weight = values(compiled), torch.linspace(-9, 9, 3)
    refitkit.refit(compiled, {"last.gate": weight}, partial=True)
    after = values(compiled)
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert changed == GATES[1:]
    assert torch.equal(after[GATES[1]], torch.tanh(weight.double()).float())


def test_a_missing_weight_is_told(compiled: refitkit.CompiledModule) -> None:
    state = program(1).state_dict
    del state["gate"]
    with pytest.raises(refitkit.WeightMismatchError) as info:
        refitkit.refit(compiled, state)
    assert [(p.subject, p.kind) for p in info.value.problems] == [("gate", "missing")]


FROZEN = {**OPTIONS, "imports": ["looks_frozen"]}


def test_numbers_read_by_address_are_no_literal() -> None:
    options = {**OPTIONS, "imports": ["reads_by_address"]}
    compiled = refitkit.compile(program(0), BACKEND, options, prove=False)
    found = {row.state for row in compiled.plan.ledger if LAYER in row.slot.name}
    assert found == {"unmapped"}
    report = refitkit.refit(compiled, program(1).state_dict, verify="engine-bytes").report
    assert report.verification.ok


def test_where_a_constant_is_taken_for_a_literal_its_weight_reaches_no_slot() -> None:
    """Without the plugin nobody could serve it; with it, a mapper that is asked too late."""
    for pipeline in (without(), refitkit.Pipeline()):
        with pytest.raises(refitkit.NotRefittableError, match="reach no slot") as info:
            pipeline.compile(program(0), BACKEND, FROZEN, prove=False)
        assert [problem.subject for problem in info.value.problems] == ["gate", "last.gate"]
    first = refitkit.Pipeline({"strategies": ["example-gate", "recipe"]})
    unproved = first.compile(program(0), BACKEND, FROZEN, prove=False)
    before = values(unproved)
    with pytest.raises(refitkit.UnmappedSlotError, match="reach no slot") as info:
        refitkit.refit(unproved, program(1).state_dict)
    assert [problem.subject for problem in info.value.problems] == ["gate", "last.gate"]
    after = values(unproved)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_mapper_that_is_asked_first_serves_it_and_is_needed_from_then_on() -> None:
    first = refitkit.Pipeline({"strategies": ["example-gate", "recipe"]})
    compiled = first.compile(program(0), BACKEND, FROZEN)
    (need,) = [one for one in compiled.plan.data.needs if one.name == "example-gate"]
    assert (need.plugin, need.distribution) == ("example", "refitkit-example")
    assert sorted(need.slots) == sorted(GATES)
    new = program(1)
    for pipeline in (refitkit.Pipeline(), without()):
        with pytest.raises(refitkit.RefitError):
            pipeline.refit(compiled, new.state_dict)
    report = first.refit(compiled, new.state_dict, verify="engine-bytes").report
    assert report.verification.ok


def test_a_proved_module_is_refused_without_the_plugin(tmp_path: Path) -> None:
    compiled, alone = refitkit.compile(program(0), BACKEND, OPTIONS), without()
    compiled.save(tmp_path / "module")
    before = values(compiled)
    with pytest.raises(refitkit.PlanMismatchError, match="needs plugins") as info:
        alone.refit(compiled, program(1).state_dict)
    (problem,) = info.value.problems
    assert "'example'" in problem.wanted
    assert "refitkit-example" in problem.hint
    after = values(compiled)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    needs = alone.describe(tmp_path / "module")["needs"]
    assert any("example-gate" in text for text in needs)
    with pytest.raises(refitkit.UnsupportedTargetError, match="example-gate"):
        alone.load(tmp_path / "module")  # its converter is not imported here, either


def test_the_converter_passes_the_proof() -> None:
    refitkit.compile(program(0), BACKEND, OPTIONS)
