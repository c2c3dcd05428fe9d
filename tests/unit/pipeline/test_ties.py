"""Refits of slots that are computed of a weight with several names: whole, in part, by delta."""

from __future__ import annotations

import pytest
import torch

from refitkit.errors import UnmappedSlotError, WeightMismatchError
from tests.fakes import (
    FakeModule,
    OpenEngine,
    call_row,
    leaf_for,
    make_plan,
    op_call,
    recipe_row,
    same_state,
)
from tests.unit.pipeline.test_delta import Scene


def tied() -> Scene:
    """``computed`` of the tied weight and ``b``, ``as it is`` the weight, ``other`` of ``b``."""
    engine = OpenEngine("e0", {n: torch.zeros(2) for n in ("computed", "as it is", "other")})
    computed, plain, other = engine.slots.values()
    plan = make_plan(
        [
            call_row(computed, 1, "w", "twin", "b"),
            recipe_row(plain, "w", "twin"),
            call_row(other, 0, "b"),
        ],
        leaves=[leaf_for(other, fqn=name) for name in ("w", "twin", "b")],
        ties=[("w", "twin")],
        calls=[op_call("neg.default", "@b"), op_call("mul.Tensor", "@w", "@b")],
    )
    return Scene(FakeModule([engine]), plan)


def given(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), value) for name, value in values.items()}


def held(w: float, b: float) -> dict[str, torch.Tensor]:
    return given(**{"computed": w * b, "as it is": w, "other": -b})


@pytest.mark.parametrize("names", [("w",), ("twin",), ("w", "twin")], ids=" ".join)
def test_any_name_serves_all_slots(names: tuple[str, ...]) -> None:
    scene = tied()
    assert scene.refit(given(**dict.fromkeys(names, 3.0), b=2.0)) == set(held(0, 0))
    assert same_state(scene.holds(), held(3.0, 2.0))


@pytest.mark.parametrize("how", [{}, {"partial": True}, {"delta": True}], ids=str)
def test_a_broken_tie_stops_every_refit(how: dict[str, bool]) -> None:
    scene = tied()
    scene.refit(given(w=3.0, b=2.0))
    with pytest.raises(WeightMismatchError) as info:
        scene.refit(given(w=3.0, twin=4.0, b=2.0), **{"delta": False, **how})
    assert [(p.subject, p.kind) for p in info.value.problems] == [("twin", "tie broken")]
    assert same_state(scene.holds(), held(3.0, 2.0))


def test_another_name_of_the_same_value_is_no_change() -> None:
    scene = tied()
    scene.refit(given(w=3.0, b=2.0))
    assert scene.refit(given(twin=3.0, b=2.0)) == set()
    assert scene.refit(given(twin=5.0, b=2.0)) == {"computed", "as it is"}
    assert scene.refit(given(w=5.0, twin=5.0, b=4.0)) == {"computed", "other"}
    assert same_state(scene.holds(), held(5.0, 4.0))


def test_a_refit_in_part_takes_either_name_and_needs_all_else() -> None:
    scene = tied()
    scene.refit(given(w=3.0, b=2.0))
    with pytest.raises(UnmappedSlotError, match="computed"):
        scene.refit(given(twin=7.0), delta=False, partial=True)
    assert same_state(scene.holds(), held(3.0, 2.0))
    scene.refit(given(twin=7.0, b=2.0), delta=False, partial=True)
    assert same_state(scene.holds(), held(7.0, 2.0))
