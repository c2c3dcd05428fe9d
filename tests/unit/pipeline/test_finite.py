"""What is computed on the way into a slot has to be finite, where the present value is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import refitkit
from refitkit.errors import SourceError, WeightMismatchError
from refitkit.pipeline.checks import FiniteCheck
from refitkit.program.bits import same_bits
from refitkit.protocols import Mapped, MapRequest, SlotValue
from refitkit.recipe import TensorMap
from refitkit.recipe.sources import LARGE
from tests.fakes import (
    BACKEND,
    FakeModule,
    OpenEngine,
    call_row,
    leaf_for,
    make_plan,
    make_slot,
    op_call,
    pipeline_with,
    recipe_row,
    with_plan,
)
from tests.unit.builtin.torch_tensorrt.scenes import engine_of, slot_values

ROOT, W = make_slot("root"), make_slot("w")
PLAN = make_plan(
    [call_row(ROOT, 0, "var"), recipe_row(W)],
    leaves=[leaf_for(ROOT, fqn="var"), leaf_for(W)],
    calls=[op_call("sqrt.default", "@var")],
)
GOOD = {"var": torch.ones(2), "w": torch.ones(2)}


def folded(**settings: Any) -> tuple[Any, Any]:
    """A module with a slot that holds the root of a weight, and its pipeline."""
    module = FakeModule([OpenEngine("model", {"root": torch.ones(2), "w": torch.ones(2)})])
    pipeline = pipeline_with(**settings)
    return pipeline, pipeline.load(module)


def refit(pipeline: Any, compiled: Any, **new: list[float]) -> Any:
    weights = {**GOOD, **{name: torch.tensor(value) for name, value in new.items()}}
    return pipeline.refit(compiled, weights, plan=PLAN, verify="none").report


def test_a_recipe_that_makes_nan_of_finite_weights() -> None:
    pipeline, compiled = folded()
    with pytest.raises(WeightMismatchError) as info:
        refit(pipeline, compiled, var=[-1.0, 4.0], w=[5.0, 5.0])
    (problem,) = info.value.problems
    assert (problem.subject, problem.kind) == ("root", "non-finite")
    assert problem.found == "1 of 2 elements, the first at (0,)"
    assert "'var'" in problem.hint
    assert "check_finite=False" in problem.hint
    assert compiled.read("root").tolist() == compiled.read("w").tolist() == [1.0, 1.0]
    assert compiled.version == 0
    assert refit(pipeline, compiled, var=[9.0, 4.0]).outcome == "committed"
    assert compiled.read("root").tolist() == [3.0, 2.0]


def test_it_can_be_allowed_and_then_is_no_longer_wrong() -> None:
    pipeline, compiled = folded(check_finite=False)
    refit(pipeline, compiled, var=[-1.0, 4.0])
    assert math.isnan(compiled.read("root")[0])
    strict = pipeline_with()
    assert refit(strict, compiled, var=[-2.0, 9.0]).outcome == "committed"
    with pytest.raises(WeightMismatchError, match="1 of 2"):
        refit(strict, compiled, var=[-2.0, -9.0])


def test_the_way_back_is_not_judged() -> None:
    """What a module held at first is what it is."""
    pipeline, compiled = folded(check_finite=False)
    refit(pipeline, compiled, var=[-1.0, 4.0])
    result = pipeline_with().refit(compiled, GOOD, plan=PLAN, verify="none")
    result.undo()
    assert math.isnan(compiled.read("root")[0])


class Spoiling:
    """A plugin whose strategy gives NaN."""

    name = "spoiling"
    priority = 1

    def map(self, request: MapRequest) -> Mapped:
        rows = request.wanted
        value = torch.tensor([math.nan, 1.0])
        return Mapped(
            {r.slot.key: SlotValue(r.slot, self.name, r.sources, lambda: value) for r in rows}
        )

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Any]:
        return [self]


def test_a_strategy_that_gives_nan() -> None:
    pipeline = pipeline_with(Spoiling())
    compiled = pipeline.load(with_plan(FakeModule([OpenEngine("model", {"w": torch.ones(2)})])))
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(compiled, {"w": torch.ones(2)}, verify="none")
    (problem,) = info.value.problems
    assert (problem.subject, problem.found) == ("w", "1 of 2 elements, the first at (0,)")
    assert compiled.read("w").tolist() == [1.0, 1.0]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class Dividing(Spoiling):
    """Gives NaN for the weights of one program, as 0 / 0 would, and others as they are."""

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own

    def map(self, request: MapRequest) -> Mapped:
        (row,) = (r for r in request.wanted if r.slot.name == "first.bias")
        value = request.source.get("first.bias")
        given = value.sub(self.own).div(value.sub(self.own)).mul(value)
        return Mapped({row.slot.key: SlotValue(row.slot, self.name, (), lambda: given)})


def test_a_proof_brings_back_what_the_program_has() -> None:
    """Moved weights may make finite what the program's own do not."""
    x = torch.zeros(1, 4)
    program = torch.export.export(Net().eval(), (x,))
    own = program.state_dict["first.bias"].detach().clone()
    pipeline = pipeline_with(Dividing(own))
    compiled = pipeline.compile(program, BACKEND)
    assert compiled.read("first.bias").isnan().all()
    assert pipeline.config.check_finite


