"""Names, packing and dtypes of checkpoints that are not the program's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.builtin.rules.casts import is_lossless
from refitkit.errors import ConfigError, WeightMismatchError
from refitkit.pipeline import Pipeline
from tests.fakes import FakeModule, Loaded, OpenEngine, plan_for, same_state

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
    with pytest.raises(WeightMismatchError, match="cannot become what the program reads") as info:
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


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"rename": [{"pattern": "(", "to": ""}]}, "no regular expression"),
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
        ("model", "'model.' is meant"),
        ("net.", "'model.net.' is meant"),
        ("a.", "'model.net.a.' is meant"),
    ],
)
def test_a_subtree_that_fits_no_names(subtree: str, hint: str) -> None:
    scene = Scene(subtree=subtree)
    with pytest.raises(WeightMismatchError, match="subtree") as info:
        scene.refit({f"model.net.{name}": value for name, value in NEW.items()})
    (problem,) = info.value.problems
    assert (problem.subject, problem.hint) == (repr(subtree), hint)
