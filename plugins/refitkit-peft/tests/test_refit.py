"""Refits to adapter x, to adapter y and back to the base give the weights that peft merges."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import refitkit
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_models import assert_close, bits, make_adapter, same, slots_of

import refitkit_peft
from refitkit_peft import Lora

pytest.importorskip("peft")


class Encoder(torch.nn.Module):
    """A BERT of transformers with random weights that returns a tensor."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=100,
            max_position_embeddings=32,
            attn_implementation="eager",
        )
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids).last_hidden_state
        return found


class Convnet(torch.nn.Module):
    """Convolutions with normalization, a residual connection and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(16)
        self.body = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.point = torch.nn.Conv2d(16, 32, 1)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.body(x))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    make: Any
    inputs: Any
    x: dict[str, Any]
    y: dict[str, Any]


LAYERS = ["query", "key", "value", "dense"]
CASES = {
    "encoder": Case(
        Encoder,
        lambda: torch.tensor([[1, 5, 9, 2], [7, 3, 99, 0]]),
        {"target_modules": [*LAYERS, "word_embeddings"]},
        {"target_modules": ["query", "value"], "use_dora": True, "r": 8},
    ),
    "convnet": Case(
        Convnet,
        lambda: torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        {"target_modules": ["stem", "body", "point", "head"]},
        {"target_modules": ["body", "head"], "use_rslora": True, "modules_to_save": ["bn"]},
    ),
}


class Scene:
    """A compiled model, a base, and two adapters that peft made."""

    def __init__(self, name: str, folder: Any, backend: str) -> None:
        case = CASES[name]
        torch.manual_seed(0)
        self.model = case.make().eval()
        self.inputs = case.inputs()
        for module in self.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        self.made = {
            "x": make_adapter(self.model, folder / f"{name}-x", 1, **case.x),
            "y": make_adapter(self.model, folder / f"{name}-y", 2, **case.y),
        }
        program = torch.export.export(self.model, (self.inputs,))
        self.compiled = refitkit.compile(program, backend=backend, prove=False)

    def base(self, memory: str = "host", **settings: Any) -> refitkit_peft.Base:
        base = refitkit_peft.Base(self.model, memory, **settings)
        for name, made in self.made.items():
            base.add(name, made.path)
        return base

    def eager(self, name: str) -> torch.Tensor:
        """The output of the model that peft merged."""
        model = copy.deepcopy(self.made[name].model).merge_and_unload()
        with torch.no_grad():
            return model(self.inputs)


@pytest.fixture(scope="module", params=CASES)
def scene(request, tmp_path_factory):
    return Scene(request.param, tmp_path_factory.mktemp("adapters"), "aotinductor")


@pytest.fixture(scope="module", params=CASES)
def network(request, tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    return Scene(request.param, tmp_path_factory.mktemp("adapters"), "tensorrt_network")


@pytest.mark.parametrize("delta", [False, True])
def test_x_then_y_then_the_base_again(scene, delta):
    base = scene.base()
    refitkit.refit(scene.compiled, scene.model)
    first, slots = scene.compiled(scene.inputs), slots_of(scene.compiled)
    answers = {}
    for name in ("x", "y", "x"):
        refitkit.refit(scene.compiled, Lora(base, {name: 1.0}), delta=delta)
        found, wanted = scene.compiled(scene.inputs), scene.eager(name)
        # the engine rounds differently from eager torch, by about as much as for the base
        error, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
        assert error < 2e-5 * scale
        assert float((found - first).abs().max()) > 100 * error
        assert torch.equal(answers.setdefault(name, found), found)
    refitkit.refit(scene.compiled, Lora(base), delta=delta)
    assert torch.equal(scene.compiled(scene.inputs), first)
    assert same(slots_of(scene.compiled), slots)


def test_slots_are_the_sums_and_outputs_are_verified(scene):
    base = scene.base()
    weights = Lora(base, {"x": 0.5})
    report = refitkit.refit(scene.compiled, weights, inputs=(scene.inputs,)).report
    assert report.verification is not None
    assert report.verification.ok
    assert report.source == f"base a live {type(scene.model).__name__} + 0.5 of 'x'"
    merged = {**dict(scene.model.named_buffers()), **scene.made["x"].merged(0.5)}
    for name, value in slots_of(scene.compiled).items():
        assert_close(value, merged[name.removeprefix("model ")], name)


def test_a_swap_writes_what_either_adapter_touches_and_nothing_else(scene):
    base = scene.base()
    (engine,) = scene.compiled.opened.engines.values()
    x, y = (
        set(refitkit.Pipeline().open_weights(Lora(base, {name: 1.0})).touched) & set(engine.slots)
        for name in ("x", "y")
    )
    assert 0 < len(y) < len(x | y) < len(engine.slots)
    refitkit.refit(scene.compiled, base)

    def written(adapters: dict[str, float]) -> int:
        report = refitkit.refit(scene.compiled, Lora(base, adapters), delta=True).report
        assert report.slots_written + report.slots_unchanged == len(engine.slots)
        return report.slots_written

    assert written({}) == len(engine.slots)  # the previous refit was without delta
    assert written({"x": 1.0}) == len(x)
    assert written({"x": 1.0}) == 0
    assert written({"y": 1.0}) == len(x | y)
    assert written({"y": 1.0, "x": 0.0}) == 0
    assert written({}) == len(y)
    assert written({}) == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from([{}, {"x": 1.0}, {"y": 1.0}, {"x": -0.5, "y": 1.0}, {"x": 0.5, "z": 0.25}]),
        st.sampled_from(["ready", "ready", "unready", "given"]),
        st.sampled_from([True, True, False]),
    ),
    min_size=3,
    max_size=10,
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_after_any_refits_the_engine_holds_what_was_asked_for_last(convnet, bases, steps):
    """The previous weights, their base and the engine's knowledge of them do not matter."""
    for adapters, which, delta in steps:
        refitkit.refit(convnet.compiled, Lora(bases[which], adapters), delta=delta, verify="none")
        truth = refitkit.Pipeline().open_weights(Lora(bases["truth"], adapters))
        for name, value in slots_of(convnet.compiled).items():
            assert torch.equal(bits(value), bits(truth.get(name.removeprefix("model ")))), name


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    return Scene("convnet", tmp_path_factory.mktemp("adapters"), "aotinductor")


@pytest.fixture(scope="module")
def bases(convnet):
    made = {
        "ready": convnet.base(keep=8),
        "unready": convnet.base(keep=1),
        "given": convnet.base("given"),
        "truth": convnet.base(keep=0),
    }
    for base in made.values():
        base.add(
            "z",
            {
                "stem.lora_A.weight": torch.ones(2, 3, 3, 3),
                "stem.lora_B.weight": torch.ones(16, 2, 1, 1),
            },
            alpha="rank",
        )
    return made


def test_engine_bytes_are_those_of_a_build_from_the_merged_model(network):
    base = network.base()
    for adapters in ({"x": 1.0}, {"y": 1.0}, {}):
        weights = Lora(base, adapters)
        report = refitkit.refit(network.compiled, weights, verify="engine-bytes", delta=True).report
        assert report.verification is not None
        assert report.verification.ok
        assert report.verification.note.endswith("0 parts differ")
