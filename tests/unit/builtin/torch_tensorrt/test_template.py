"""A program without its weights: what is kept, and what a damaged one is told."""

from __future__ import annotations

import json

import pytest
import torch

from refitkit.builtin.torch_tensorrt.network.planning import CONSTANTS, FACTS, GRAPH, Template
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.tied = self.weight
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("shift", torch.randn(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight + self.shift)[:, self.order] @ self.tied * torch.tensor(7.5)


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Model(), (torch.ones(2, 3),))


def test_integers_and_what_no_state_dict_holds_are_kept_and_weights_are_not(
    program: torch.export.ExportedProgram,
) -> None:
    members = Template.of(program).members()
    template = Template.from_members(members)
    assert {"order", "shift"} < template.constants.keys()
    assert "weight" not in template.constants
    again = template.program()
    mine, theirs = tensors_of(program), tensors_of(again)
    assert mine.keys() == theirs.keys()
    for name in template.constants:
        assert torch.equal(mine[name], theirs[name])
    assert (theirs["weight"] == 0.5).all()
    assert facts_of(again) == facts_of(program)
    weight = program.state_dict["weight"].detach().numpy().tobytes()
    assert not any(weight in content for content in members.values())


def test_it_does_not_follow_the_program(program: torch.export.ExportedProgram) -> None:
    template = Template.of(program)
    before = template.constants["order"].clone()
    with torch.no_grad():
        tensors_of(program)["order"].zero_()
    assert torch.equal(template.constants["order"], before)


@pytest.mark.parametrize("shape", [[2**61, 2**61], [2**45]])
def test_tensors_that_this_machine_cannot_hold_are_refused(
    program: torch.export.ExportedProgram, shape: list[int]
) -> None:
    members = Template.of(program).members()
    facts = json.loads(members[FACTS])
    facts["leaves"][0]["shape"] = shape
    members[FACTS] = json.dumps(facts).encode()
    with pytest.raises(ValueError, match="more than the memory"):
        Template.from_members(members)


@pytest.mark.parametrize("member", [GRAPH, FACTS, CONSTANTS])
def test_a_member_that_is_missing_is_noticed(
    program: torch.export.ExportedProgram, member: str
) -> None:
    members = Template.of(program).members()
    del members[member]
    with pytest.raises(KeyError):
        Template.from_members(members)
