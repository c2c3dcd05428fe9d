"""The verifier ``outputs``: what passes, what never passes, and what it needs."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.verify.outputs import OutputsVerifier, compare
from refitkit.config import TOLERANCES
from refitkit.errors import ConfigError, NotRefittableError, RefitError
from refitkit.protocols import SlotValue, VerifyRequest
from refitkit.recipe import TensorMap
from tests.fakes import (
    FakeEngine,
    FakeModule,
    OpenEngine,
    make_plan,
    make_slot,
    recipe_row,
    same_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NAN, INF = float("nan"), float("inf")
Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - as torch's own results are


def t(*values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def passes(found: Any, expected: Any, tolerances: Any = TOLERANCES) -> bool:
    return compare(found, expected, tolerances).ok


# -- structure --------------------------------------------------------------------------------

NESTED = {
    "logits": t(1.0, 2.0),
    "state": [(t(3.0), None), Pair(4, "text")],
    "flag": True,
    "size": 3,
    "loss": 0.5,
}


def test_nested_results_are_compared_leaf_by_leaf() -> None:
    result = compare(NESTED, NESTED, TOLERANCES)
    assert result.ok
    assert {m.name for m in result.measures} >= {"['logits']", "['state'][0][0]", "['loss']"}
    assert "differ" in result.note
    assert result.verifier == "outputs"


def test_a_single_tensor_is_called_output() -> None:
    assert [m.name for m in compare(t(1.0), t(1.0), TOLERANCES).measures] == ["output"]


def changed(path: str, value: Any) -> Any:
    """NESTED with something else in one place."""
    state = [(t(3.0), None), Pair(4, "text")]
    new: dict[str, Any] = {**NESTED, "state": state}
    if path == "pair":
        state[1] = value
    elif path == "none":
        state[0] = (t(3.0), value)
    else:
        new[path] = value
    return new


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("logits", t(1.0, 2.5)),
        ("logits", t(1.0, 2.0, 3.0)),
        ("logits", t(1.0, 2.0).reshape(1, 2)),
        ("logits", t(1.0, 2.0).double()),
        ("logits", None),
        ("logits", [1.0, 2.0]),
        ("none", t(0.0)),
        ("none", 0),
        ("pair", Pair(5, "text")),
        ("pair", Pair(4, "other")),
        ("pair", (4, "text")),
        ("pair", Pair("4", "text")),
        ("flag", False),
        ("flag", 1),
        ("size", 4),
        ("size", 3.0),
        ("size", True),
        ("size", None),
        ("loss", 0.25),
        ("loss", t(0.5)),
        ("loss", torch.tensor(0.5)),
        ("more", 1),
    ],
    ids=str,
)
def test_any_difference_of_any_leaf_is_seen(path: str, value: Any) -> None:
    new = changed(path, value)
    assert not passes(new, NESTED)
    assert not passes(NESTED, new)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((t(1.0),), t(1.0)),
        ((t(1.0),), [t(1.0)]),
        ((t(1.0), t(2.0)), (t(1.0),)),
        ({"a": t(1.0)}, {"b": t(1.0)}),
        ((), None),
        (None, t(1.0)),
    ],
    ids=str,
)
def test_another_structure_is_another_result(found: Any, expected: Any) -> None:
    result = compare(found, expected, TOLERANCES)
    assert not result.ok
    assert result.note or not result.measures[0].ok


def test_an_ordered_dict_is_held_against_its_own_kind() -> None:
    assert passes(OrderedDict(a=t(1.0)), OrderedDict(a=t(1.0)))


def test_nothing_equals_nothing() -> None:
    assert passes(None, None)
    assert passes((), ())


def test_what_is_wrong_is_named() -> None:
    found = changed("logits", t(1.0, 2.5))
    wrong = [m for m in compare(found, NESTED, TOLERANCES).measures if not m.ok]
    assert [m.name for m in wrong] == ["['logits']"]
    assert (wrong[0].max_abs_error, wrong[0].scale) == (0.5, 2.0)
    assert "0.5" in wrong[0].note
    (shape,) = compare(t(1.0), t(1.0, 2.0), TOLERANCES).measures
    assert shape.note == "is float32 (1,), should be float32 (2,)"
    (value,) = compare("x" * 500, "y", TOLERANCES).measures
    assert len(value.note) <= 220
    (lost,) = compare(torch.randn(50, 50), None, TOLERANCES).measures
    assert lost.note == "is a tensor, float32 (50, 50), should be None"


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_what_is_not_finite_never_passes(bad: float, dtype: torch.dtype) -> None:
    good, odd = t(1.0, 2.0, dtype=dtype), t(1.0, bad, dtype=dtype)
    for found, expected in ((odd, odd), (odd, good), (good, odd), (odd, odd.clone())):
        result = compare(found, expected, TOLERANCES)
        assert not result.ok
        assert "NaN or infinite" in result.measures[0].note


@pytest.mark.parametrize("bad", [NAN, INF, -INF, complex(0, NAN), complex(INF, 0)])
def test_a_number_that_is_not_finite_never_passes(bad: Any) -> None:
    assert not passes(bad, bad)
    assert not passes({"loss": bad}, {"loss": bad})


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_the_limit_is_absolute_plus_relative_times_scale(name: str) -> None:
    """Told apart by one step of the dtype on either side of the limit."""
    dtype = getattr(torch, name)
    scale = 8.0
    absolute, relative = TOLERANCES[name]
    limit = absolute + relative * scale
    expected = t(scale, -scale / 2, 0.0, dtype=dtype)
    for error, ok in ((limit * 0.9, True), (limit * 1.2, False)):
        off = expected.clone()
        off[2] = error  # near zero, where the dtype is fine enough
        (measure,) = compare(off, expected, TOLERANCES).measures
        assert measure.ok == ok
        assert measure.limit == pytest.approx(limit)
        assert measure.scale == scale
        assert measure.max_abs_error == pytest.approx(error, rel=0.01)


def test_a_limit_counts_for_each_output_by_itself() -> None:
    """A large output must not lend its scale to a small one."""
    expected = {"large": t(1000.0), "small": t(0.001)}
    assert not passes({"large": t(1000.0), "small": t(0.011)}, expected)


def test_tolerances_can_be_set() -> None:
    found, expected = t(1.0, 2.0), t(1.0, 2.5)
    assert not passes(found, expected)
    assert passes(found, expected, {"float32": (0.5, 0.0)})
    assert passes(found, expected, {"float32": (0.0, 0.2)})
    assert not passes(found, expected, {"float64": (0.5, 0.0)})
    assert passes(found, found, {})


def test_a_dtype_without_a_tolerance_has_to_be_equal() -> None:
    one = t(1.0, 2.0).to(torch.float8_e4m3fn)
    assert passes(one, one.clone())
    assert not passes(one, t(1.0, 2.25).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.int32], ids=str)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    assert passes(t(1, 2, dtype=dtype), t(1, 2, dtype=dtype))
    assert not passes(t(1, 2, dtype=dtype), t(1, 3, dtype=dtype))


def test_large_integers_are_exact() -> None:
    """Beyond 2**53 a float64 cannot tell neighbours apart."""
    assert not passes(t(2**53 + 1, dtype=torch.int64), t(2**53, dtype=torch.int64))
    assert not passes(t(2**63 - 1, dtype=torch.int64), t(-(2**63), dtype=torch.int64))


def test_only_what_is_wrong_has_a_note() -> None:
    found = (t(1, 2, 4, dtype=torch.int64), 3, "text", t(1.0))
    result = compare(found, (t(1, 3, 5, dtype=torch.int64), 4, "text", t(1.0)), TOLERANCES)
    assert [m.note for m in result.measures] == [
        "2 of 3 elements differ",
        "is 3, should be 4",
        "",
        "",
    ]
    assert {m.note for m in compare(found, found, TOLERANCES).measures} == {""}
    assert result.note == "4 outputs compared, 2 differ"


def test_bools_are_exact() -> None:
    assert passes(t(True, False, dtype=torch.bool), t(True, False, dtype=torch.bool))
    assert not passes(t(True, False, dtype=torch.bool), t(True, True, dtype=torch.bool))


def test_differences_that_overflow_do_not_pass() -> None:
    huge = torch.finfo(torch.float64).max
    assert not passes(t(huge, dtype=torch.float64), t(-huge, dtype=torch.float64))


def test_empty_outputs_need_their_shape() -> None:
    assert passes(torch.ones(0, 3), torch.ones(0, 3))
    assert not passes(torch.ones(0, 3), torch.ones(0, 4))


def test_layout_and_gradients_do_not_matter() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    assert passes(a, a.t().contiguous().t())
    assert passes(a.requires_grad_(), a.detach())


def test_negative_zero_equals_zero() -> None:
    assert passes(t(-0.0), t(0.0))


# -- preparing and judging --------------------------------------------------------------------

SLOT = make_slot("w")
PLAN = make_plan([recipe_row(SLOT), recipe_row(make_slot("b"))])


class Program:
    """A kept program: ``x * w + b``."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []

    def bind(self, source: Any, pinned: Any) -> Callable[..., Any]:
        def program(x: torch.Tensor) -> torch.Tensor:
            self.modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return x * source.get("w") + source.get("b")

        return program


