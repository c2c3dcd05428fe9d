"""Flags that errors name: with those of one problem pasted, the weights are taken."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import WeightMismatchError
from tests.fakes import FakeModule, Loaded, OpenEngine, plan_for, same_state

if TYPE_CHECKING:
    State = dict[str, torch.Tensor]

MODEL = {
    "model.embed.weight": (5, 4),
    **{f"model.layers.0.attn.{name}_proj.weight": (4, 4) for name in "qkv"},
    "model.layers.0.mlp.experts.gate_up_proj": (3, 6, 4),
    "model.layers.0.mlp.experts.down_proj": (3, 4, 3),
    "lm_head.weight": (5, 4),
}
Q = "model.layers.0.attn.q_proj.weight"


def model(of: int = 1) -> State:
    torch.manual_seed(of)
    return {name: torch.randn(shape) for name, shape in MODEL.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def rules_of(flags: str) -> dict[str, Any]:
    """Rules as the command line would read them."""
    rules: dict[str, Any] = {}
    words = shlex.split(flags)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        match flag:
            case "--subtree":
                rules["subtree"] = value
            case "--rename":
                pattern, _, to = value.rpartition("=")
                rules.setdefault("rename", []).append({"pattern": pattern, "to": to})
            case "--ignore":
                rules.setdefault("ignore", []).append(value)
            case "--family":
                rules.setdefault("families", []).append(value)
    return rules


def refit(program: State, weights: State, flags: str = "", **how: Any) -> State:
    """What a module of zeros holds after a refit with flags."""
    zeros = {name: torch.zeros_like(value) for name, value in program.items()}
    scene = Loaded(FakeModule([OpenEngine("e0", zeros)]), rules=rules_of(flags))
    scene.compiled.plan = plan_for(scene.module)
    scene.pipeline.refit(scene.compiled, weights, **how)
    return scene.holds()


def flags_for(program: State, weights: State, flags: str = "", **how: Any) -> list[str]:
    """What to paste, for each of the problems with which a refit is refused."""
    with pytest.raises(WeightMismatchError) as info:
        refit(program, weights, flags, **how)
    hints = (problem.hint.rpartition("pass --") for problem in info.value.problems)
    return list(dict.fromkeys(f"--{flags}" for _, said, flags in hints if said))


def test_each_of_two_with_entries_beside_them() -> None:
    a, b = model(1), model(2)
    heads = {f"head{n}.weight": torch.ones(2) for n in range(12)}
    weights = {**a, **under("ema.", b), "ema.steps_done": torch.ones(1), **heads}
    plain, ema = flags_for(a, weights)
    assert same_state(refit(a, weights, plain), a)
    assert same_state(refit(a, weights, ema), b)


def test_a_wrapped_model_beside_plain_names() -> None:
    a, b = model(1), model(2)
    weights = {**a, **under("module.", b)}
    plain, wrapped = flags_for(a, weights)
    assert (plain, wrapped) == (r"--ignore 'module\..*'", "--subtree 'module.'")
    assert same_state(refit(a, weights, plain), a)
    assert same_state(refit(a, weights, wrapped), b)


def test_a_chosen_reading_is_not_asked_about_again() -> None:
    """With 'net.' before them, names fit as well."""
    program = {"net.a": torch.ones(2), "net.b": torch.ones(2)}
    weights = {"a": torch.zeros(2), "b": torch.zeros(2), **program}
    found = [refit(program, weights, flags)["net.a"] for flags in flags_for(program, weights)]
    assert sorted(value[0].item() for value in found) == [0.0, 1.0]


@pytest.mark.parametrize("name", [Q, "lm_head.weight"])
def test_one_entry_that_is_given_twice(name: str) -> None:
    weights = {**model(), f"module.{name}": torch.ones(MODEL[name])}
    weights.pop("model.embed.weight")
    for flags in flags_for(model(), weights, partial=True):
        assert refit(model(), weights, flags, partial=True)[name].equal(weights[name])
        assert flags == f"--ignore 'module\\.{re.escape(name)}'"


@pytest.mark.parametrize("prefix", ["net.", "state_dict.net."])
def test_another_prefix(prefix: str) -> None:
    program, weights = under("unet.", model()), under(prefix, model())
    (flags,) = flags_for(program, weights)
    assert same_state(refit(program, weights, flags), program)
    (flags,) = flags_for(program, {prefix + Q: model()[Q]}, partial=True)
    found = refit(program, {prefix + Q: model()[Q]}, flags, partial=True)
    assert [name for name, value in found.items() if value.any()] == [f"unet.{Q}"]


# -- in part ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({f"net.{Q}": Q, "net.lm_head.weight": "lm_head.weight"}, r"--rename 'net\.(.*)=\1'"),
        ({f"net.{Q}": Q, "lm_head.weight": "lm_head.weight"}, r"--rename 'net\.(.*)=\1'"),
        ({Q.removeprefix("model."): Q}, r"--rename '(.*)=model.\1'"),
        (
            {Q.removeprefix("model."): Q, "lm_head.weight": "lm_head.weight"},
            r"--rename '((?:layers)(?:\..*)?)=model.\1'",
        ),
        ({Q: Q, "score.weight": None}, r"--ignore 'score\..*'"),
        ({Q: Q, f"ema.{Q}": None}, r"--ignore 'ema\..*'"),
    ],
)
def test_nothing_is_guessed_in_part(given: dict[str, str | None], wanted: str) -> None:
    state = model()
    weights = {n: torch.ones(2, 2) if m is None else state[m] for n, m in given.items()}
    assert flags_for(state, weights, partial=True) == [wanted]
    found = refit(state, weights, wanted, partial=True)
    changed = {name for name, value in found.items() if value.any()}
    assert changed == set(given.values()) - {None}


def test_a_base_without_its_head_is_not_taken() -> None:
    base = {n.removeprefix("model."): v for n, v in model().items() if n != "lm_head.weight"}
    (flag,) = flags_for(model(), base)
    with pytest.raises(WeightMismatchError, match=r"- lm_head\.weight: missing") as info:
        refit(model(), base, flag)
    assert len(info.value.problems) == 1


# -- other layouts ----------------------------------------------------------------------------


def in_files(state: State) -> State:
    """Experts one by one, and one layer for q, k and v."""
    at = "model.layers.0"
    weights = {n: v for n, v in state.items() if "proj" not in n}
    parts = [state[f"{at}.attn.{name}_proj.weight"] for name in "qkv"]
    weights[f"{at}.attn.qkv_proj.weight"] = torch.cat(parts)
    for number in range(3):
        expert = f"{at}.mlp.experts.{number}"
        gate, up = state[f"{at}.mlp.experts.gate_up_proj"][number].chunk(2)
        weights[f"{expert}.gate_proj.weight"], weights[f"{expert}.up_proj.weight"] = gate, up
        weights[f"{expert}.down_proj.weight"] = state[f"{at}.mlp.experts.down_proj"][number]
    return weights


def test_two_families_at_once() -> None:
    state = model()
    weights = in_files(state)
    assert flags_for(state, weights) == ["--family moe --family fused"]
    assert same_state(refit(state, weights, "--family moe --family fused"), state)
    assert flags_for(state, weights, "--family moe") == ["--family fused"]
    assert flags_for(weights, state) == ["--family moe --family fused"]


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_family_of_two_that_fit(prefix: str) -> None:
    a, b = model(1), model(2)
    weights = {**under(prefix, in_files(a)), **under("ema.", in_files(b))}
    (family,) = flags_for(a, weights)
    one, other = sorted(flags_for(a, weights, family), key=lambda flags: "'ema.'" in flags)
    assert same_state(refit(a, weights, f"{family} {one}"), a)
    assert same_state(refit(a, weights, f"{family} {other}"), b)


CONV1D = {
    "wte.weight": (5, 4),
    **{f"h.0.{name}.bias": (4,) for name in ("attn.c_attn", "mlp.c_proj")},
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.mlp.c_proj.weight": (8, 4),
}


@pytest.mark.parametrize(("has", "wants"), [("", "transformer."), ("transformer.", ""), ("x.", "")])
def test_transposed_weights_under_other_names(has: str, wants: str) -> None:
    """All names are there with a prefix, and other shapes: they are no other model's."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in CONV1D.items()}
    layers = {name for name in state if "c_" in name and name.endswith("weight")}
    turned = {name: value.T if name in layers else value for name, value in state.items()}
    program = {name: value.contiguous() for name, value in under(wants, turned).items()}
    given = under(has, state)
    assert flags_for(program, given) == ["--family conv1d"]
    assert same_state(refit(program, given, "--family conv1d"), program)
    with pytest.raises(WeightMismatchError, match="leave out the rule that transposes it"):
        refit(program, program, "--family conv1d")


def test_no_family_is_named_that_does_not_fit() -> None:
    weights = in_files(model())
    name = "model.layers.0.attn.qkv_proj.weight"
    assert flags_for(model(), {**weights, name: weights[name][:8]}) == []


def test_extra_state_is_no_weight() -> None:
    state = model()
    weights = {**state, "model.layers.0.attn._extra_state": torch.zeros(3, dtype=torch.uint8)}
    assert same_state(refit(state, weights), state)
