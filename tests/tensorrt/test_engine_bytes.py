"""The real builder judges refits: engine bytes are those of a build from scratch."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import NotRefittableError, Pipeline, PlanMismatchError, VerificationError
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.rebuild import RebuildStrategy
from refitkit.model import SlotState
from refitkit.protocols import Mapped, MappingStrategy, MapRequest, SlotValue
from tests.tensorrt.models import CASES, Case, Odd

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed: refitkit[rtx]"
)
BACKEND = "tensorrt_network"


def compiled_from(case: Case, seed: int = 0) -> refitkit.CompiledModule:
    return refitkit.compile(case.program(seed), BACKEND, case.settings, prove=False)


def bytes_of(compiled: refitkit.CompiledModule) -> dict[str, bytes]:
    opened: Any = compiled.opened
    return {name: opened.engine_bytes(name) for name in compiled.engines}


@pytest.mark.parametrize("name", CASES)
def test_a_refit_gives_the_bytes_of_a_build_from_scratch(name: str) -> None:
    case = CASES[name]
    compiled = compiled_from(case)
    before = bytes_of(compiled)
    report = refitkit.refit(compiled, case.program(1), verify="engine-bytes").report
    assert report.verification is not None
    assert report.verification.ok
    assert report.changed
    assert {row.strategy for row in report.ledger} == {"recipe"}
    assert SlotState.UNMAPPED not in {row.state for row in report.ledger}
    after = bytes_of(compiled)
    accelerated = [engine for engine, content in after.items() if content]
    assert len(accelerated) == case.engines
    weighty = [engine for engine in accelerated if compiled.engines[engine].slots]
    assert weighty
    assert all(after[engine] != before[engine] for engine in weighty)


def test_there_and_back_is_bit_equal() -> None:
    case = CASES["transposed"]
    compiled = compiled_from(case)
    first, a = bytes_of(compiled), case.model(0).state_dict()
    refitkit.refit(compiled, case.model(1).state_dict())
    assert bytes_of(compiled) != first
    refitkit.refit(compiled, a)
    assert bytes_of(compiled) == first
    assert compiled.version == 2


def test_sources_may_be_freed_and_overwritten_afterwards() -> None:
    case = CASES["odd"]
    compiled = compiled_from(case)
    weights = {name: value.clone() for name, value in case.model(1).state_dict().items()}
    refitkit.refit(compiled, weights)
    after = bytes_of(compiled)
    held = {slot.name: compiled.read(slot.name) for slot in compiled.slots}
    for value in weights.values():
        value.zero_()
    del weights
    gc.collect()
    assert all(torch.equal(compiled.read(name), value) for name, value in held.items())
    fresh = refitkit.compile(case.program(1), BACKEND, case.settings, prove=False)
    assert bytes_of(fresh) == after


class Meddling:
    """A plugin whose strategy does what ``rebuild`` does, and then meddles with the values."""

    name = "meddling"

    def __init__(self, meddle: Any) -> None:
        self.meddle = meddle

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> Iterable[MappingStrategy]:
        return [MeddlingStrategy(self.meddle)]


class MeddlingStrategy(RebuildStrategy):
    name = "meddling"  # type: ignore[assignment]
    priority = 1  # type: ignore[assignment]

    def __init__(self, meddle: Any) -> None:
        self.meddle = meddle

    def map(self, request: MapRequest) -> Mapped:
        values = dict(super().map(request).values)
        return Mapped(self.meddle(values))


def swap_equal_shapes(
    values: dict[tuple[str, str], SlotValue],
) -> dict[tuple[str, str], SlotValue]:
    """Two weights of one shape, each in the other's slot."""
    first, second = (
        next(key for key in values if key[1] == f"{name}/linear{number}_weight CONSTANT")
        for name, number in (("a", ""), ("b", "_2"))
    )
    one, other = values[first], values[second]
    values[first] = SlotValue(one.slot, "meddling", (), other.load)
    values[second] = SlotValue(other.slot, "meddling", (), one.load)
    return values


def eps_off(values: dict[tuple[str, str], SlotValue]) -> dict[tuple[str, str], SlotValue]:
    """One folded scale as another eps would make it: relatively wrong by a thousandth."""
    key = next(key for key in values if key[1].endswith(" SCALE"))
    right = values[key]
    values[key] = SlotValue(right.slot, "meddling", (), lambda: right.load() * 1.001)
    return values


@pytest.mark.parametrize("meddle", [swap_equal_shapes, eps_off])
def test_a_planted_error_in_one_slot_is_found_and_taken_back(meddle: Any) -> None:
    case = CASES["odd"]
    compiled = compiled_from(case)
    before = bytes_of(compiled)
    pipeline = Pipeline(plugins=[Meddling(meddle)])
    with pytest.raises(VerificationError) as info:
        pipeline.refit(compiled, case.program(1), verify="engine-bytes")
    assert info.value.report.outcome == "rolled-back"
    assert bytes_of(compiled) == before
    refitkit.refit(compiled, case.program(1), verify="engine-bytes")


def test_a_proof_by_trial_at_compile_time() -> None:
    case = CASES["odd"]
    compiled = refitkit.compile(case.program(0), BACKEND, case.settings)
    fresh = compiled_from(case)
    assert bytes_of(compiled) == bytes_of(fresh)
    assert compiled.version == 0


def test_a_program_of_another_model_is_refused_and_told_what_differs() -> None:
    case = CASES["odd"]
    compiled = compiled_from(case)
    before = bytes_of(compiled)

    class Longer(Odd):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {k: torch.sigmoid(v) for k, v in super().forward(x).items()}

    other = Case(Longer, case.shapes)
    with pytest.raises(PlanMismatchError) as info:
        refitkit.refit(compiled, other.program(1))
    assert any("sigmoid" in p.found for p in info.value.problems)
    assert bytes_of(compiled) == before


def test_a_partial_source_is_refused_with_every_name() -> None:
    case = CASES["odd"]
    compiled = compiled_from(case)
    weights = case.model(1).state_dict()
    del weights["b.bias"], weights["scale"]
    with pytest.raises(refitkit.WeightMismatchError) as info:
        refitkit.refit(compiled, weights)
    assert {p.subject for p in info.value.problems} == {"b.bias", "scale"}


def test_it_cannot_be_called_and_says_what_can_be_done() -> None:
    case = CASES["odd"]
    compiled = compiled_from(case)
    with pytest.raises(NotRefittableError, match="need a GPU"):
        compiled(*case.inputs())
    with pytest.raises(NotRefittableError) as info:
        refitkit.refit(compiled, case.program(1), inputs=case.inputs(), verify="outputs")
    assert "engine-bytes" in info.value.hint