def answer(module: FakeModule, x: torch.Tensor) -> torch.Tensor:
    live = module.engines["model"].live
    return x * live["w"] + live["b"]


def module_with(kind: type[FakeEngine] = OpenEngine, answer: Any = answer) -> FakeModule:
    return FakeModule([kind("model", {"w": t(1.0, 2.0), "b": t(0.0, 0.0)})], answer=answer)


NEW = {"w": t(3.0, 4.0), "b": t(1.0, 1.0)}
X = t(10.0, 100.0)


def request(module: FakeModule, weights: Any = NEW, **more: Any) -> VerifyRequest:
    source = TensorMap(weights)
    values = {
        row.slot.key: SlotValue(row.slot, "recipe", row.sources, lambda: None)  # type: ignore[arg-type,return-value]
        for row in PLAN.ledger
        if row.slot.name in weights
    }
    fields: dict[str, Any] = {
        "plan": PLAN, "module": module, "source": source, "values": values,
        "inputs": ((X,), {}), "reference": None, "program": Program(), "tolerances": TOLERANCES,
    }  # fmt: skip
    return VerifyRequest(**{**fields, **more})


def write(module: FakeModule, weights: Any = NEW) -> None:
    module.engines["model"].live.update({k: v.clone() for k, v in weights.items()})


