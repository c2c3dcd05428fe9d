"""Parts that torch executes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from refitkit.errors import WeightMismatchError
from refitkit.protocols import SupportsPartial, SupportsReadback, SupportsSpareBuffer
from tests.fakes import same_state
from tests.unit.builtin.torch_tensorrt.scenes import slot_values

if TYPE_CHECKING:
    from collections.abc import Callable


class Part(torch.nn.Module):
    """A tied parameter, a buffer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2)
        self.b = torch.nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.constant = torch.tensor([1.0, 2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.constant + self.count


@pytest.fixture
def part() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    traced = torch.fx.symbolic_trace(Part())
    for name in ("a", "b"):
        traced.get_submodule(name).bias = traced.get_submodule(name).bias  # stays a parameter
    return traced


@pytest.fixture
def engine(part: torch.fx.GraphModule) -> TorchPartEngine:
    return TorchPartEngine("part", part, mutable=("count",))


def held(engine: TorchPartEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.live.items()}


def others(engine: TorchPartEngine) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in engine.live.items()}


def test_all_tensors_are_slots(engine: TorchPartEngine) -> None:
    assert set(engine.slots) == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "count",
        "constant",
    }
    assert engine.slots["a.weight"].shape == (2, 2)
    assert engine.slots is engine.slots  # asked for once per row: never made anew
    assert all(slot.readable for slot in engine.slots.values())
    assert [name for name, slot in engine.slots.items() if slot.mutable] == ["count"]
    for kind in (SupportsPartial, SupportsReadback, SupportsSpareBuffer):
        assert isinstance(engine, kind)


def test_one_tensor_is_read_as_all_are(engine: TorchPartEngine, part: torch.fx.GraphModule) -> None:
    for name, tensor in engine.live.items():
        assert engine.read(name).data_ptr() == tensor.data_ptr()
        assert not engine.read(name).requires_grad
    part.odd = "text"
    for wrong in ("nothing", "a.nothing", "odd"):
        with pytest.raises(KeyError):
            engine.read(wrong)


def test_names_that_a_hook_gives_are_read_too(part: torch.fx.GraphModule) -> None:
    def renamed(module: Any, state: dict[str, Any], *_: Any) -> None:
        state["by.hook"] = state.pop("a.bias")

    part.register_state_dict_post_hook(renamed)
    engine = TorchPartEngine("part", part)
    assert engine.read("by.hook").data_ptr() == part.get_submodule("a").bias.data_ptr()


def test_tensors_are_written_in_place(engine: TorchPartEngine, part: torch.fx.GraphModule) -> None:
    before, new = held(engine), others(engine)
    addresses = {name: value.data_ptr() for name, value in engine.live.items()}
    x = torch.ones(1, 2)
    old_answer = part(x)
    staged = engine.stage(slot_values(engine, new))
    assert same_state(held(engine), before)
    assert staged.changed()
    staged.commit()
    assert same_state(held(engine), new)
    assert not torch.equal(part(x), old_answer)
    assert {name: value.data_ptr() for name, value in engine.live.items()} == addresses
    assert all(parameter.requires_grad for parameter in part.parameters())
    staged.rollback()
    assert same_state(held(engine), before)
    assert torch.equal(part(x), old_answer)


def test_callers_tensors_are_free_after_staging(engine: TorchPartEngine) -> None:
    new = others(engine)
    mine = {name: value.clone() for name, value in new.items()}
    staged = engine.stage(slot_values(engine, mine))
    for value in mine.values():
        value.zero_()
    staged.commit()
    assert same_state(held(engine), new)


def test_parts_of_a_part(engine: TorchPartEngine) -> None:
    before = held(engine)
    staged = engine.stage_partial(slot_values(engine, {"a.bias": torch.ones(2)}))
    staged.commit()
    assert same_state(held(engine), {**before, "a.bias": torch.ones(2)})
    staged.rollback()
    assert same_state(held(engine), before)
    same = engine.stage_partial(slot_values(engine, {"a.bias": before["a.bias"]}))
    assert not same.changed()


def test_what_calls_write_between_staging_and_commit_is_what_a_rollback_restores(
    engine: TorchPartEngine,
) -> None:
    staged = engine.stage(slot_values(engine, others(engine)))
    engine.live["count"].fill_(5)
    staged.commit()
    staged.rollback()
    assert engine.read("count").item() == 5


def test_a_rollback_without_a_commit_writes_nothing(engine: TorchPartEngine) -> None:
    before = held(engine)
    staged = engine.stage(slot_values(engine, others(engine)))
    staged.discard()
    staged.rollback()
    assert same_state(held(engine), before)


def test_all_problems_at_once(engine: TorchPartEngine) -> None:
    bad: dict[str, Any] = {
        **others(engine),
        "a.bias": torch.ones(3),
        "count": torch.ones(1),
        "b.weight": torch.zeros(2, 2),
        "other": torch.ones(1),
    }
    with pytest.raises(WeightMismatchError) as info:
        engine.stage(slot_values(engine, bad))
    found = {(p.subject, p.kind) for p in info.value.problems}
    assert found == {
        ("a.bias", "value"),
        ("count", "value"),
        ("b.weight", "tie"),
        ("other", "unexpected"),
    }
    with pytest.raises(WeightMismatchError, match="count: missing"):
        engine.stage(slot_values(engine, {"a.bias": torch.ones(2)}))


def test_expanded_tensors_cannot_be_written(
    engine: TorchPartEngine, part: torch.fx.GraphModule
) -> None:
    part.constant = torch.ones(1).expand(2)
    with pytest.raises(WeightMismatchError, match="constant: layout"):
        engine.stage(slot_values(engine, others(engine)))


def test_freeing_copies(engine: TorchPartEngine) -> None:
    assert engine.free_spare() == 0
    stage: Callable[[], Any] = lambda: engine.stage(slot_values(engine, others(engine)))  # noqa: E731
    stage()
    assert engine.free_spare() == engine.memory.bytes
    new = others(engine)
    stage().commit()
    assert same_state(held(engine), new)
