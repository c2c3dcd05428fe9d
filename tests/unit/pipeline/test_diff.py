"""What two sets of weights differ in: sources, modules, one of each, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit.errors import (
    ConfigError,
    ModuleLostError,
    PlanMismatchError,
    RefitInProgressError,
    SourceError,
    UnsupportedTargetError,
    WeightMismatchError,
)
from refitkit.model import DiffReport
from refitkit.recipe import TensorMap
from tests.fakes import FakeEngine, PeakMemory, make_module, pipeline_with, plan_for, weights_for
from tests.unit.builtin.torch_tensorrt.scenes import Scene, weights_of

State = dict[str, torch.Tensor]


def diff(a: object, b: object, **settings: Any) -> DiffReport:
    return pipeline_with(**settings).diff(a, b)


def states(report: DiffReport) -> dict[str, str]:
    return {row.name: row.state for row in report.rows}


A: State = {
    "same": torch.tensor([math.nan, -0.0]),
    "little": torch.tensor([100.0, 0.0]),
    "much": torch.tensor([3.0, 4.0]),
    "zeros": torch.zeros(4),
    "order": torch.tensor([0, 1, 2, 3]),
    "gone": torch.ones(2),
    "shape": torch.ones(2, 3),
    "kind": torch.tensor([1.0, 0.1]),
    "whole": torch.tensor([1, 2]),
    "zero": torch.tensor([0.0]),
}
B: State = {
    "same": A["same"].clone(),
    "little": torch.tensor([100.0, 1.0]),
    "much": torch.tensor([-3.0, -4.0]),
    "zeros": torch.tensor([0.0, 0.0, 0.0, 2.0]),
    "order": torch.tensor([0, 1, 3, 2]),
    "new": torch.ones(1),
    "shape": torch.ones(3, 2),
    "kind": torch.tensor([1.0, 0.1]).half(),
    "whole": torch.tensor([1.0, 2.0]),
    "zero": torch.tensor([-0.0]),
}


# -- two sources ------------------------------------------------------------------------------


def test_every_state_in_order() -> None:
    report = diff(A, B)
    assert [(row.name, row.state) for row in report.rows] == [
        ("gone", "only in A"),
        ("new", "only in B"),
        ("shape", "other shape"),
        ("whole", "other dtype"),
        ("zeros", "changed"),
        ("much", "changed"),
        ("order", "changed"),
        ("little", "changed"),
        ("kind", "other dtype"),
        ("zero", "changed"),
        ("same", "same"),
    ]
    assert report.differs
    assert report.counts == {
        "changed": 5,
        "other dtype": 2,
        "other shape": 1,
        "only in A": 1,
        "only in B": 1,
        "same": 1,
    }
    assert report.summary == (
        "5 changed, 2 other dtype, 1 other shape, 1 only in A, 1 only in B, 1 same"
    )
    assert (report.a, report.b) == ("a state_dict of 10 entries",) * 2
    assert DiffReport.model_validate_json(report.model_dump_json()) == report


def test_numbers() -> None:
    rows = {row.name: row for row in diff(A, B).rows}
    numbers = {name: (row.relative, row.largest, row.share) for name, row in rows.items()}
    assert numbers == {
        "same": (0, 0, 0),
        "zero": (0, 0, 1),
        "little": (pytest.approx(0.01), 1, 0.5),
        "much": (pytest.approx(2), 8, 1),
        "zeros": (math.inf, 2, 0.25),
        "order": (0.5, 1, 0.5),
        "kind": (pytest.approx(2.43e-5, rel=1e-2), pytest.approx(2.44e-5, rel=1e-2), 0.5),
        **dict.fromkeys(("gone", "new", "shape", "whole"), (None, None, None)),
    }


def test_kinds_and_shapes_of_both() -> None:
    rows = {row.name: row for row in diff(A, B).rows}
    told = {n: (r.dtype, r.shape, r.other_dtype, r.other_shape) for n, r in rows.items()}
    assert told["much"] == ("float32", (2,), "", None)
    assert told["new"] == ("float32", (1,), "", None)
    assert told["shape"] == ("float32", (2, 3), "", (3, 2))
    assert told["kind"] == ("float32", (2,), "float16", None)
    assert told["whole"] == ("int64", (2,), "float32", None)


@pytest.mark.parametrize(
    ("one", "other", "relative"),
    [
        ("float64", "float32", 0.1),
        ("bfloat16", "float8_e5m2", 0.25),
        ("float32", "complex64", 0.1),
        ("complex128", "complex64", 0.1),
        ("int32", "int64", None),
        ("bool", "float32", None),
    ],
)
def test_other_dtypes_are_subtracted_where_that_means_something(
    one: str, other: str, relative: float | None
) -> None:
    a = torch.ones(3, dtype=getattr(torch, one))
    b = torch.full((3,), 1 + (relative or 0), dtype=torch.float32).to(getattr(torch, other))
    (row,) = diff({"w": a}, {"w": b}).rows
    assert row.state == "other dtype"
    assert row.relative == (None if relative is None else pytest.approx(relative, rel=1e-6))


def test_float64_is_not_rounded_to_compare_it() -> None:
    a = torch.tensor([1.0], dtype=torch.float32)
    (row,) = diff({"w": a}, {"w": a.double() + 1e-12}).rows
    assert row.relative == pytest.approx(1e-12, rel=1e-3, abs=0)


def test_what_is_no_tensor_is_told() -> None:
    a = {"w": torch.ones(1), "step": 3, "sparse": torch.eye(2).to_sparse()}
    report = diff(a, {"w": torch.ones(1), "step": 4, "sparse": torch.eye(2)})
    assert states(report) == {"w": "same", "step": "not usable", "sparse": "not usable"}
    notes = {row.name: row.note for row in report.rows}
    assert notes["step"].startswith("A: a int, not a tensor; B: a int")
    assert notes["sparse"].startswith("A: layout sparse")
    assert "B:" not in notes["sparse"]


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_changed(count: int) -> None:
    state = {f"w{n}": torch.ones(n) for n in range(count)}
    report = diff(state, {name: value.clone() for name, value in state.items()})
    assert not report.differs
    assert report.summary == (
        "nothing changed: 3 same" if count else "nothing changed: both are empty"
    )


def test_anything_that_is_weights(tmp_path: Any) -> None:
    live = torch.nn.Linear(2, 2)
    save_file(live.state_dict(), tmp_path / "w.safetensors")
    program = torch.export.export(live, (torch.ones(1, 2),))
    things = [live, program, tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")]
    things += [live.state_dict(), TensorMap(live.state_dict())]
    for thing in things:
        assert not refitkit.diff(live, thing).differs
    assert not refitkit.diff(iter(live.state_dict().items()), live).differs


class Making:
    """Makes each tensor when it is asked for it."""

    description = "made"

    def __init__(self, value: float, names: int = 12) -> None:
        self.value, self._names = value, dict.fromkeys(f"w{n}" for n in range(names))
        self.read: list[str] = []

    def names(self) -> Any:
        return self._names.keys()

    def info(self, fqn: str) -> Any:
        return refitkit.model.TensorInfo(dtype="float32", shape=(1024, 1024))

    def get(self, fqn: str) -> torch.Tensor:
        self.read.append(fqn)
        return torch.full((1024, 1024), self.value)


def test_one_pair_at_a_time() -> None:
    """Twelve pairs of 8 MB; what it takes to compare one is less than 32 MB."""
    a, b = Making(1.0), Making(2.0)
    with PeakMemory() as memory:
        report = diff(a, b)
    assert report.counts == {"changed": 12}
    assert a.read == b.read == list(a.names())
    assert 8e6 < memory.peak < 40e6


# -- with a plan ------------------------------------------------------------------------------


def test_with_a_plan_weights_are_compared_as_the_program_reads_them() -> None:
    opened = make_module(1)
    plan = plan_for(opened)
    a = weights_for(opened, 1.0)
    b = {f"net.{name}": value.half() for name, value in a.items()}
    rules = {"subtree": "net.", "cast": "lossless"}
    with pytest.raises(ConfigError, match="need a plan") as info:
        diff(b, b, rules=rules)
    assert "--plan" in info.value.hint
    held = pipeline_with(
        rules={"rename": [{"pattern": r"net\.(.*)", "to": r"\1"}], "cast": "lossless"}
    )
    assert not held.diff(a, b, plan=plan).differs
    assert "through" in held.diff(a, b, plan=plan).b
    assert states(diff(a, b)) == {
        **dict.fromkeys(a, "only in A"),
        **dict.fromkeys(b, "only in B"),
    }


# -- a module ---------------------------------------------------------------------------------


def test_weights_and_what_a_module_holds() -> None:
    made = pipeline_with()
    compiled = made.load(make_module(2))
    new = weights_for(compiled.opened, 1.0)
    new["e1.bias"] = compiled.read("e1.bias")
    for a, b in ((compiled, new), (new, compiled)):
        report = made.diff(a, b)
        assert states(report) == {
            "e0/e0.weight": "changed",
            "e0/e0.bias": "changed",
            "e1/e1.weight": "changed",
            "e1/e1.bias": "same",
        }
    held, wanted = compiled.read("e0.weight"), new["e0.weight"]
    there, back = (
        {row.name: row.relative for row in made.diff(a, b).rows}["e0/e0.weight"]
        for a, b in ((compiled, new), (new, compiled))
    )
    assert there == pytest.approx(float((wanted - held).norm() / held.norm()))
    assert back == pytest.approx(float((wanted - held).norm() / wanted.norm()))
    made.refit(compiled, new)
    assert made.diff(new, compiled).summary == "nothing changed: 4 same"


def test_with_one_engine_names_are_the_slots() -> None:
    compiled = pipeline_with().load(make_module(1))
    report = pipeline_with().diff(compiled, weights_for(compiled.opened, 1.0))
    assert set(states(report)) == {"e0.weight", "e0.bias"}
    assert report.a == "a module of fake"


def test_a_slot_whose_shape_nobody_knows_is_flat() -> None:
    opened = make_module(1)
    slots = opened.engines["e0"].slots
    slots["e0.weight"] = slots["e0.weight"].model_copy(update={"shape": None})  # the plan knows it
    made = pipeline_with()
    compiled, new = made.load(opened), weights_for(opened, 1.0)
    report = made.diff(compiled, new)
    assert {row.name: row.shape for row in report.rows} == {"e0.weight": (6,), "e0.bias": (2,)}
    assert report.counts == {"changed": 2}


def test_rules_are_followed_with_a_module() -> None:
    compiled = pipeline_with().load(make_module(1))
    wrapped = {f"module.{n}": v for n, v in weights_for(compiled.opened, 1.0).items()}
    assert pipeline_with().diff(compiled, wrapped).counts == {"changed": 2}
    made = pipeline_with(rules={"subtree": "net.", "cast": "any"})
    compiled = made.load(make_module(1))
    new = {f"net.{n}": v.double() for n, v in weights_for(compiled.opened, 1.0).items()}
    assert states(made.diff(compiled, new)) == {"e0.weight": "changed", "e0.bias": "changed"}


def test_weights_that_are_not_finite_can_be_compared() -> None:
    """A refit would refuse them; here one wants to see them."""
    made = pipeline_with()
    compiled = made.load(make_module(1))
    new = weights_for(compiled.opened, 1.0)
    new["e0.weight"][0, 0] = math.nan
    (first, _) = made.diff(compiled, new).rows
    assert (first.name, first.relative, first.largest) == ("e0.weight", math.inf, math.inf)


def test_nothing_is_changed() -> None:
    made = pipeline_with()
    compiled = made.load(make_module(2))
    before = compiled.opened.holds()
    made.diff(compiled, weights_for(compiled.opened, 1.0))
    made.diff(compiled, compiled)
    assert compiled.version == 0
    assert all(compiled.opened.holds()[n].equal(v) for n, v in before.items())
    assert compiled.opened.staged() == []


def test_two_modules() -> None:
    made = pipeline_with()
    compiled = made.load(make_module(2))
    copy = made.copy(compiled)
    assert made.diff(compiled, copy).summary == "nothing changed: 4 same"
    assert not made.diff(compiled, compiled).differs
    made.refit(copy, {"e1.bias": torch.ones(2)}, partial=True)
    report = made.diff(compiled, copy)
    assert (report.rows[0].name, report.counts) == ("e1/e1.bias", {"changed": 1, "same": 3})


def test_a_module_that_cannot_be_read() -> None:
    made = pipeline_with()
    compiled = made.load(make_module(2, kind=FakeEngine))
    for a, b in ((compiled, weights_for(compiled.opened, 1.0)), (compiled, compiled)):
        with pytest.raises(UnsupportedTargetError, match="live weights of the module are") as info:
            made.diff(a, b)
        assert [problem.subject for problem in info.value.problems] == ["e0", "e1"]


@pytest.mark.parametrize("runtime", ["python", "cpp"])
def test_tensorrt_is_known_once_it_was_refitted(runtime: str) -> None:
    """It cannot be read; what it was given is kept."""
    scene = Scene((runtime, runtime), "fresh")
    made, compiled = scene.pipeline, scene.compiled
    with pytest.raises(UnsupportedTargetError) as info:
        made.diff(compiled, weights_of(1))
    assert [problem.subject for problem in info.value.problems] == ["e0", "e1"]
    assert made.refit(compiled, weights_of(1), verify="none").report.changes[0].engine == "part"
    assert not made.diff(compiled, weights_of(1)).differs
    report = made.diff(compiled, weights_of(2))
    # the first element of a constant is -0 in both
    assert report.counts == {"changed": 8}
    assert {row.share for row in report.rows if "CONSTANT" in row.name} == {0.5}
    found = made.refit(compiled, weights_of(2), verify="none").report.changes
    assert {row.engine for row in found} == {"e0", "e1", "part"}
    moved = {f"{row.engine}/{row.slot}": row.relative for row in found}
    wanted = {row.name: row.relative for row in report.rows}
    assert moved == pytest.approx(wanted)
    scene.plugin.verdict = False
    with pytest.raises(refitkit.VerificationError):
        scene.refit(3)
    assert not made.diff(compiled, weights_of(2)).differs


# -- wrong input ------------------------------------------------------------------------------


def test_weights_of_another_model() -> None:
    made = pipeline_with()
    compiled = made.load(make_module(1))
    with pytest.raises(WeightMismatchError) as info:
        made.diff({"e0.weight": torch.ones(3, 2), "other": torch.ones(1)}, compiled)
    kinds = {problem.subject: problem.kind for problem in info.value.problems}
    assert kinds == {"e0.weight": "shape", "other": "unexpected", "e0.bias": "missing"}


def test_modules_of_other_models() -> None:
    made = pipeline_with()
    one, other = made.load(make_module(1)), make_module(2)
    slot = other.engines["e0"].slots["e0.bias"]
    other.engines["e0"].slots["e0.bias"] = slot.model_copy(update={"dtype": "float16"})
    with pytest.raises(WeightMismatchError, match="different models") as info:
        made.diff(one, made.load(other))
    kinds = {problem.subject: problem.kind for problem in info.value.problems}
    assert kinds == {
        "e0/e0.bias": "differs in type",
        "e1/e1.weight": "only in B",
        "e1/e1.bias": "only in B",
    }


def test_a_module_without_a_plan_or_with_another_ones() -> None:
    made = pipeline_with()
    opened = make_module(1)
    opened.attachments = {}
    compiled = made.load(opened)
    new = weights_for(opened, 1.0)
    with pytest.raises(PlanMismatchError, match="no plan"):
        made.diff(compiled, new)
    with pytest.raises(PlanMismatchError):
        made.diff(compiled, new, plan=plan_for(make_module(2)))
    assert made.diff(compiled, new, plan=plan_for(opened)).counts == {"changed": 2}


def test_what_is_neither(tmp_path: Any) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "w.safetensors").write_text("hello")
    for wrong in (tmp_path / "text", tmp_path / "w.safetensors"):
        with pytest.raises(SourceError, match="neither weights nor a module") as info:
            diff({}, wrong)
        assert [p.subject for p in info.value.problems] == ["as weights", "as a module"]
    for alone, says in ((tmp_path / "missing", "There is no file"), (3, "No plugin can read")):
        with pytest.raises(SourceError, match=says) as info:
            diff(alone, {})
        assert info.value.problems == ()
    with pytest.raises(SourceError, match="Neither A nor B") as info:
        diff(tmp_path / "missing", 3)
    assert [problem.subject for problem in info.value.problems] == ["A", "B"]
    assert "There is no file" in info.value.problems[0].hint


class Broken(TensorMap):
    """Fails to read some entries, in several ways."""

    def get(self, fqn: str) -> torch.Tensor:
        if fqn == "much":
            raise OSError("the disk is gone")
        if fqn == "order":
            raise SourceError("its shard is cut off")
        if fqn == "zeros":
            return torch.zeros(5)
        return super().get(fqn)


def test_all_entries_that_cannot_be_read_are_told() -> None:
    with pytest.raises(SourceError, match="cannot be compared") as info:
        diff(A, Broken(B, "broken"))
    told = {problem.subject: str(problem) for problem in info.value.problems}
    assert told.keys() == {"much", "zeros", "order"}
    assert "the disk is gone" in told["much"]
    assert "cut off" in told["order"]
    assert "unlike its header" in told["zeros"]


def test_it_is_refused_inside_a_call_or_a_refit_and_of_a_lost_module() -> None:
    made = pipeline_with()
    opened = make_module(1)
    compiled = made.load(opened)
    errors: list[Exception] = []

    def inside() -> None:
        try:
            made.diff(compiled, compiled)
        except RefitInProgressError as exc:
            errors.append(exc)

    opened.on_run = inside
    compiled(torch.ones(1))
    assert len(errors) == 1
    compiled.gate.poison("lost")
    with pytest.raises(ModuleLostError):
        made.diff(compiled, {})


def test_a_tied_weight_is_compared_under_either_of_its_names() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    report = refitkit.diff({"embed": one}, {"embed": one, "head": one})
    assert {(row.name, row.state, row.note) for row in report.rows} == {
        ("embed", "same", ""),
        ("head", "same", "A has it as 'embed'"),
    }
    report = refitkit.diff({"embed": two, "head": two}, {"embed": one})
    assert report.counts == {"changed": 2}
    report = refitkit.diff({"embed": one}, {"embed": one, "head": one.clone()})
    assert report.counts == {"only in B": 1, "same": 1}
