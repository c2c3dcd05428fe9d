"""Names, packing and dtypes of checkpoints that are not the program's."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import ConfigError, WeightMismatchError
from refitkit.pipeline import Pipeline
from refitkit.program.dtypes import is_lossless
from refitkit.recipe import TensorMap
from tests.fakes import (
    FakeModule,
    Loaded,
    OpenEngine,
    leaf_for,
    make_plan,
    make_slot,
    plan_for,
    recipe_row,
    same_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.model import TensorInfo

PROGRAM = {
    "a.weight": torch.zeros(4, 3),
    "a.bias": torch.zeros(4),
    "b.module.weight": torch.zeros(2, 3),
}
NEW = {name: torch.randn(value.shape) for name, value in PROGRAM.items()}


class Scene(Loaded):
    """A module that holds zeros, refitted under rules."""

    def __init__(self, program: dict[str, torch.Tensor] | None = None, **rules: Any) -> None:
        module = FakeModule([OpenEngine("e0", PROGRAM if program is None else program)])
        super().__init__(module, rules=rules)
        self.compiled.plan = plan_for(self.module)

    def refit(self, weights: Any, **how: Any) -> list[tuple[Any, Any]]:
        """What was made of what."""
        report = self.pipeline.refit(self.compiled, weights, **how).report
        return [(row.takes, row.gives) for row in report.transforms]


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_wrappers_at_the_beginning_are_taken_away(prefix: str) -> None:
    scene = Scene()
    made = scene.refit({prefix + name: value for name, value in NEW.items()})
    assert same_state(scene.holds(), NEW)
    assert made == [((prefix + name,), (name,)) for name in NEW]


def test_wrappers_in_the_middle_are_taken_away() -> None:
    scene = Scene()
    given = {
        "a._orig_mod.weight": NEW["a.weight"],
        "a._checkpoint_wrapped_module.bias": NEW["a.bias"],
    }
    scene.refit({**given, "b.module.weight": NEW["b.module.weight"]})
    assert same_state(scene.holds(), NEW)


def test_names_of_the_program_are_never_touched() -> None:
    """One of them has a wrapper's name in it."""
    scene = Scene()
    assert scene.refit(NEW) == []
    assert same_state(scene.holds(), NEW)


def test_a_name_that_fits_in_no_way_stays_what_it_is() -> None:
    with pytest.raises(WeightMismatchError, match=r"module\.c\.weight: unexpected"):
        Scene().refit({**NEW, "module.c.weight": torch.ones(1)})


def test_no_wrappers_are_known_where_none_are_wanted() -> None:
    given = {"module." + name: value for name, value in NEW.items()}
    with pytest.raises(WeightMismatchError, match=r"'module\.': a subtree has all names"):
        Scene(wrappers=[]).refit(given, partial=True)
    some = {"module.a.weight": NEW["a.weight"], **{n: NEW[n] for n in list(NEW)[1:]}}
    with pytest.raises(WeightMismatchError, match=r"module\.a\.weight: unexpected"):
        Scene(wrappers=[]).refit(some)


def test_two_names_that_become_one_are_refused() -> None:
    twice = {**NEW, "module.a.bias": torch.ones(4)}
    with pytest.raises(WeightMismatchError) as info:
        Scene().refit(twice)
    (problem,) = info.value.problems
    assert (problem.subject, problem.kind) == ("module.a.bias", "given twice")
    assert "'a.bias'" in problem.hint


def test_only_a_subtree_counts() -> None:
    scene = Scene(subtree="policy.")
    given = {f"policy.{name}": value for name, value in NEW.items()}
    made = scene.refit({"optimizer.step": torch.ones(1), "policyless": torch.ones(1), **given})
    assert same_state(scene.holds(), NEW)
    assert (("optimizer.step",), ()) in made
    assert (("policyless",), ()) in made