def judged(module: FakeModule, weights: Any = NEW, written: Any = None, **more: Any) -> Any:
    judge = OutputsVerifier().prepare(request(module, weights, **more))
    write(module, weights if written is None else written)
    return judge(module)


def test_the_kept_program_is_the_reference() -> None:
    assert judged(module_with()).ok
    assert not judged(module_with(), written={**NEW, "b": t(1.0, 2.0)}).ok


@pytest.mark.parametrize(
    "reference",
    [X * NEW["w"] + NEW["b"], lambda x: x * NEW["w"] + NEW["b"]],
    ids=["values", "callable"],
)
def test_a_reference_can_be_given(reference: Any) -> None:
    assert judged(module_with(), reference=reference, program=None).ok
    wrong = {**NEW, "w": t(3.0, 5.0)}
    assert not judged(module_with(), written=wrong, reference=reference, program=None).ok


def test_a_reference_comes_before_the_kept_program() -> None:
    assert not judged(module_with(), reference=t(0.0, 0.0)).ok


def test_a_module_can_be_the_reference() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * NEW["w"] + NEW["b"]

    assert judged(module_with(), reference=Model()).ok


def test_keyword_inputs_reach_both_sides() -> None:
    assert judged(module_with(), inputs=((), {"x": X})).ok


