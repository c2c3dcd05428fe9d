"""Weights that the graph reads and whose results reach no output: names that a source may lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import refitkit
from refitkit.errors import WeightMismatchError

if TYPE_CHECKING:
    from pathlib import Path

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    """A layer, and heads whose results nobody takes: in the graph, in a region, in branches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(8, 8)
        self.pooler = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        self.in_region = nn.Linear(8, 4)
        self.in_branches = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            hidden = self.body(x)
            aside = self.in_region(hidden)
        aside.relu_()
        torch.tanh(self.pooler(hidden))
        taken, _ = torch.cond(
            x.sum() > 0,
            lambda h: (h * 2, self.in_branches(h)),
            lambda h: (h - 1, self.in_branches(h) + 1),
            (hidden,),
        )
        return {"hidden": hidden, "taken": taken}


LIVE = ("body.weight", "body.bias")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dead") / "module.refit"
    refitkit.compile(torch.export.export(Model(0).eval(), (X,))).save(path)
    return path


def weights(seed: int, names: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    state = Model(seed).state_dict()
    return {name: state[name] for name in names or state}


def check(compiled: Any, seed: int) -> None:
    with torch.no_grad():
        expected = Model(seed)(X)
    for name, value in compiled(X).items():
        torch.testing.assert_close(value, expected[name])


def test_dead_weights_may_be_missing(saved: Path) -> None:
    compiled = refitkit.load(saved)
    report = refitkit.refit(compiled, weights(1, LIVE), inputs=(X,)).report
    assert report.verification
    assert report.verification.ok
    check(compiled, 1)
    refitkit.refit(compiled, weights(2), inputs=(X,))
    check(compiled, 2)
    refitkit.refit(compiled, weights(1, LIVE), inputs=(-X,), delta=True)
    check(compiled, 1)


def test_dead_weights_have_no_slot_or_a_value_in_the_plan(saved: Path) -> None:
    plan = refitkit.load(saved).plan
    assert plan is not None
    dead = {row.slot.name: str(row.state) for row in plan.ledger if row.slot.name not in LIVE}
    assert dead == {"in_branches.weight": "pinned", "in_branches.bias": "pinned"}
    used = {leaf.fqn: leaf.used for leaf in plan.data.leaves}
    assert used == {name: name in LIVE for name in weights(0)}


def test_shapes_of_dead_weights_are_checked(saved: Path) -> None:
    compiled = refitkit.load(saved)
    bad = weights(1) | {"pooler.0.weight": torch.ones(8, 9), "in_branches.bias": torch.ones(4)}
    with pytest.raises(WeightMismatchError) as caught:
        refitkit.refit(compiled, bad, inputs=(X,))
    assert {p.subject for p in caught.value.problems} == {"pooler.0.weight", "in_branches.bias"}
    check(compiled, 0)


def test_dead_weights_of_another_dtype(saved: Path) -> None:
    """The kept program runs its dead code, too: not on weights of another dtype."""
    compiled = refitkit.load(saved)
    halved = {name: value.bfloat16() for name, value in weights(1).items()}
    pipeline = refitkit.Pipeline(config={"rules": {"cast": "lossless"}})
    pipeline.refit(compiled, halved, inputs=(X,))
    with torch.no_grad():
        expected = torch.nn.functional.linear(
            X, halved["body.weight"].float(), halved["body.bias"].float()
        )
    torch.testing.assert_close(compiled(X)["hidden"], expected)
