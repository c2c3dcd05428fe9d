"""Tensors that share memory with weights follow a refit, as in the model after load_state_dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import refitkit
from refitkit import NotRefittableError, WeightMismatchError
from refitkit.model import SlotState
from tests.shared_memory import MODELS, after_load, exported, model_of, through_a_file

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def modules() -> dict[str, refitkit.CompiledModule]:
    return {name: refitkit.compile(exported(model_of(name)), prove=False) for name in MODELS}


def error(name: str, compiled: Any, state: dict[str, torch.Tensor]) -> float:
    wanted = after_load(name, state)
    found = compiled(*MODELS[name].inputs)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"delta": True}, {"partial": True}], ids=str)
def test_a_refit_answers_as_the_model_after_load_state_dict(
    modules: dict[str, refitkit.CompiledModule], name: str, options: dict[str, Any]
) -> None:
    compiled, inputs = modules[name], MODELS[name].inputs
    for seed in (1, 2):
        state = model_of(name, seed).state_dict()
        assert refitkit.refit(compiled, state, inputs=inputs, **options).report.verification.ok
        assert error(name, compiled, state) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_a_copy_is_pinned(
    modules: dict[str, refitkit.CompiledModule], name: str
) -> None:
    ledger = modules[name].plan.ledger
    pinned = {row.slot.name for row in ledger if row.state is SlotState.PINNED}
    assert pinned == ({"copied"} if name in {"shared", "turned"} else set())


def test_a_refit_in_part_changes_the_views_of_what_it_gives(
    modules: dict[str, refitkit.CompiledModule],
) -> None:
    compiled, (x,) = modules["shared"], MODELS["shared"].inputs
    first, second = (model_of("shared", seed).state_dict() for seed in (1, 2))
    refitkit.refit(compiled, first)
    report = refitkit.refit(compiled, {"w": second["w"]}, partial=True, inputs=(x,)).report
    assert report.verification.ok
    assert error("shared", compiled, {**first, "w": second["w"]}) < TOLERANCE


def test_a_refit_in_part_leaves_weights_that_are_read_through_views(
    modules: dict[str, refitkit.CompiledModule],
) -> None:
    """The engine has no slot of the weight itself, so nobody can read it."""
    compiled, inputs = modules["views only"], MODELS["views only"].inputs
    first, second = (model_of("views only", seed).state_dict() for seed in (1, 2))
    refitkit.refit(compiled, first)
    part = {name: second[name] for name in ("out.weight", "out.bias")}
    assert refitkit.refit(compiled, part, partial=True, inputs=inputs).report.verification.ok
    assert error("views only", compiled, first | part) < TOLERANCE


def test_a_program_brings_what_lies_between_weights(
    modules: dict[str, refitkit.CompiledModule],
) -> None:
    compiled, (x,) = modules["packed"], MODELS["packed"].inputs
    model = model_of("packed", 4)
    assert refitkit.refit(compiled, exported(model), inputs=(x,)).report.verification.ok
    with torch.no_grad():
        wanted = model(x)
    assert float((compiled(x) - wanted).abs().max() / wanted.abs().max()) < TOLERANCE
    part = {"q": model.q.detach() + 1, "k": model.k.detach()}
    with pytest.raises(refitkit.UnmappedSlotError, match="memory with it"):
        refitkit.refit(compiled, part, partial=True)


def test_a_program_with_the_plans_elements_between_weights_overrides_nothing(
    modules: dict[str, refitkit.CompiledModule],
) -> None:
    compiled, (x,) = modules["packed"], MODELS["packed"].inputs
    model = model_of("packed")
    model.load_state_dict(model_of("packed", 5).state_dict())
    refitkit.refit(compiled, exported(model), inputs=(x,))
    part = {"q": model.q.detach() + 1, "k": model.k.detach()}
    assert refitkit.refit(compiled, part, partial=True, inputs=(x,)).report.verification.ok
    assert error("packed", compiled, part) < TOLERANCE


def test_the_verifier_sees_a_view_that_kept_its_old_value(
    modules: dict[str, refitkit.CompiledModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = modules["views only"]
    state = model_of("views only", 3).state_dict()
    before = compiled.read("k").clone()
    row = next(row for row in compiled.plan.ledger if row.slot.name == "k")

    class KeepsK:
        name, priority = "keeps k", 0

        def map(self, request: Any) -> Any:
            from refitkit.protocols import Mapped, SlotValue

            return Mapped(
                {row.slot.key: SlotValue(row.slot, self.name, row.sources, lambda: before)}
            )

    class Plugin:
        @refitkit.hookimpl
        def refitkit_mapping_strategies(self) -> Any:
            return [KeepsK()]

    pipeline = refitkit.Pipeline(plugins=[Plugin()])
    with pytest.raises(refitkit.VerificationError):
        pipeline.refit(compiled, state, inputs=MODELS["views only"].inputs)


def test_saved_modules_follow_too(
    modules: dict[str, refitkit.CompiledModule], tmp_path: Any
) -> None:
    modules["packed"].save(tmp_path / "packed.refit")
    loaded = refitkit.load(tmp_path / "packed.refit")
    state = model_of("packed", 5).state_dict()
    assert refitkit.refit(loaded, state, inputs=MODELS["packed"].inputs).report.verification.ok
    assert error("packed", loaded, state) < TOLERANCE


def test_the_proof_by_trial_covers_views() -> None:
    compiled = refitkit.compile(exported(model_of("views only")))
    assert error("views only", compiled, model_of("views only").state_dict()) < TOLERANCE


# -- views that a state_dict names ------------------------------------------------------------


class Named(nn.Module):
    """Buffers of the state_dict that are views of a parameter; nobody reads the second one."""

    inputs = (torch.linspace(-1.0, 1.0, 8).view(2, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("rows", self.w.data[1:5])
        self.register_buffer("unread", self.w.data[::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.t() + (x @ self.rows).sum()


@pytest.fixture(scope="module")
def named() -> refitkit.CompiledModule:
    torch.manual_seed(0)
    return refitkit.compile(exported(Named().eval()))


def named_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return Named().state_dict()


@pytest.mark.parametrize("names", [{"w", "rows"}, {"w"}], ids=["both", "the weight alone"])
def test_views_of_the_state_dict_follow_the_weight(
    named: refitkit.CompiledModule, names: set[str]
) -> None:
    state = {name: value for name, value in named_state(1).items() if name in names}
    refitkit.refit(named, state, partial=names == {"w"}, inputs=Named.inputs)
    assert torch.equal(named.read("rows"), state["w"][1:5])


def test_views_of_the_state_dict_are_cast_with_the_weight(
    named: refitkit.CompiledModule,
) -> None:
    state = {name: value.bfloat16() for name, value in named_state(3).items()}
    pipeline = refitkit.Pipeline({"rules": {"cast": "lossless"}})
    pipeline.refit(named, state, inputs=Named.inputs)
    assert torch.equal(named.read("rows"), state["w"][1:5].float())


def test_views_with_other_values_than_their_weight_are_refused(
    named: refitkit.CompiledModule,
) -> None:
    state = named_state(2)
    before = named.read("rows").clone()
    with pytest.raises(WeightMismatchError, match="rows: view broken"):
        refitkit.refit(named, {"w": state["w"], "rows": state["rows"] + 1})
    with pytest.raises(WeightMismatchError, match="rows: given alone"):
        refitkit.refit(named, {"rows": state["rows"]}, partial=True)
    assert torch.equal(named.read("rows"), before)


# -- views of no weight -----------------------------------------------------------------------


class Constants(nn.Module):
    """Slices of memory that no weight has part in, with offsets, gaps and overlaps."""

    inputs = (torch.linspace(-1.0, 1.0, 12).view(3, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        memory = torch.randn(10, 4)
        self.rows, self.column, self.turned = memory[2:6], memory[:, 1], memory.t()[1:3]
        self.parts = [memory[3], memory[4:5].expand(3, 4), memory[5, 2]]
        self.ids = torch.arange(10)[5:8]
        self.register_buffer("buffer", memory[7:], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row, rows, element = self.parts
        mixed = self.out(x) @ self.rows + self.column.sum() + self.turned.sum() * element
        return mixed + row + rows + self.buffer + self.ids.unsqueeze(1) * x


def test_constants_with_offsets_compile_and_stay() -> None:
    torch.manual_seed(0)
    model = Constants().eval()
    compiled = refitkit.compile(exported(model))
    model.load_state_dict({name: torch.randn_like(v) for name, v in model.state_dict().items()})
    refitkit.refit(compiled, model.state_dict(), inputs=model.inputs)
    with torch.no_grad():
        wanted = model(*model.inputs)
    found = compiled(*model.inputs)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


# -- what cannot be followed ------------------------------------------------------------------


class Across(nn.Module):
    """A slice of two weights of one memory, which is no tensor of the program itself."""

    inputs = (torch.ones(2, 4),)

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(8, 4)
        self.a, self.b = nn.Parameter(memory[:4]), nn.Parameter(memory[4:])
        self.middle = memory[2:6]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a + x @ self.b + x @ self.middle


@pytest.mark.parametrize("backend", ["aotinductor", "tensorrt_network"])
def test_memory_that_no_recipe_can_follow_is_refused_with_both_names(backend: str) -> None:
    with pytest.raises(NotRefittableError, match=r"middle: shares memory.*, found a, b"):
        refitkit.compile(exported(Across().eval()), backend)


def test_a_program_from_a_file_that_lost_its_views_is_refused() -> None:
    program = through_a_file(exported(model_of("views only")))
    with pytest.raises(NotRefittableError, match="Compile or plan in the process that exports"):
        refitkit.compile(program)
