"""State_dicts, live modules and programs as sources."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from tests.fakes import CountingMapping


def opened(thing: Any) -> Any:
    return Pipeline().open_weights(thing)


# -- mappings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType, CountingMapping])
def test_any_mapping_is_a_state_dict(kind: Any) -> None:
    source = opened(kind({"a": torch.ones(2), "b": torch.ones(3)}))
    assert list(source.names()) == ["a", "b"]
    assert source.info("b").shape == (3,)
    assert source.get("a").tolist() == [1, 1]
    assert "2 entries" in source.description


def test_opening_a_mapping_reads_nothing() -> None:
    tensors = CountingMapping({"a": torch.ones(1), "b": torch.ones(2)})
    source = opened(tensors)
    list(source.names())
    assert not tensors.reads
    source.get("a")
    assert dict(tensors.reads) == {"a": 1}


def test_keys_that_are_no_names() -> None:
    with pytest.raises(SourceError) as info:
        opened({"a": torch.ones(1), 3: torch.ones(1), None: torch.ones(1), ("b",): torch.ones(1)})
    assert [p.subject for p in info.value.problems] == ["3", "None", "('b',)"]


def test_entries_that_are_no_tensors_are_told_not_raised() -> None:
    """Only where the engine needs them do they matter: the check decides."""
    source = opened({"w": torch.ones(1), "step": 3})
    assert "int" in source.info("step").unusable
    with pytest.raises(SourceError, match="'step'"):
        source.get("step")


def test_an_empty_mapping_is_a_source() -> None:
    assert list(opened({}).names()) == []


# -- modules ----------------------------------------------------------------------------------


class Everything(torch.nn.Module):
    """Parameters, a tie, buffers of both kinds, extra state, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.tied = self.weight
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("lost", torch.arange(2.0), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.child = torch.nn.BatchNorm1d(2)
        self.child.register_buffer("lost", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> Any:
        return {"not": "a weight"}

    def set_extra_state(self, state: Any) -> None:
        """There is none."""


def test_a_module_gives_what_its_state_dict_holds() -> None:
    module = Everything()
    source = opened(module)
    assert set(source.names()) == {
        "weight", "tied", "kept",
        "child.weight", "child.bias", "child.running_mean", "child.running_var",
        "child.num_batches_tracked",
    }  # fmt: skip
    assert all(source.info(name).persistent for name in source.names())
    assert source.left_out == {"lost": module.lost, "child.lost": module.child.lost}
    assert source.get("tied").data_ptr() == source.get("weight").data_ptr()
    assert source.description == "a live Everything"


def test_a_module_in_training_is_not_disturbed() -> None:
    module = torch.nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    grad = module.weight.grad
    source = opened(module)
    got = source.get("weight")
    assert not got.requires_grad
    assert module.weight.requires_grad
    assert module.weight.grad is grad
    assert module.training


def test_a_module_is_read_as_it_is_when_it_is_read() -> None:
    module = torch.nn.Linear(1, 1)
    source = opened(module)
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert source.get("weight").item() == 7.0


def test_parametrizations_keep_their_own_names() -> None:
    """As ``torch.export`` names them."""
    module = parametrizations.weight_norm(torch.nn.Linear(2, 2))
    names = set(opened(module).names())
    assert names == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    program = torch.export.export(module, (torch.ones(1, 2),))
    assert names == set(program.state_dict)


def test_a_parametrization_is_not_computed_to_be_opened() -> None:
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            return x

    module = torch.nn.Linear(2, 2)
    parametrize.register_parametrization(module, "weight", Counted())
    before = Counted.calls
    source = opened(module)
    source.get("parametrizations.weight.original")
    assert Counted.calls == before


def test_a_module_without_data_says_so() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    assert "meta" in opened(module).info("weight").unusable
    assert "Uninitialized" in opened(torch.nn.LazyLinear(2)).info("weight").unusable


# -- programs ---------------------------------------------------------------------------------


class WithConstants(torch.nn.Module):
    """A parameter, a non-persistent buffer, and a tensor that export lifts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("lost", torch.full((2,), 3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.lost + torch.tensor([1.0, 2.0])


def test_a_program_gives_its_state_and_its_constants() -> None:
    program = torch.export.export(WithConstants(), (torch.ones(2),))
    source = opened(program)
    kinds = {name: source.info(name).persistent for name in source.names()}
    assert kinds["weight"]
    assert not kinds["lost"]
    assert len(kinds) == 3
    assert source.get("lost").tolist() == [3, 3]
    assert source.description == "an ExportedProgram"
    assert not source.get("weight").requires_grad
    assert program.state_dict["weight"].requires_grad