def test_without_inputs_it_refuses() -> None:
    with pytest.raises(ConfigError, match="inputs"):
        OutputsVerifier().prepare(request(module_with(), inputs=None))


def test_without_anything_to_compare_with_it_refuses() -> None:
    with pytest.raises(ConfigError, match="nothing to compare") as info:
        OutputsVerifier().prepare(request(module_with(), program=None))
    assert "reference=" in info.value.hint


def test_a_reference_that_fails_is_an_error_before_anything_is_written() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the reason")

    with pytest.raises(RefitError, match="the reason"):
        OutputsVerifier().prepare(request(module_with(), reference=fails))


def test_the_reference_is_computed_before_the_weights_are_written() -> None:
    """It may be the module itself, with its old weights."""
    module = module_with()
    judge = OutputsVerifier().prepare(
        request(module, reference=lambda x: module.run((x,), {}).clone())
    )
    write(module)
    assert not judge(module).ok


def test_inputs_that_a_model_changes_are_copies() -> None:
    def greedy(module: FakeModule, x: torch.Tensor, more: Any) -> torch.Tensor:
        result = answer(module, x) + more["y"][0]
        x.zero_()
        more["y"][0].zero_()
        return result

    def reference(x: torch.Tensor, more: Any) -> torch.Tensor:
        result = x * NEW["w"] + NEW["b"] + more["y"][0]
        x.zero_()
        more["y"][0].zero_()
        return result

    x, y = X.clone(), t(5.0)
    result = judged(
        module_with(answer=greedy), inputs=((x,), {"more": {"y": [y]}}), reference=reference
    )
    assert result.ok
    assert x.equal(X)
    assert y.equal(t(5.0))


def test_neither_gradients_nor_autocast_reach_either_side() -> None:
    program, seen = Program(), []

    def watched(module: FakeModule, x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return answer(module, x)

    x = X.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert judged(module_with(answer=watched), inputs=((x,), {}), program=program).ok
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert seen == program.modes == [(False, False)]
    assert x.grad is None


def test_the_module_is_probed_so_that_its_buffers_stay() -> None:
    module = module_with()
    judged(module)
    assert module.wire.calls.count("probe") == 1


def test_it_has_its_name() -> None:
    assert OutputsVerifier().name == "outputs"


# -- partial refits ---------------------------------------------------------------------------


def test_a_partial_refit_is_held_against_old_and_new_weights() -> None:
    part = {"w": NEW["w"]}
    assert judged(module_with(), part).ok
    assert not judged(module_with(), part, written=NEW).ok


def test_what_is_kept_is_copied_before_the_commit() -> None:
    """Reading aliases memory that the commit may overwrite."""
    module = module_with()
    judge = OutputsVerifier().prepare(request(module, {"w": NEW["w"]}))
    module.engines["model"].live["b"].fill_(9.0)
    assert not judge(module).ok


def test_a_partial_refit_of_what_cannot_be_read_needs_a_reference() -> None:
    part = {"w": NEW["w"]}
    with pytest.raises(NotRefittableError, match="'b'") as info:
        OutputsVerifier().prepare(request(module_with(FakeEngine), part))
    assert "reference=" in info.value.hint
    reference = X * NEW["w"]
    assert judged(module_with(FakeEngine), part, reference=reference).ok


def test_judging_changes_no_weights() -> None:
    module = module_with()
    judge = OutputsVerifier().prepare(request(module))
    write(module)
    before = module.holds()
    judge(module)
    assert same_state(module.holds(), before)


def test_anything_with_a_call_is_a_reference() -> None:
    reference = SimpleNamespace()  # not callable: the outputs themselves, of an odd kind
    assert not judged(module_with(), reference=reference).ok