def test_a_subtree_may_be_wrapped() -> None:
    scene = Scene(subtree="policy.")
    scene.refit({f"policy.module.{name}": value for name, value in NEW.items()})
    assert same_state(scene.holds(), NEW)


def test_names_are_renamed_by_the_first_rule_that_matches() -> None:
    rules = [
        {"pattern": r"layer_(.)\.kernel", "to": r"\1.weight"},
        {"pattern": r"layer_(.)\.(.*)", "to": r"\1.\2"},
    ]
    scene = Scene(rename=rules)
    given = {"layer_a.kernel": NEW["a.weight"], "layer_a.bias": NEW["a.bias"]}
    made = scene.refit({**given, "b.module.weight": NEW["b.module.weight"]})
    assert same_state(scene.holds(), NEW)
    assert made == [(("layer_a.kernel",), ("a.weight",)), (("layer_a.bias",), ("a.bias",))]


def test_a_whole_name_has_to_match() -> None:
    rules = [{"pattern": r"a\.weight", "to": "other"}]
    with pytest.raises(WeightMismatchError, match=r"a\.weight2: unexpected"):
        Scene(rename=rules).refit({**NEW, "a.weight2": torch.ones(1)})


# -- packing ----------------------------------------------------------------------------------

QKV = {
    "into": "{}.qkv.weight",
    "parts": ["{}.q.weight", "{}.k.weight", "{}.v.weight"],
}
PACKED = {"l0.qkv.weight": torch.zeros(8, 3), "l1.qkv.weight": torch.zeros(8, 3)}


def parts(layer: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    sizes = {"q": 4, "k": 2, "v": 2}
    return {f"{layer}.{n}.weight": torch.randn(size, 3).to(dtype) for n, size in sizes.items()}


def test_parts_become_one_weight() -> None:
    scene = Scene(PACKED, pack=[QKV])
    first, whole = parts("l0"), torch.randn(8, 3)
    made = scene.refit({**first, "l1.qkv.weight": whole})
    joined = torch.cat(list(first.values()))
    assert same_state(scene.holds(), {"l0.qkv.weight": joined, "l1.qkv.weight": whole})
    assert made == [(tuple(first), ("l0.qkv.weight",))]


def test_parts_are_joined_in_their_dimension() -> None:
    rule = {"into": "{}.up", "parts": ["{}.a", "{}.b"], "dim": -1}
    scene = Scene({"m.up": torch.zeros(2, 5)}, pack=[rule])
    a, b = torch.randn(2, 3), torch.randn(2, 2)
    scene.refit({"m.b": b, "m.a": a})
    assert same_state(scene.holds(), {"m.up": torch.cat([a, b], 1)})


def test_everything_that_does_not_fit_is_told() -> None:
    given = {**parts("l0"), **parts("l1")}
    del given["l0.k.weight"]
    given["l1.v.weight"] = torch.zeros(2, 4)
    given["l1.q.weight"] = torch.zeros(9, 3)
    given["l1.k.weight"] = torch.zeros(2, 3).half()
    with pytest.raises(WeightMismatchError, match="cannot be transformed for the program") as info:
        Scene(PACKED, pack=[QKV]).refit(given)
    found = {(problem.subject, problem.kind) for problem in info.value.problems}
    assert found == {
        ("l0.k.weight", "missing"),
        ("l1.v.weight", "shape"),
        ("l1.k.weight", "dtype"),
        ("l1.qkv.weight", "shape"),
    }


def test_a_dimension_that_does_not_exist_is_told() -> None:
    with pytest.raises(WeightMismatchError, match="cannot be packed, found dim 2"):
        Scene(PACKED, pack=[{**QKV, "dim": 2}]).refit({**parts("l0"), **parts("l1")})


def test_in_part_all_parts_are_needed() -> None:
    scene = Scene(PACKED, pack=[QKV])
    scene.refit(parts("l0"), partial=True)
    assert not scene.holds()["l1.qkv.weight"].any()
    some = parts("l1")
    del some["l1.v.weight"]
    with pytest.raises(WeightMismatchError, match=r"l1\.v\.weight: missing"):
        scene.refit(some, partial=True)


# -- dtypes -----------------------------------------------------------------------------------


def test_dtypes_are_errors_unless_casts_are_asked_for() -> None:
    given = {name: value.half() for name, value in NEW.items()}
    with pytest.raises(WeightMismatchError, match="dtype, found float16, wanted float32"):
        Scene().refit(given)
    scene = Scene(cast="lossless")
    made = scene.refit(given)
    assert made == [((name,), (name,)) for name in NEW]
    assert same_state(scene.holds(), {name: value.float() for name, value in given.items()})


def test_what_loses_is_cast_only_where_any_cast_may() -> None:
    given = {name: value.double() for name, value in NEW.items()}
    with pytest.raises(WeightMismatchError, match="dtype, found float64, wanted float32"):
        Scene(cast="lossless").refit(given)
    scene = Scene(cast="any")
    scene.refit(given)
    assert same_state(scene.holds(), NEW)


def test_numbers_of_another_kind_are_never_cast() -> None:
    given = {name: value.int() for name, value in NEW.items()}
    with pytest.raises(WeightMismatchError, match="dtype, found int32, wanted float32"):
        Scene(cast="any").refit(given)


def test_a_cast_that_overflows_is_found() -> None:
    half = {"h": torch.zeros(2).half()}
    with pytest.raises(WeightMismatchError, match="h: non-finite"):
        Scene(half, cast="any").refit({"h": torch.tensor([1.0, 1e30])})


def test_parts_are_packed_and_then_cast() -> None:
    scene = Scene(PACKED, pack=[QKV], cast="lossless")
    first, second = parts("l0", torch.bfloat16), parts("l1", torch.bfloat16)
    scene.refit({f"module.{name}": value for name, value in {**first, **second}.items()})
    joined = {
        f"l{n}.qkv.weight": torch.cat(list(p.values())).float()
        for n, p in enumerate((first, second))
    }
    assert same_state(scene.holds(), joined)


FLOATS = [
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32),
    torch.float64,
]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a small float dtype; of a large one those at its edges."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    info = torch.finfo(dtype)
    return torch.tensor([1 + info.eps, info.max, info.tiny, info.tiny * info.eps], dtype=dtype)