class Turning(TensorMap):
    """A source whose values are another's from the second reading on, as of a file that changes."""

    def __init__(self, first: torch.Tensor, later: torch.Tensor) -> None:
        super().__init__({"w": first})
        self.first, self.later, self.reads = first, later, 0

    def get(self, fqn: str) -> torch.Tensor:
        self.reads += 1
        return self.first if self.reads == 1 else self.later


def test_the_bytes_that_are_found_finite_are_those_that_are_committed() -> None:
    pipeline = pipeline_with()
    compiled = pipeline.load(with_plan(FakeModule([OpenEngine("model", {"w": torch.ones(2)})])))
    source = Turning(torch.zeros(2), torch.tensor([math.nan, 1.0]))
    pipeline.refit(compiled, source, verify="none")
    assert source.reads == 1
    assert compiled.read("w").tolist() == [0.0, 0.0]
    bad = Turning(source.later, source.first)
    with pytest.raises(WeightMismatchError) as info:
        pipeline.refit(compiled, bad, verify="none")
    (problem,) = info.value.problems
    assert (problem.subject, problem.found) == ("w", "1 of 2 elements, the first at (0,)")
    assert compiled.read("w").tolist() == [0.0, 0.0]


def test_what_is_not_finite_by_design_may_stay_so_where_it_is_staged() -> None:
    pipeline = pipeline_with()
    mask = torch.tensor([-math.inf, 1.0])
    compiled = pipeline.load(with_plan(FakeModule([OpenEngine("model", {"w": mask})])))
    pipeline.refit(compiled, {"w": torch.tensor([math.nan, 2.0])}, verify="none")
    assert compiled.read("w")[1] == 2
    with pytest.raises(WeightMismatchError):
        pipeline.refit(compiled, {"w": torch.tensor([0.0, math.inf])}, verify="none")


