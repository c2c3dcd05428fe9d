"""What no state_dict holds: it is never cast, and a live module gives what its state_dict gives."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from refitkit.builtin.merges.descriptions import WeightedAverage
from refitkit.errors import WeightMismatchError
from refitkit.model import Leaf, LeafKind
from refitkit.program import facts_of
from tests.fakes import (
    FakeModule,
    Loaded,
    OpenEngine,
    make_plan,
    pinned_row,
    recipe_row,
    same_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LEFT_OUT = "the module's buffers that no state_dict holds differ from the plan's, which stay: "


class Rotary(torch.nn.Module):
    """A weight, a counter, and buffers of several dtypes that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(4) / 7), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -float("inf"), 0.0, 1.5]), persistent=False)
        self.register_buffer("ids", torch.arange(4), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w * self.inv_freq + self.mask[self.ids] + self.steps


KEPT = ("inv_freq", "mask", "ids")


class Scene(Loaded):
    """A module in memory that was compiled from a float32 model."""

    def __init__(self, **rules: Any) -> None:
        model = Rotary()
        held = {"w": model.w.detach(), **dict(model.named_buffers())}
        engine = OpenEngine("e0", held)
        super().__init__(FakeModule([engine]), rules=rules)
        slots = engine.slots
        leaves = [
            Leaf(
                fqn=name,
                kind=LeafKind.NON_PERSISTENT_BUFFER if name in KEPT else LeafKind.BUFFER,
                dtype=str(value.dtype).removeprefix("torch."),
                shape=tuple(value.shape),
            )
            for name, value in held.items()
        ]
        self.compiled.plan = make_plan(
            [pinned_row(slots[n], n) if n in KEPT else recipe_row(slots[n]) for n in held],
            leaves=leaves,
            pinned={name: held[name].clone() for name in KEPT},
        )

    def refit(self, weights: Any, **how: Any) -> Any:
        return self.pipeline.refit(self.compiled, weights, **how).report


def exported(model: Rotary) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.ones(4, dtype=model.w.dtype),))


def file_of(model: Rotary, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


KINDS: dict[str, Callable[[Rotary, Path], Any]] = {
    "live module": lambda model, _: model,
    "state_dict": lambda model, _: model.state_dict(),
    "file": file_of,
    "program": lambda model, _: exported(model),
    "wrapped": lambda model, _: torch.nn.ModuleDict({"module": model}),
    "average of modules": lambda model, _: WeightedAverage([(model, 1), (model, 3)]),
    "average of programs": lambda model, _: WeightedAverage([(exported(model), 1)]),
    "state_dict of before": lambda model, _: {
        **model.state_dict(),
        **{name: value for name, value in model.named_buffers() if name != "ids"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "cast"), [("bfloat16", "any"), ("float16", "lossless")])
def test_it_is_never_cast(kind: str, dtype: str, cast: str, tmp_path: Path) -> None:
    """Whatever the weights are in, they bring no bits of what the plan keeps."""
    scene, lower = Scene(cast=cast), getattr(torch, dtype)
    before = scene.holds()
    model = Rotary().to(lower)
    report = scene.refit(KINDS[kind](model, tmp_path))
    wanted = {**before, "w": model.w.detach().float(), "steps": model.steps}
    assert same_state(scene.holds(), wanted)
    assert not any("differ" in note for note in report.notes)


def test_a_value_of_another_dtype_that_is_not_the_plans_is_refused() -> None:
    """It can neither be cast, as that loses bits, nor be left out, as it is another value."""
    other = Rotary()
    other.inv_freq.mul_(2)
    other.bfloat16()
    given = {**other.state_dict(), "inv_freq": other.inv_freq}
    for weights in (exported(other), given):
        scene = Scene(cast="any")
        before = scene.holds()
        with pytest.raises(WeightMismatchError, match="no state_dict holds it") as info:
            scene.refit(weights)
        assert [(p.subject, p.kind) for p in info.value.problems] == [("inv_freq", "dtype")]
        assert same_state(scene.holds(), before)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_live_module_with_other_values_keeps_the_plans_and_is_told_of(wrap: bool) -> None:
    scene, model = Scene(), Rotary()
    before = scene.holds()
    model.inv_freq.mul_(2)
    model.ids = model.ids.flip(0)
    report = scene.refit(torch.nn.ModuleDict({"module": model}) if wrap else model)
    assert same_state(scene.holds(), {**before, "w": model.w.detach(), "steps": model.steps})
    (note,) = [note for note in report.notes if note.startswith(LEFT_OUT)]
    assert note.startswith(f"{LEFT_OUT}inv_freq, ids (")
    assert not any(n.startswith(LEFT_OUT) for n in scene.refit(model.state_dict()).notes)


def test_a_program_and_names_in_a_state_dict_set_it() -> None:
    model = Rotary()
    model.inv_freq.mul_(2)
    for weights in (exported(model), {**model.state_dict(), "inv_freq": model.inv_freq}):
        scene = Scene()
        scene.refit(weights)
        assert torch.equal(scene.holds()["inv_freq"], model.inv_freq)


def test_another_shape_of_a_live_modules_buffer_does_not_matter() -> None:
    """As in its state_dict, which does not have it."""
    scene, model = Scene(), copy.deepcopy(Rotary())
    model.register_buffer("mask", torch.zeros(9), persistent=False)
    report = scene.refit(model)
    assert any(note.startswith(f"{LEFT_OUT}mask (") for note in report.notes)
    assert torch.equal(scene.holds()["w"], model.w.detach())


def test_differences_are_those_of_the_state_dict() -> None:
    scene, model = Scene(), Rotary()
    model.inv_freq.mul_(2)
    found = scene.pipeline.diff(scene.compiled, model)
    wanted = scene.pipeline.diff(scene.compiled, model.state_dict())
    assert found.rows == wanted.rows
    assert scene.pipeline.diff(model, model.state_dict()).summary == "nothing changed: 2 same"


class Tied(torch.nn.Module):
    """A buffer that is a weight under another name, and one that is a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("same", self.w.data, persistent=False)
        self.register_buffer("part", self.w.data[:2], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w + self.same + self.part.sum()


@pytest.mark.parametrize("kind", ["live module", "state_dict", "program"])
def test_what_follows_from_weights_is_cast_with_them(kind: str) -> None:
    program = torch.export.export(Tied(), (torch.ones(4),))
    facts = facts_of(program)
    engine = OpenEngine("e0", {"w": torch.zeros(4)})
    scene = Loaded(FakeModule([engine]), rules={"cast": "any"})
    pinned = {leaf.fqn: torch.zeros(4) for leaf in facts.leaves if leaf.kept}
    row = recipe_row(engine.slots["w"], "w", "same")
    scene.compiled.plan = make_plan([row], leaves=facts.leaves, ties=facts.ties, pinned=pinned)
    lower = Tied()
    lower.w.data = lower.w.data.bfloat16()
    lower.same, lower.part = lower.w.data, lower.w.data[:2]
    weights = {
        "live module": lower,
        "state_dict": lower.state_dict(),
        "program": torch.export.export(lower, (torch.ones(4),)),
    }[kind]
    report = scene.pipeline.refit(scene.compiled, weights).report
    assert same_state(scene.holds(), {"w": lower.w.detach().float()})
    assert not any("differ" in note for note in report.notes)