@pytest.mark.parametrize("before", FLOATS, ids=str)
@pytest.mark.parametrize("after", FLOATS, ids=str)
def test_lossless_is_what_comes_back(before: torch.dtype, after: torch.dtype) -> None:
    """Against trying all values, or those at the edges."""
    values = every_value(before).double()
    values = values[values.isfinite()]
    back = values.to(before).to(after).double()
    assert is_lossless(before, after) == bool(back.equal(values))


@pytest.mark.parametrize(
    ("before", "after", "lossless"),
    [
        (torch.int8, torch.int32, True),
        (torch.int32, torch.int8, False),
        (torch.uint8, torch.int8, False),
        (torch.uint8, torch.int16, True),
        (torch.int8, torch.uint8, False),
        (torch.int64, torch.float64, False),
        (torch.bool, torch.int8, False),
        (torch.complex64, torch.complex128, False),
    ],
)
def test_lossless_between_other_numbers(
    before: torch.dtype, after: torch.dtype, lossless: bool
) -> None:
    assert is_lossless(before, after) is lossless


# -- the one way in which all names fit ---------------------------------------------------------

WRAPPED = {
    "model.layers.0.weight": torch.zeros(2, 3),
    "model.layers.0.module.scale": torch.zeros(3),
    "model.module.weight": torch.zeros(2),
}
"""A program with wrapper words among the parts of its own names."""
PARTS = {name: torch.randn(value.shape) for name, value in WRAPPED.items()}