def test_what_is_refused_anyway_is_refused_for_all_reasons_at_once() -> None:
    pipeline, compiled = folded()
    with pytest.raises(WeightMismatchError) as info:
        refit(pipeline, compiled, w=[math.nan, 1.0], other=[1.0])
    assert {(p.subject, p.kind) for p in info.value.problems} == {
        ("w", "non-finite"),
        ("other", "unexpected"),
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pieces_are_judged_on_their_way(bad: float) -> None:
    """Only what was found finite to its end is not looked at again."""
    size = LARGE // 4
    module = FakeModule([OpenEngine("model", {"w": torch.ones(size)})])
    slot = make_slot("w", (size,))
    good, spoilt = torch.ones(size), torch.ones(size)
    spoilt[-1] = bad
    looked = []
    for value in (good, spoilt):
        check = FiniteCheck(module, make_plan([recipe_row(slot)]), overwrite=False)
        given = SlotValue(
            slot,
            "recipe",
            ("w",),
            lambda v=value: v,
            True,
            False,
            lambda _into, v=value: iter(v.split(999)),
        )
        (watched,) = check.watched({slot.key: given}).values()
        assert watched.pieces is not None
        assert same_bits(torch.cat(list(watched.pieces(None) or ())), value)
        looked.append(not check._to_judge({slot.key: watched}))
        next(iter(watched.pieces(None) or ()))
        assert check._to_judge({slot.key: watched})  # not read to its end this time
    assert looked == [True, False]


class Watching(TensorMap):
    """A source of files that says how often it is asked whether they are what they were."""

    description = "files"

    def __init__(self, *, changed: str = "") -> None:
        super().__init__({"w": torch.zeros(2)}, "files")
        self.asked: list[str] = []
        self.changed = changed

    def require_unchanged(self) -> None:
        self._ask("unchanged")

    def reread(self) -> None:
        self._ask("reread")

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what == self.changed:
            raise SourceError("w was changed")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ["unchanged"]), ({"reread": True}, ["unchanged", "reread"])],
    ids=["default", "reread"],
)
def test_files_are_asked_before_the_commit(settings: Any, expected: list[str]) -> None:
    module = with_plan(FakeModule([OpenEngine("model", {"w": torch.ones(2)})]))
    pipeline = pipeline_with(**settings)
    compiled = pipeline.load(module)
    for what in expected:
        source = Watching(changed=what)
        with pytest.raises(SourceError, match="w was changed"):
            pipeline.refit(compiled, source, verify="none")
        assert compiled.read("w").tolist() == [1.0, 1.0]
    source = Watching()
    pipeline.refit(compiled, source, verify="none")
    assert source.asked == expected
    for ask in (pipeline.verify, pipeline.diff):
        source = Watching()
        ask(compiled, source)
        assert source.asked == expected
        with pytest.raises(SourceError, match="w was changed"):
            ask(compiled, Watching(changed=expected[-1]))


# -- engines that remember their weights ----------------------------------------------------------


class Counted(TensorMap):
    """Counts how often an entry is read."""

    reads = 0

    def get(self, fqn: str) -> torch.Tensor:
        self.reads += 1
        return super().get(fqn)


def remembering(**options: Any) -> tuple[Any, Any]:
    """A module with an engine of TensorRT, whose slot has another name than its weight."""
    held = {"w": torch.tensor([-math.inf, 1.0])}
    engine, _ = engine_of("model", held, **options)
    plan = make_plan([recipe_row(engine.slots["w"], "a.weight")])
    pipeline = pipeline_with()
    compiled = pipeline.load(FakeModule([engine]))
    compiled.plan = plan
    return pipeline, compiled


def read_by(pipeline: Any, compiled: Any, new: list[float], **how: Any) -> int:
    source = Counted({"a.weight": torch.tensor(new)}, "weights")
    pipeline.refit(compiled, source, verify="none", **how)
    return source.reads


def test_what_an_engine_remembers_is_compared_where_it_is_staged() -> None:
    pipeline, compiled = remembering()
    first = read_by(pipeline, compiled, [1.0, 2.0])  # nobody knows what it holds
    assert read_by(pipeline, compiled, [3.0, 4.0]) == first - 1
    with pytest.raises(WeightMismatchError) as info:
        read_by(pipeline, compiled, [math.nan, 4.0])
    assert [problem.subject for problem in info.value.problems] == ["a.weight"]
    assert compiled.engines["model"].remembered("w").tolist() == [3.0, 4.0]
    with pytest.raises(WeightMismatchError):  # without a rollback no value is kept to compare with
        read_by(pipeline, compiled, [math.nan, 4.0], rollback=False)


def test_an_engine_that_does_not_look_is_not_trusted() -> None:
    """It was opened by a pipeline that allows such values."""
    pipeline, compiled = remembering(check_finite=False)
    read_by(pipeline, compiled, [1.0, 2.0])
    with pytest.raises(WeightMismatchError):
        read_by(pipeline, compiled, [math.nan, 2.0])


def test_what_an_engine_has_infinite_may_stay_so() -> None:
    pipeline, compiled = remembering()
    compiled.engines["model"].adopt(
        slot_values(compiled.engines["model"], {"w": torch.tensor([-math.inf, 1.0])})
    )
    read_by(pipeline, compiled, [-math.inf, 2.0])
    with pytest.raises(WeightMismatchError) as info:
        read_by(pipeline, compiled, [-math.inf, math.inf])
    (problem,) = info.value.problems
    assert problem.found == "1 of 2 elements, the first at (1,)"
