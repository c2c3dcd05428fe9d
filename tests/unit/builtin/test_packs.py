"""Weights that one side has in one piece and the other in parts: joined, stacked, transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from refitkit.errors import ConfigError, WeightMismatchError
from refitkit.pipeline import Pipeline
from refitkit.recipe import TensorMap
from tests.fakes import UnderRules, same_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    State = dict[str, torch.Tensor]


class Scene(UnderRules):
    """It also says why it refuses weights."""

    def refused(self, weights: Any, **how: Any) -> set[tuple[str, str]]:
        with pytest.raises(WeightMismatchError) as info:
            self.refit(weights, **how)
        assert not any(value.any() for value in self.holds().values())
        return {(problem.subject, problem.kind) for problem in info.value.problems}


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    raw = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype.is_floating_point or dtype.is_complex:
        raw &= 0x3F  # of all bytes: finite
    return raw.view(dtype).reshape(shape)


QKV = {"into": "{}.qkv.weight", "parts": ["{}.q.weight", "{}.k.weight", "{}.v.weight"]}
DOWN = {"into": "{}.down", "parts": ["{}.*.down.weight"]}
GATE_UP = {"into": "{}.gate_up", "parts": ["{}.*.gate.weight", "{}.*.up.weight"], "dim": 1}


def stacked(state: State, name: str, count: int) -> torch.Tensor:
    return torch.stack([state[f"m.{number}.{name}.weight"] for number in range(count)])


PAIRS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], Callable[[State], Any]]] = {
    "a fused projection": (
        QKV,
        {"m.q.weight": (6, 3), "m.k.weight": (2, 3), "m.v.weight": (2, 3)},
        lambda s: torch.cat([s["m.q.weight"], s["m.k.weight"], s["m.v.weight"]]),
    ),
    "biases of it": (
        {"into": "{}.qkv.bias", "parts": ["{}.q.bias", "{}.v.bias"], "dim": -1},
        {"m.q.bias": (6,), "m.v.bias": (2,)},
        lambda s: torch.cat([s["m.q.bias"], s["m.v.bias"]]),
    ),
    "end to end in the last dimension": (
        {"into": "{}.ab", "parts": ["{}.a", "{}.b"], "dim": -1},
        {"m.a": (2, 4, 3), "m.b": (2, 4, 1)},
        lambda s: torch.cat([s["m.a"], s["m.b"]], -1),
    ),
    "transposed, as Conv1D has them": (
        {**QKV, "dim": 1, "transposed": True},
        {"m.q.weight": (4, 3), "m.k.weight": (2, 3), "m.v.weight": (2, 3)},
        lambda s: torch.cat([s["m.q.weight"].T, s["m.k.weight"].T, s["m.v.weight"].T], 1),
    ),
    "experts, named one by one": (
        {"into": "{}.down", "parts": ["{}.0.w", "{}.1.w", "{}.2.w"]},
        {"m.0.w": (4, 5), "m.1.w": (4, 5), "m.2.w": (4, 5)},
        lambda s: torch.stack([s["m.0.w"], s["m.1.w"], s["m.2.w"]]),
    ),
    "stacked in the last dimension": (
        {"into": "{}.down", "parts": ["{}.0.w", "{}.1.w"], "dim": -1},
        {"m.0.w": (4, 5), "m.1.w": (4, 5)},
        lambda s: torch.stack([s["m.0.w"], s["m.1.w"]], -1),
    ),
    "experts by number": (
        DOWN,
        {f"m.{number}.down.weight": (4, 5) for number in range(12)},
        lambda s: stacked(s, "down", 12),
    ),
    "one expert": (DOWN, {"m.0.down.weight": (4, 5)}, lambda s: stacked(s, "down", 1)),
    "two layers of each expert": (
        GATE_UP,
        {f"m.{number}.{n}.weight": (4, 5) for number in range(3) for n in ("gate", "up")},
        lambda s: torch.cat([stacked(s, "gate", 3), stacked(s, "up", 3)], 1),
    ),
    "two layers of each expert, of other sizes, transposed": (
        {**GATE_UP, "dim": -1, "transposed": True},
        {
            f"m.{number}.{n}.weight": (k, 5)
            for number in range(3)
            for n, k in (("gate", 4), ("up", 2))
        },
        lambda s: torch.cat([stacked(s, "gate", 3).mT, stacked(s, "up", 3).mT], -1),
    ),
    "all gates, then all others": (
        {**GATE_UP, "dim": 0},
        {f"m.{number}.{n}.weight": (4, 5) for number in range(3) for n in ("gate", "up")},
        lambda s: torch.cat([stacked(s, "gate", 3), stacked(s, "up", 3)]),
    ),
    "another name": (
        {"into": "{}.new", "parts": ["{}.old"]},
        {"m.old": (2, 3)},
        lambda s: s["m.old"],
    ),
    "another name of a number": (
        {"into": "{}.new", "parts": ["{}.old"]},
        {"m.old": ()},
        lambda s: s["m.old"],
    ),
    "a convolution of 1 x 1": (
        {"into": "{}.linear", "parts": ["{}.conv"]},
        {"m.conv": (4, 3, 1, 1)},
        lambda s: s["m.conv"][:, :, 0, 0],
    ),
    "transposed, of another name": (
        {"into": "{}.new", "parts": ["{}.old"], "transposed": True},
        {"m.old": (4, 3)},
        lambda s: s["m.old"].T,
    ),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64]


@pytest.mark.parametrize("title", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(title: str, dtype: torch.dtype) -> None:
    rule, shapes, join = PAIRS[title]
    parts = {name: values(*shape, dtype=dtype) for name, shape in shapes.items()}
    apart = {n: v.mT.contiguous().mT if v.dim() > 1 else v for n, v in parts.items()}
    piece = {rule["into"].replace("{}", "m"): join(parts).contiguous()}
    for given in (parts, apart):
        found = Scene(piece, pack=[rule]).refit(given)
        assert same_state(found, piece)
    assert same_state(Scene(parts, pack=[rule]).refit(found), parts)
    assert same_state(Scene(parts, pack=[rule]).refit(found, partial=True), parts)


def test_a_weight_is_transposed_under_its_own_name() -> None:
    """Also a square one, of which no shape shows it."""
    rule = {"into": "{}.w", "parts": ["{}.w"], "transposed": True}
    given = {"a.w": torch.randn(3, 4), "b.w": torch.randn(3, 3), "b.bias": torch.randn(3)}
    turned = {n: v.T.contiguous() if n.endswith("w") else v for n, v in given.items()}
    assert same_state(Scene(turned, pack=[rule]).refit(given), turned)
    assert same_state(Scene(given, pack=[rule]).refit(turned), given)
    wrapped = {f"net.module.{name}": value for name, value in given.items()}
    assert same_state(Scene(turned, pack=[rule]).refit(wrapped), turned)
    assert Scene(given, pack=[rule]).refused(given) == {("a.w", "shape")}


def test_parts_are_views_of_a_piece_that_is_read_once(tmp_path: Path) -> None:
    piece = torch.randn(8, 3)
    scene = Scene(
        {f"m.{n}.weight": piece[:k] for n, k in zip("qkv", (4, 2, 2), strict=True)}, pack=[QKV]
    )
    given = Counted({"m.qkv.weight": piece})
    source = scene.pipeline.open_weights(given, scene.compiled.plan)
    found = [source.get(f"m.{n}.weight") for n in "qkv"]
    assert given.reads == 1
    assert {part.untyped_storage().data_ptr() for part in found} == {piece.data_ptr()}
    save_file({"m.qkv.weight": piece}, tmp_path / "a.safetensors")
    held = scene.refit(tmp_path / "a.safetensors")
    assert torch.equal(torch.cat(list(held.values())), piece)


class Counted(TensorMap):
    """Counts what is read."""

    reads = 0

    def get(self, fqn: str) -> torch.Tensor:
        self.reads += 1
        return super().get(fqn)


def test_weights_and_biases_are_cut_out_of_pieces_that_are_read_once() -> None:
    parts = {
        f"{layer}.{n}.{kind}": torch.randn(4, 3) if kind == "weight" else torch.randn(4)
        for layer in "ab"
        for n in "qkv"
        for kind in ("weight", "bias")
    }
    pieces = {
        f"{layer}.qkv.{kind}": torch.cat([parts[f"{layer}.{n}.{kind}"] for n in "qkv"])
        for layer in "ab"
        for kind in ("weight", "bias")
    }
    rules = [
        {"into": f"{{}}.qkv.{k}", "parts": [f"{{}}.{n}.{k}" for n in "qkv"]}
        for k in ("weight", "bias")
    ]
    scene = Scene(parts, pack=rules)
    given = Counted(pieces)
    source = scene.pipeline.open_weights(given, scene.compiled.plan)
    assert all(torch.equal(source.get(name), value) for name, value in parts.items())
    assert given.reads == len(pieces)
    rows = scene.pipeline.refit(scene.compiled, pieces).report.transforms
    assert [len(row.gives) for row in rows] == [6, 6]


def test_experts_of_a_layer_are_cut_out_of_pieces_that_are_read_once() -> None:
    """They are asked for expert by expert, which is not in the order of the pieces."""
    parts = {
        f"{layer}.{number}.{n}.weight": torch.randn(4, 5)
        for layer in "ab"
        for number in range(3)
        for n in ("gate", "down", "up")
    }
    pieces = {}
    for layer in "ab":
        own = {f"m{name[1:]}": value for name, value in parts.items() if name[0] == layer}
        pieces[f"{layer}.down"] = stacked(own, "down", 3)
        pieces[f"{layer}.gate_up"] = torch.cat([stacked(own, n, 3) for n in ("gate", "up")], 1)
    scene = Scene(parts, pack=[DOWN, GATE_UP])
    given = Counted(pieces)
    source = scene.pipeline.open_weights(given, scene.compiled.plan)
    assert all(torch.equal(source.get(name), value) for name, value in parts.items())
    assert given.reads == len(pieces)
    assert same_state(scene.refit(pieces), parts)


# -- with other rules -------------------------------------------------------------------------

EXPERTS = {f"m.{number}.down.weight": torch.randn(4, 5) for number in range(3)}
STACKED = {"m.down": torch.stack(list(EXPERTS.values()))}


def test_casts_come_after() -> None:
    whole = {"m.down": STACKED["m.down"].double()}
    assert same_state(Scene(whole, pack=[DOWN], cast="lossless").refit(EXPERTS), whole)
    parts = {name: value.double() for name, value in EXPERTS.items()}
    assert same_state(Scene(parts, pack=[DOWN], cast="lossless").refit(STACKED), parts)
    assert Scene(whole, pack=[DOWN]).refused(EXPERTS) == {("m.down", "dtype")}


@pytest.mark.parametrize("given", [EXPERTS, STACKED])
@pytest.mark.parametrize("prefix", ["module.", "state_dict.net.", "_orig_mod."])
def test_names_are_read_as_any(given: State, prefix: str) -> None:
    program = STACKED if given is EXPERTS else EXPERTS
    wrapped = {prefix + name: value for name, value in given.items()}
    more = {"epoch": torch.tensor(3), f"{prefix}head.weight": torch.ones(1)}
    scene = Scene(program, pack=[DOWN], ignore=[r".*head\.weight"])
    assert same_state(scene.refit({**wrapped, **more}), program)
    shorter = {name.removeprefix("m."): value for name, value in given.items()}
    if given is EXPERTS:  # "down" alone has no place for {}
        assert same_state(Scene(program, pack=[DOWN]).refit(shorter), program)


def test_differences_are_those_of_the_piece() -> None:
    scene = Scene(STACKED, pack=[DOWN])
    scene.refit(EXPERTS)
    report = scene.pipeline.diff(scene.compiled, EXPERTS)
    assert report.summary == "nothing changed: 1 same"
    other = {**EXPERTS, "m.1.down.weight": torch.zeros(4, 5)}
    (row,) = scene.pipeline.diff(scene.compiled, other).rows
    assert (row.name, row.state, row.share) == ("m.down", "changed", pytest.approx(1 / 3))


def test_in_part() -> None:
    program = {**STACKED, "n.down": torch.zeros(3, 4, 5)}
    scene = Scene(program, pack=[DOWN])
    held = scene.refit(EXPERTS, partial=True)
    assert torch.equal(held["m.down"], STACKED["m.down"])
    assert not held["n.down"].any()
    some = dict(list(EXPERTS.items())[:1])
    assert Scene(program, pack=[DOWN]).refused(some, partial=True) == {
        ("m.1.down.weight", "missing"),
        ("m.2.down.weight", "missing"),
    }


def test_what_did_not_change_is_known_without_a_look(tmp_path: Path) -> None:
    scene = Scene(STACKED, pack=[DOWN])
    save_file(EXPERTS, tmp_path / "a.safetensors")
    for unchanged in (0, 1):
        report = scene.pipeline.refit(scene.compiled, tmp_path / "a.safetensors", delta=True).report
        assert report.slots_unchanged == unchanged


# -- what does not fit ------------------------------------------------------------------------


def test_all_that_is_wrong_is_listed() -> None:
    program = {f"{layer}.down": torch.zeros(3, 4, 5) for layer in "abcd"}
    given = {f"{layer}.{n}.down.weight": torch.ones(4, 5) for layer in "abcd" for n in range(3)}
    del given["a.0.down.weight"], given["a.2.down.weight"]
    given["b.1.down.weight"] = torch.ones(5, 4)
    given["c.2.down.weight"] = torch.ones(4, 5).half()
    given["d.0.down.weight"] = torch.ones(4, 5).to_sparse()
    assert Scene(program, pack=[DOWN]).refused(given) == {
        ("a.0.down.weight", "missing"),
        ("a.2.down.weight", "missing"),
        ("b.1.down.weight", "shape"),
        ("c.2.down.weight", "dtype"),
        ("d.0.down.weight", "unusable"),
    }


def test_experts_that_the_model_does_not_have() -> None:
    more = {**EXPERTS, "m.3.down.weight": torch.ones(4, 5)}
    assert Scene(STACKED, pack=[DOWN]).refused(more) == {("m.3.down.weight", "unexpected")}
    piece = {"m.down": torch.ones(4, 4, 5)}
    assert Scene(EXPERTS, pack=[DOWN]).refused(piece) == {("m.down", "shape")}
    fewer = {"m.down": torch.ones(2, 4, 5)}
    assert Scene(EXPERTS, pack=[DOWN]).refused(fewer) == {("m.down", "shape")}


def test_sizes_that_do_not_add_up() -> None:
    parts = {
        "m.q.weight": torch.ones(4, 3),
        "m.k.weight": torch.ones(2, 3),
        "m.v.weight": torch.ones(2, 3),
    }
    for piece in (torch.ones(9, 3), torch.ones(8, 4), torch.ones(8, 3, 1)):
        found = Scene(parts, pack=[QKV]).refused({"m.qkv.weight": piece})
        assert found == {("m.qkv.weight", "shape")}
    grid = {f"m.{n}.{kind}.weight": torch.ones(4, 5) for n in range(2) for kind in ("gate", "up")}
    odd = {**grid, "m.1.up.weight": torch.ones(3, 5)}
    whole = {"m.gate_up": torch.zeros(2, 8, 5)}
    assert Scene(whole, pack=[GATE_UP]).refused(odd) == {("m.1.up.weight", "shape")}
    assert Scene({"m.gate_up": torch.zeros(2, 9, 5)}, pack=[GATE_UP]).refused(grid) == {
        ("m.gate_up", "shape")
    }
    vectors = {f"m.{n}.weight": torch.ones(4) for n in "qkv"}
    rule = {**QKV, "transposed": True}
    assert Scene({"m.qkv.weight": torch.zeros(12)}, pack=[rule]).refused(vectors) == {
        (name, "shape") for name in vectors
    }


def test_a_piece_of_which_the_model_has_some_parts() -> None:
    parts = {"m.q.weight": torch.ones(4, 3), "m.k.weight": torch.ones(2, 3)}
    found = Scene(parts, pack=[QKV]).refused({"m.qkv.weight": torch.ones(8, 3)})
    assert found == {("m.v.weight", "not in the model")}


def test_given_both_ways() -> None:
    piece = {"m.down": STACKED["m.down"]}
    assert Scene(STACKED, pack=[DOWN]).refused({**piece, **EXPERTS}) == {
        (name, "unexpected") for name in EXPERTS
    }
    one = {"m.0.down.weight": EXPERTS["m.0.down.weight"], **piece}
    assert Scene(EXPERTS, pack=[DOWN]).refused(one) == {("m.0.down.weight", "given twice")}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"into": "{}.a", "parts": ["{}.*.b", "{}.c"]}, "one in each part, or in none"),
        ({"into": "{}.*.a", "parts": ["{}.*.b"]}, "not in into"),
        ({"into": "{}.a", "parts": ["{}.b", "{}.b"]}, "two parts have the same name"),
        ({"into": "{}.a", "parts": ["{}.a", "{}.b"]}, "a part has the name of the piece"),
        ({"into": "{}.a", "parts": ["{}.a"]}, "a part has the name of the piece"),
        ({"into": "{}.a", "parts": []}, "at least 1 item"),
    ],
)
def test_rules_that_cannot_be_meant(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Pipeline({"rules": {"pack": [rule]}})
    with pytest.raises(ConfigError, match="unknown family 'no such'; known families: moe,"):
        Pipeline({"rules": {"families": ["no such"]}})