def test_names_of_the_program_can_be_exchanged() -> None:
    """Two towers that the model has the other way round."""
    program = {f"{tower}.weight": torch.zeros(2) for tower in ("query", "passage")}
    rules = [
        {"pattern": r"query\.(.*)", "to": r"passage.\1"},
        {"pattern": r"passage\.(.*)", "to": r"query.\1"},
    ]
    new = {"query.weight": torch.ones(2), "passage.weight": torch.full((2,), 2.0)}
    scene = Scene(program, rename=rules)
    scene.refit(new)
    assert scene.holds()["query.weight"].equal(new["passage.weight"])
    assert scene.holds()["passage.weight"].equal(new["query.weight"])
    with pytest.raises(WeightMismatchError, match="given twice"):
        Scene(program, rename=rules[:1]).refit(new)


def renamed(of: Callable[[str], str], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {of(name): value for name, value in state.items()}


@pytest.mark.parametrize(
    "of",
    [
        lambda n: n.replace(".0.", ".0._orig_mod."),
        lambda n: f"module.{n.replace('.0.', '._orig_mod.0._checkpoint_wrapped_module.')}",
        lambda n: f"_fsdp_wrapped_module.{n.replace('model.', 'model._fsdp_wrapped_module.')}",
        lambda n: f"model.module._orig_mod.{n}",
        lambda n: n.replace("module.", "module.module."),
    ],
)
def test_wrapper_words_are_told_from_parts_of_the_name(of: Callable[[str], str]) -> None:
    for how in ({}, {"partial": True}):
        scene = Scene(WRAPPED)
        scene.refit(renamed(of, PARTS), **how)
        assert same_state(scene.holds(), PARTS)


def test_of_two_names_the_one_with_fewer_parts_taken_out_is_meant() -> None:
    program = {"model.w": torch.zeros(2), "w": torch.zeros(2)}
    new = {"module.model.w": torch.ones(2), "module.w": torch.full((2,), 2.0)}
    scene = Scene(program)
    scene.refit(new)
    assert same_state(scene.holds(), {"model.w": new["module.model.w"], "w": new["module.w"]})


def test_a_name_that_may_be_two_is_left_alone() -> None:
    program = {"x.model.y.w": torch.zeros(2), "x.y.module.w": torch.zeros(2)}
    given = {"x.model.y.module.w": torch.ones(2)}
    with pytest.raises(WeightMismatchError, match=r"x\.model\.y\.module\.w: unexpected"):
        Scene(program).refit(given)


@pytest.mark.parametrize("prefix", ["model.", "net.", "net.body.", "_orig_mod."])
def test_a_prefix_that_all_names_lack_is_put_before_them(prefix: str) -> None:
    scene = Scene({prefix + name: value for name, value in PROGRAM.items()})
    report = scene.pipeline.refit(scene.compiled, {**NEW, "n_averaged": torch.ones(())}).report
    assert same_state(scene.holds(), {prefix + name: value for name, value in NEW.items()})
    assert any(repr(prefix) in note for note in report.notes)
    with pytest.raises(WeightMismatchError):
        Scene({prefix + name: value for name, value in PROGRAM.items()}).refit(NEW, partial=True)


def test_wrappers_that_the_program_has_in_the_middle() -> None:
    program = renamed(lambda n: n.replace("a.", "a._orig_mod."), PROGRAM)
    for prefix, said in (("state_dict.", "'state_dict.'"), ("", "wrapper parts")):
        scene, given = Scene(program), {prefix + name: value for name, value in NEW.items()}
        report = scene.pipeline.refit(scene.compiled, given).report
        assert same_state(scene.holds(), renamed(lambda n: n.replace("a.", "a._orig_mod."), NEW))
        assert any(said in note for note in report.notes)


def test_a_subtree_is_taken_under_a_prefix_of_wrappers_alone() -> None:
    """Any other prefix in place of another one may be another model's."""
    names = {"decoder.weight": torch.ones(2), "decoder.bias": torch.ones(2)}
    program = {name.replace("decoder", "encoder"): torch.zeros(2) for name in names}
    with pytest.raises(WeightMismatchError, match=r"decoder\.weight: unexpected"):
        Scene(program).refit(names)
    scene = Scene({name.replace("decoder", "model"): torch.zeros(2) for name in names})
    scene.refit(names)
    assert all(value.all() for value in scene.holds().values())


def test_packed_weights_count_for_a_subtree() -> None:
    given = {f"net.{n}": v for layer in ("l0", "l1") for n, v in parts(layer).items()}
    scene = Scene(PACKED, pack=[QKV])
    scene.refit(given)
    joined = torch.cat([given[f"net.l0.{n}.weight"] for n in "qkv"])
    assert torch.equal(scene.holds()["l0.qkv.weight"], joined)
    given["net.l1.v.weight"] = torch.zeros(3, 3)
    with pytest.raises(WeightMismatchError, match=r"l1\.qkv\.weight: shape"):
        Scene(PACKED, pack=[QKV]).refit(given)


def test_renaming_comes_first() -> None:
    scene = Scene(rename=[{"pattern": r"(.*)\.kernel", "to": r"module.\1.weight"}])
    given = {"a.kernel": NEW["a.weight"], "module.a.bias": NEW["a.bias"]}
    scene.refit({**given, "b.module.weight": NEW["b.module.weight"]})
    assert same_state(scene.holds(), NEW)


def test_choosing_reads_headers_only() -> None:
    class Headers(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            raise AssertionError(fqn)

    given = {f"{tree}.{name}": v for tree in ("net", "old") for name, v in NEW.items()}
    with pytest.raises(WeightMismatchError, match=r"--subtree 'old\.'"):
        Scene().refit(Headers(given))


# -- entries that are no weights ----------------------------------------------------------------


def test_what_rules_ignore_is_left_out_even_if_the_program_has_it() -> None:
    given = {**NEW, "head.weight": torch.ones(1), "heads": torch.ones(1)}
    with pytest.raises(WeightMismatchError, match=r"--ignore 'head\\\.\.\*\|heads'"):
        Scene().refit(given)
    scene = Scene(ignore=[r"head\..*", "heads"])
    assert scene.refit(given) == [(("head.weight", "heads"), ())]
    assert same_state(scene.holds(), NEW)
    with pytest.raises(WeightMismatchError, match=r"a\.bias: missing"):
        Scene(ignore=[r"a\.b.*"]).refit(NEW)


def test_patterns_match_with_and_without_the_subtree() -> None:
    given = {**{f"net.{name}": v for name, v in NEW.items()}, "net.odd": torch.ones(1)}
    for pattern in (r"net\.odd", "odd"):
        scene = Scene(subtree="net.", ignore=[pattern])
        scene.refit(given)
        assert same_state(scene.holds(), NEW)


KNOWN = {
    "n_averaged": torch.ones(()),
    "embeddings.position_ids": torch.arange(3),
    "a.rotary_emb.inv_freq": torch.ones(3),
    "h.0.attn.bias": torch.ones(1, 1, 3, 3),
    "optimizer.state.a.weight.exp_avg": torch.ones(4, 3),
    "rng_state": torch.ones(5, dtype=torch.uint8),
    "step": torch.ones(()),
}


@pytest.mark.parametrize("partial", [False, True])
def test_well_known_ones_are_left_out_and_reported(partial: bool) -> None:
    scene = Scene()
    report = scene.pipeline.refit(scene.compiled, {**NEW, **KNOWN}, partial=partial).report
    assert same_state(scene.holds(), NEW)
    (note,) = [note for note in report.notes if "not model weights" in note]
    assert "7 entries" in note
    assert "'n_averaged'" in note


@pytest.mark.parametrize(
    ("name", "shape"), [("h.0.attn.bias", (3, 3)), ("step", (3,)), ("my_position_ids", (3,))]
)
def test_names_that_look_like_those_are_unexpected(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightMismatchError, match=f"{name}: unexpected"):
        Scene().refit({**NEW, name: torch.ones(shape)})


def test_buffers_of_a_live_module_that_no_state_dict_has_are_not_mentioned() -> None:
    given = TensorMap({**NEW, "position_ids": torch.arange(3)}, not_persistent=["position_ids"])
    assert Scene().refit(given) == []


def test_a_program_that_has_such_a_name_gets_it() -> None:
    program = {**PROGRAM, "embeddings.position_ids": torch.zeros(3)}
    new = {**NEW, "embeddings.position_ids": torch.ones(3)}
    scene = Scene(program)
    scene.refit({f"net.{name}": value for name, value in new.items()})
    assert same_state(scene.holds(), new)


@pytest.mark.parametrize("whole", [True, False])
def test_many_unexpected_names_are_described_in_part(whole: bool) -> None:
    described: list[str] = []

    class Counting(TensorMap):
        def info(self, fqn: str) -> TensorInfo:
            described.append(fqn)
            return super().info(fqn)

    one = torch.ones(2)
    given = {f"x{n}.y.weight": one for n in range(30_000)}
    with pytest.raises(WeightMismatchError) as info:
        Scene().refit(Counting({**(NEW if whole else {}), **given}))
    kinds = Counter(problem.kind for problem in info.value.problems)
    assert kinds["unexpected"] == 10_001
    assert any(problem.subject == "20000 more names" for problem in info.value.problems)
    assert len(described) < 11_000


def test_many_subtrees_are_refused_without_a_look_at_each() -> None:
    one = {name: value for name, value in NEW.items() if name == "a.weight"}
    given = {f"x{n}.{name}": value for n in range(3000) for name, value in one.items()}
    with pytest.raises(WeightMismatchError, match=r"x0\.a\.weight: unexpected") as info:
        Scene({"a.weight": torch.zeros(4, 3)}).refit(given)
    assert {problem.kind for problem in info.value.problems} == {"unexpected", "missing"}


# -- ties ---------------------------------------------------------------------------------------


def test_a_name_that_the_graph_does_not_read_is_cast_as_the_one_it_is_tied_to() -> None:
    slot = make_slot("embed")
    leaves = [leaf_for(slot), leaf_for(slot, fqn="head").model_copy(update={"used": False})]
    plan = make_plan([recipe_row(slot, "embed", "head")], leaves=leaves, ties=[("embed", "head")])
    pipeline = Pipeline({"rules": {"cast": "lossless"}})
    source = pipeline.open_weights({"head": torch.ones(2).half()}, plan)
    assert source.info("head").dtype == "float32"


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"rename": [{"pattern": "(", "to": ""}]}, "not a regular expression"),
        ({"ignore": ["("]}, "not a regular expression"),
        ({"pack": [{"into": "qkv", "parts": ["{}.a"]}]}, "one {}"),
        ({"pack": [{"into": "{}.qkv", "parts": ["a"]}]}, "one {}"),
        ({"cast": "perhaps"}, "literal error"),
        ({"caste": "any"}, r"rules\.caste"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Pipeline({"rules": rules})


@pytest.mark.parametrize(
    ("subtree", "hint"),
    [
        ("modle.", "names begin with 'model'"),
        ("model", "did you mean 'model.'?"),
        ("net.", "did you mean 'model.net.'?"),
        ("a.", "did you mean 'model.net.a.'?"),
    ],
)
def test_a_subtree_that_fits_no_names(subtree: str, hint: str) -> None:
    scene = Scene(subtree=subtree)
    with pytest.raises(WeightMismatchError, match="subtree") as info:
        scene.refit({f"model.net.{name}": value for name, value in NEW.items()})
    (problem,) = info.value.problems
    assert (problem.subject, problem.hint) == (repr(subtree), hint)
