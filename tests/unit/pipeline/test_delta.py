"""Refits that write only what changed: by bits, by plan, by module, and never a stale slot."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import (
    EngineError,
    NotRefittableError,
    PluginError,
    RefitError,
    SourceError,
    UnmappedSlotError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.hookspecs import hookimpl
from refitkit.model import CallRef, LeafKind, LedgerRow, SlotState, SourceRef
from refitkit.pipeline import Pipeline
from refitkit.pipeline.delta import digest_of
from refitkit.protocols import Made, Mapped, SlotValue, TransformRequest, WeightGroup
from refitkit.recipe import TensorMap
from tests.fakes import (
    CountingMapping,
    FakeEngine,
    FakeModule,
    FakePlugin,
    Loaded,
    OpenEngine,
    TrippingPlugin,
    Tripwire,
    call_row,
    guard_of,
    leaf_for,
    make_module,
    make_plan,
    make_slot,
    op_call,
    pinned_row,
    plan_for,
    recipe_row,
    same_state,
    weights_for,
)
from tests.unit.pipeline.test_interrupts import Interrupter
from tests.unit.pipeline.test_mapping import Strategies, Strategy

if TYPE_CHECKING:
    from refitkit.model import RefitReport
    from refitkit.recipe import RefitPlan

NAN = float("nan")


WRONG: Any = {"verify": "outputs", "reference": {}, "inputs": (torch.ones(()),)}
"""A verification that no module passes."""


class Scene(Loaded):
    """A compiled module, refitted with ``delta``; it knows which slots a refit wrote."""

    def __init__(
        self,
        module: FakeModule | None = None,
        plan: RefitPlan | None = None,
        *plugins: object,
        **settings: Any,
    ) -> None:
        super().__init__(module or make_module(3), *plugins, **settings)
        self.compiled.plan = plan or self.compiled.plan
        self.report: RefitReport | None = None

    def refit(self, weights: Any, *, delta: bool | None = True, **how: Any) -> set[str]:
        """Names of the slots that were staged."""
        engines = self.module.engines.values()
        before = {engine.name: len(engine.staged) for engine in engines}
        self.report = self.pipeline.refit(self.compiled, weights, delta=delta, **how).report
        return {
            slot
            for engine in engines
            for staged in engine.staged[before[engine.name] :]
            for slot in staged.values
        }


def weights(fill: float = 1.0, engines: int = 3) -> dict[str, torch.Tensor]:
    return weights_for(make_module(engines), fill)


def test_the_first_writes_everything_the_next_what_changed() -> None:
    scene = Scene()
    assert scene.refit(weights()) == set(weights())
    changed = {**weights(), "e1.bias": torch.ones(2)}
    assert scene.refit(changed) == {"e1.bias"}
    assert same_state(scene.holds(), changed)
    assert scene.compiled.version == 2


def test_only_engines_with_changes_are_staged() -> None:
    scene = Scene()
    scene.refit(weights())
    scene.module.engines["e0"].wire.arm()
    scene.refit({**weights(), "e1.bias": torch.ones(2)})
    calls = scene.module.engines["e0"].wire.calls
    assert [c for c in calls if "stage" in c] == ["e1.stage-partial", "e1.stage-end"]
    assert [c for c in calls if c.endswith(".commit")] == ["e1.commit"]


def test_an_engine_of_which_everything_changed_is_staged_whole() -> None:
    scene = Scene()
    scene.refit(weights())
    scene.module.engines["e0"].wire.arm()
    new = {name: value + (name[:2] == "e1") for name, value in weights().items()}
    assert scene.refit(new) == {"e1.weight", "e1.bias"}
    assert "e1.stage" in scene.module.engines["e0"].wire.calls


def test_the_report_says_what_was_left() -> None:
    scene = Scene()
    scene.refit(weights())
    assert scene.report is not None
    assert (scene.report.delta, scene.report.slots_unchanged) == (True, 0)
    scene.refit({**weights(), "e1.bias": torch.ones(2)})
    report = scene.report
    assert (report.slots_written, report.slots_unchanged, report.bytes_written) == (1, 5, 8)
    rows = {row.slot: row for row in report.ledger}
    assert rows["e1.bias"].strategy == "recipe"
    assert rows["e0.bias"].strategy == ""
    assert rows["e0.bias"].reason == "unchanged: the slot already holds the value of its weights"
    assert "compare" in [stage.stage for stage in report.stages]
    scene.refit(weights(), delta=False)
    assert (scene.report.delta, scene.report.slots_unchanged) == (False, 0)


def test_nothing_changed_writes_nothing_and_is_a_refit() -> None:
    scene = Scene()
    scene.refit(weights())
    assert scene.refit(weights()) == set()
    assert scene.report is not None
    assert (scene.report.changed, scene.report.version) == (False, 2)
    assert any("nothing changed" in note for note in scene.report.notes)


@pytest.mark.parametrize(
    ("old", "new"),
    [(0.0, -0.0), (1.0, 1.0000001), (1.0, NAN), (NAN, -NAN)],
    ids=["negative zero", "next float", "nan", "another nan"],
)
def test_bits_decide(old: float, new: float) -> None:
    scene = Scene(check_finite=False)
    first = {**weights(), "e0.bias": torch.tensor([old, old])}
    scene.refit(first)
    assert scene.refit(first) == set()
    second = {**first, "e0.bias": torch.tensor([old, new])}
    if math.isnan(old):  # the sign of a NaN is lost in Python
        second["e0.bias"] = first["e0.bias"].view(torch.int32).bitwise_xor(1).view(torch.float32)
    assert scene.refit(second) == {"e0.bias"}
    assert same_state(scene.holds(), second)


def test_layout_does_not_count() -> None:
    scene = Scene()
    first = {**weights(), "e0.weight": torch.arange(6.0).reshape(2, 3)}
    scene.refit(first)
    turned = {**first, "e0.weight": first["e0.weight"].t().contiguous().t()}
    wide = torch.full((2, 6), 9.0)
    wide[:, ::2] = first["e1.weight"]
    assert scene.refit({**turned, "e1.weight": wide[:, ::2]}) == set()
    moved = {**turned, "e0.weight": turned["e0.weight"].flip(0)}
    assert scene.refit(moved) == {"e0.weight"}
    assert same_state(scene.holds(), moved)


def test_the_callers_tensors_may_change_in_place() -> None:
    """Digests are of what was written, not of tensors that live on."""
    scene = Scene()
    mine = weights()
    scene.refit(mine)
    mine["e2.bias"].add_(1.0)
    assert scene.refit(mine) == {"e2.bias"}
    assert same_state(scene.holds(), mine)


def test_what_a_digest_tells_apart() -> None:
    zeros = torch.zeros(4)
    others = {
        "shape": zeros.reshape(2, 2),
        "dtype": zeros.to(torch.int32),
        "value": torch.tensor([0.0, 0.0, 0.0, -0.0]),
        "empty": zeros[:0],
        "empty and wide": zeros.reshape(2, 2)[:0],
        "conj": torch.zeros(2, dtype=torch.complex64).conj(),
        "half": torch.zeros(8, dtype=torch.float8_e4m3fn),
        "scalar": torch.zeros(()),
    }
    found = {digest_of(name, TensorMap(others)) for name in others}
    assert len(found) == len(others)
    same = TensorMap({"a": zeros, "b": torch.zeros(9)[1:5], "c": torch.nn.Parameter(zeros)})
    assert len({digest_of(name, same) for name in "abc"}) == 1
    flat = torch.arange(4.0)
    order = TensorMap({"a": flat.reshape(2, 2), "b": flat.reshape(2, 2).t()})
    assert digest_of("a", order) != digest_of("b", order)


# -- what checks are told ---------------------------------------------------------------------


class Told:
    """A plugin that notes what it is told of entries that did not change."""

    def __init__(self) -> None:
        self.unchanged: set[str] = set()

    @hookimpl
    def refitkit_check(self, unchanged: Any) -> None:
        self.unchanged = set(unchanged)


def test_checks_are_told_which_entries_are_those_that_are_live() -> None:
    told = Told()
    scene = Scene(None, None, told)
    first = weights()
    scene.refit(first)
    assert told.unchanged == set()
    scene.refit({**first, "e1.bias": torch.ones(2)})
    assert told.unchanged == set(first) - {"e1.bias"}
    scene.refit(first, delta=False)
    assert told.unchanged == set()
    scene.refit(first)
    assert told.unchanged == set()
    scene.refit(first)
    assert told.unchanged == set(first)


def test_an_entry_that_calls_may_have_changed_in_a_slot_is_no_live_one() -> None:
    """One slot holds it as it was written, another may not: it is looked at again."""
    slots = {"s": torch.zeros(2), "moves": torch.zeros(2)}
    engine = OpenEngine("e0", slots)
    engine.slots["moves"] = engine.slots["moves"].model_copy(update={"mutable": True})
    module = FakeModule([engine])
    rows = [recipe_row(engine.slots[name], "w") for name in slots]
    told = Told()
    plan = make_plan(rows, leaves=[leaf_for(engine.slots["s"], fqn="w")])
    scene = Scene(module, plan, told)
    scene.refit({"w": torch.ones(2)})
    assert scene.refit({"w": torch.ones(2)}) == {"moves"}
    assert told.unchanged == set()


def test_only_new_entries_are_searched_for_what_is_not_finite() -> None:
    scene = Scene()
    scene.pipeline.refit(scene.compiled, weights(), delta=True)
    bad = {**weights(), "e2.bias": torch.tensor([1.0, NAN])}
    with pytest.raises(WeightMismatchError, match=r"e2\.bias: non-finite"):
        scene.refit(bad)
    loose = Pipeline({"check_finite": False}, plugins=[FakePlugin()])
    loose.refit(scene.compiled, bad, delta=True)
    assert scene.refit(bad) == set(), "it holds that value already: nothing becomes worse"


# -- what makes knowledge stale ---------------------------------------------------------------


def test_a_refit_without_delta_forgets() -> None:
    scene = Scene()
    scene.refit(weights(1.0))
    scene.refit(weights(5.0), delta=False)
    assert scene.refit(weights(1.0)) == set(weights())
    assert same_state(scene.holds(), weights(1.0))


def test_a_partial_refit_without_delta_forgets() -> None:
    scene = Scene()
    scene.refit(weights(1.0))
    scene.refit({"e0.bias": torch.ones(2)}, delta=False, partial=True)
    assert scene.refit(weights(1.0)) == set(weights())


def test_a_failed_refit_changes_nothing_that_is_known() -> None:
    """A by delta, B fails and is rolled back, C by delta: against A."""
    scene = Scene()
    a, b = weights(1.0), {**weights(1.0), "e1.bias": torch.full((2,), 7.0)}
    scene.refit(a)
    known = scene.compiled.state.live
    with pytest.raises(VerificationError):
        scene.refit(b, **WRONG)
    assert same_state(scene.holds(), a)
    assert scene.compiled.state.live is known
    c = {**a, "e2.bias": torch.full((2,), 9.0)}
    assert scene.refit(c) == {"e2.bias"}
    assert same_state(scene.holds(), c)
    assert scene.refit(b) == {"e1.bias", "e2.bias"}
    assert same_state(scene.holds(), b)


def test_a_failed_full_refit_changes_nothing_that_is_known() -> None:
    scene = Scene()
    a = weights(1.0)
    scene.refit(a)
    with pytest.raises(VerificationError):
        scene.refit(weights(5.0), delta=False, **WRONG)
    assert scene.refit({**a, "e0.bias": torch.zeros(2)}) == {"e0.bias"}


def test_every_failure_of_a_refit_leaves_what_is_known() -> None:
    """Wherever it fails, the next refit by delta gives the right module."""
    wire = Tripwire()
    scene = Scene(make_module(2, wire=wire), None, TrippingPlugin(wire))
    a, b = weights(1.0, 2), {**weights(1.0, 2), "e1.bias": torch.full((2,), 7.0)}
    scene.refit(a)
    wire.arm()
    scene.refit(b)
    labels = list(wire.calls)
    scene.refit(a)
    for number, label in enumerate(labels):
        wire.arm({number: RuntimeError(label)})
        try:
            scene.refit(b)
        except Exception:  # noqa: BLE001 - of any kind; what is live counts
            wire.arm()
        if not scene.compiled.gate.lost:
            scene.refit(a)
            assert same_state(scene.holds(), a), label
    assert len(labels) > 20


def test_a_verdict_on_nothing_is_taken_back_too() -> None:
    """Plugins were told of a commit: they are told that it was undone."""
    plugin = TrippingPlugin(Tripwire())
    scene = Scene(make_module(1), None, plugin)
    scene.refit(weights(1.0, 1))
    plugin.reports.clear()
    plugin.verdict = False
    with pytest.raises(VerificationError):
        scene.refit(weights(1.0, 1), verify="tripping-verifier")
    assert [report.outcome for report in plugin.reports] == ["committed", "rolled-back"]
    assert scene.compiled.version == 1


def test_a_module_that_was_counted_anew_is_written_whole() -> None:
    scene = Scene()
    scene.refit(weights())
    scene.compiled.state = replace(scene.compiled.state, version=7)
    assert scene.refit(weights()) == set(weights())


def test_two_modules_do_not_mix() -> None:
    one, other = Scene(), Scene()
    one.refit(weights(1.0))
    assert other.refit(weights(1.0)) == set(weights())
    assert one.refit(weights(1.0)) == set()


def test_a_copy_knows_nothing() -> None:
    scene = Scene()
    scene.refit(weights(1.0))
    result = scene.pipeline.refit(scene.compiled, weights(1.0), delta=True, copy=True)
    assert (result.report.slots_written, result.report.slots_unchanged) == (6, 0)
    report = scene.pipeline.refit(result.module, weights(1.0), delta=True).report
    assert (report.slots_written, report.slots_unchanged) == (0, 6)
    assert scene.refit(weights(1.0)) == set()


def test_another_plan_writes_everything() -> None:
    module = FakeModule([OpenEngine("e0", {"s": torch.zeros(2)})])
    slot = module.engines["e0"].slots["s"]
    leaves = [leaf_for(slot, fqn="w")]
    plans = [
        make_plan([call_row(slot, 0, "w")], leaves=leaves, calls=[op_call(op, "@w")])
        for op in ("neg.default", "abs.default", "neg.default")
    ]
    scene = Scene(module, plans[0])
    given = {"w": torch.ones(2)}
    assert scene.refit(given) == {"s"}
    assert scene.refit(given, plan=plans[1]) == {"s"}
    assert scene.holds()["s"].tolist() == [1.0, 1.0]
    assert scene.refit(given) == {"s"}
    assert scene.holds()["s"].tolist() == [-1.0, -1.0]
    assert scene.refit(given, plan=plans[2]) == set()  # the same, in another object


# -- what slots follow from -------------------------------------------------------------------


def folded() -> tuple[FakeModule, RefitPlan]:
    """``scale`` of three, one of them kept; ``w`` as it is; ``mask`` kept; ``eps`` a literal."""
    names = ("scale", "w", "mask", "literal")
    module = FakeModule([OpenEngine("e0", {n: torch.zeros(2) for n in names})])
    scale, w, mask, literal = module.engines["e0"].slots.values()
    leaves = [leaf_for(scale, fqn=name) for name in ("g", "var", "w", "twin")]
    leaves += [leaf_for(mask, LeafKind.NON_PERSISTENT_BUFFER, n) for n in ("eps", "mask")]
    frozen = pinned_row(literal).model_copy(update={"state": "frozen"})
    plan = make_plan(
        [
            call_row(scale, 1, "g", "var", "eps"),
            recipe_row(w, "w", "twin"),
            pinned_row(mask, "mask"),
            frozen,
        ],
        leaves=leaves,
        ties=[("w", "twin")],
        calls=[op_call("add.Tensor", "@var", "@eps"), op_call("mul.Tensor", "@g", CallRef(call=0))],
        pinned={n: torch.full((2,), 3.0) for n in ("eps", "mask", "literal")},
    )
    return module, plan


GIVEN = {name: torch.ones(2) for name in ("g", "var", "w")}


def test_any_source_of_a_computed_slot_counts() -> None:
    scene = Scene(*folded())
    assert scene.refit(GIVEN) == {"scale", "w", "mask", "literal"}
    assert scene.refit(GIVEN) == set()
    for name in ("g", "var"):
        new = {**GIVEN, name: torch.full((2,), 5.0)}
        assert scene.refit(new) == {"scale"}
        assert scene.holds()["scale"].tolist() == [5.0 * 4.0 if name == "g" else 8.0] * 2
        assert scene.refit(GIVEN) == {"scale"}


def test_a_kept_value_that_is_given_and_then_not_is_a_change() -> None:
    scene = Scene(*folded())
    scene.refit(GIVEN)
    over = {**GIVEN, "eps": torch.zeros(2), "mask": torch.ones(2)}
    assert scene.refit(over) == {"scale", "mask"}
    assert scene.holds()["scale"].tolist() == [1.0, 1.0]
    assert scene.refit(over) == set()
    assert scene.refit(GIVEN) == {"scale", "mask"}
    assert [scene.holds()[n].tolist() for n in ("scale", "mask")] == [[4.0, 4.0], [3.0, 3.0]]


def test_in_part_a_kept_value_that_was_given_stays() -> None:
    scene = Scene(*folded())
    scene.refit({**GIVEN, "mask": torch.ones(2)})
    assert scene.refit({"w": GIVEN["w"]}, partial=True) == set()
    assert scene.report is not None
    assert scene.report.verification is not None
    assert scene.holds()["mask"].tolist() == [1.0, 1.0]
    assert scene.refit({**GIVEN, "mask": torch.ones(2)}) == set()


def test_the_name_of_a_tied_weight_does_not_count() -> None:
    scene = Scene(*folded())
    scene.refit(GIVEN)
    renamed = {"g": GIVEN["g"], "var": GIVEN["var"], "twin": GIVEN["w"]}
    assert scene.refit(renamed) == set()
    assert scene.refit({**GIVEN, "twin": GIVEN["w"].clone()}) == set()
    assert scene.refit({**renamed, "twin": torch.zeros(2)}) == {"w"}
    with pytest.raises(WeightMismatchError):
        scene.refit({**GIVEN, "twin": torch.zeros(2)})


def test_slots_that_calls_change_are_always_written() -> None:
    """What was written is not what is live."""
    module = make_module(1)
    engine = module.engines["e0"]
    engine.slots["e0.bias"] = engine.slots["e0.bias"].model_copy(update={"mutable": True})
    scene = Scene(module, plan_for(module))
    scene.refit(weights(1.0, 1))
    engine.live["e0.bias"] = torch.full((2,), 9.0)
    assert scene.refit(weights(1.0, 1)) == {"e0.bias"}
    assert same_state(scene.holds(), weights(1.0, 1))


def test_slots_of_buffers_that_calls_change_are_always_written() -> None:
    module = make_module(1)
    slots = module.engines["e0"].slots
    leaves = [leaf_for(slots["e0.weight"]), leaf_for(slots["e0.bias"], LeafKind.BUFFER)]
    leaves[1] = leaves[1].model_copy(update={"mutated": True})
    scene = Scene(module, plan_for(module, leaves=leaves))
    scene.refit(weights(1.0, 1))
    assert scene.refit(weights(1.0, 1)) == {"e0.bias"}


def test_values_of_other_strategies_are_always_written() -> None:
    strategy = Strategy("mine", {"e0.bias"}, priority=1)
    module = make_module(1)
    scene = Scene(module, None, Strategies(strategy))
    scene.refit({**weights(1.0, 1), "e0.bias": torch.ones(2)})
    assert scene.refit({**weights(1.0, 1), "e0.bias": torch.ones(2)}) == {"e0.bias"}
    strategy.serves = set()
    assert scene.refit(weights(1.0, 1)) == {"e0.bias"}
    assert scene.refit(weights(1.0, 1)) == set()


class WithFormula(Strategy):
    """Serves ``e0.bias`` as the double of ``b``, with a formula."""

    def __init__(self, formula: Any = "double") -> None:
        super().__init__("mine", {"e0.bias"}, priority=1)
        self.formula, self.sources = formula, ("b",)
        self.answer = lambda request: Mapped(
            {
                row.slot.key: SlotValue(
                    row.slot,
                    "mine",
                    self.sources,
                    lambda: 2 * request.source.get("b"),
                    formula=self.formula,
                )
                for row in request.wanted
                if row.slot.name == "e0.bias"
            }
        )


def doubled(strategy: Strategy, **facts: Any) -> Scene:
    """A scene in which the plan does not know of ``e0.bias``, and the strategy does."""
    module = make_module(1)
    plan = plan_for(module)
    unknown = LedgerRow(slot=plan.ledger[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    leaves = [plan.data.leaves[0], leaf_for(make_slot("b"))]
    leaves[1] = leaves[1].model_copy(update=facts)
    return Scene(module, make_plan([plan.ledger[0], unknown], leaves=leaves), Strategies(strategy))


OF_FORMULA = {"e0.weight": torch.ones(2, 3), "b": torch.ones(2)}


def test_a_value_with_a_formula_is_written_only_if_its_sources_changed() -> None:
    strategy = WithFormula()
    scene = doubled(strategy)
    assert scene.refit(OF_FORMULA) == {"e0.weight", "e0.bias"}
    assert scene.refit(OF_FORMULA) == set()
    assert scene.report is not None
    rows = {row.slot: row.reason for row in scene.report.ledger}
    assert rows["e0.bias"].startswith("unchanged")
    assert scene.refit({**OF_FORMULA, "e0.weight": torch.zeros(2, 3)}) == {"e0.weight"}
    assert scene.refit({**OF_FORMULA, "b": 3 * torch.ones(2)}) == {"e0.weight", "e0.bias"}
    assert scene.holds()["e0.bias"].tolist() == [6.0, 6.0]
    # a verdict reads the values of unchanged slots, too
    assert scene.refit({**OF_FORMULA, "b": 3 * torch.ones(2)}, verify="weights") == set()
    strategy.formula = "another one"
    assert scene.refit({**OF_FORMULA, "b": 3 * torch.ones(2)}) == {"e0.bias"}
    assert scene.refit({**OF_FORMULA, "b": 3 * torch.ones(2)}) == set()


def test_a_formula_is_forgotten_where_something_else_wrote() -> None:
    scene = doubled(WithFormula())
    scene.refit(OF_FORMULA)
    scene.refit({**OF_FORMULA, "b": torch.zeros(2)}, delta=False)
    assert scene.refit(OF_FORMULA) == {"e0.weight", "e0.bias"}
    with suppress(RefitError):
        scene.refit({**OF_FORMULA, "b": torch.zeros(2)}, **WRONG)
    assert scene.refit(OF_FORMULA) == set()
    assert scene.holds()["e0.bias"].tolist() == [2.0, 2.0]


def test_formulas_that_say_not_enough() -> None:
    """Without sources a value may follow from all weights; calls may write a buffer."""
    strategy = WithFormula()
    strategy.sources = ()
    scene = doubled(strategy)
    scene.refit(OF_FORMULA)
    assert scene.refit(OF_FORMULA) == {"e0.bias"}
    scene = doubled(WithFormula(), mutated=True)
    scene.refit(OF_FORMULA)
    assert scene.refit(OF_FORMULA) == {"e0.bias"}
    scene = doubled(WithFormula(None))
    scene.refit(OF_FORMULA)
    assert scene.refit(OF_FORMULA) == {"e0.bias"}


def test_a_formula_that_cannot_be_compared_is_refused() -> None:
    scene = doubled(WithFormula(["double"]))
    before = scene.holds()
    with pytest.raises(PluginError, match=r"'mine' of the plugin.*formula that is not hashable"):
        scene.refit(OF_FORMULA)
    assert same_state(scene.holds(), before)


def guarded() -> tuple[FakeModule, RefitPlan]:
    module, slot = make_module(1), make_slot("g")
    leaves = [*plan_for(module).data.leaves, leaf_for(slot)]
    guard = guard_of(SourceRef(fqn="g"), torch.ones(2), "bool() of g")
    return module, plan_for(module, leaves=leaves, guards=[guard])


def test_a_guard_that_breaks_makes_every_slot_a_changed_one() -> None:
    """No slot follows from it; all hold because of it."""
    scene = Scene(*guarded())
    good = {**weights(1.0, 1), "g": torch.ones(2)}
    scene.refit(good)
    assert scene.refit(good) == set()
    with pytest.raises(UnmappedSlotError) as info:
        scene.refit({**good, "g": torch.zeros(2)})
    assert info.value.problems[0].kind == "guard"
    assert scene.refit({**good, "e0.bias": torch.zeros(2)}) == {"e0.bias"}


def test_after_a_broken_guard_nothing_is_known_of_what_others_gave() -> None:
    module, plan = guarded()
    rebuilds = Strategy("rebuilds", {"e0.weight", "e0.bias"}, priority=99)
    rebuilds.answer = lambda request: Mapped(
        {
            row.slot.key: SlotValue(
                row.slot, "rebuilds", (), lambda s=row.slot: torch.ones(s.shape)
            )
            for row in request.wanted
        }
    )
    scene = Scene(module, plan, Strategies(rebuilds))
    good = {**weights(1.0, 1), "g": torch.ones(2)}
    scene.refit(good)
    assert scene.refit({**good, "g": torch.zeros(2)}, verify="none") == {"e0.weight", "e0.bias"}
    assert scene.refit(good) == {"e0.weight", "e0.bias"}
    assert same_state(scene.holds(), weights(1.0, 1))


def test_a_source_that_cannot_be_read_is_a_source_error() -> None:
    class Breaking(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            raise OSError("the disk is gone")

    scene = Scene()
    with pytest.raises(SourceError, match=r"state_dict.*the disk is gone"):
        scene.refit(Breaking(weights()))


# -- engines ----------------------------------------------------------------------------------


def test_engines_that_take_all_weights_at_once_get_all_of_them() -> None:
    module = FakeModule(
        [
            FakeEngine("e0", {"a": torch.zeros(2), "b": torch.zeros(2)}),
            OpenEngine("e1", {"c": torch.zeros(2), "d": torch.zeros(2)}),
        ]
    )
    scene = Scene(module, plan_for(module))
    scene.refit({name: torch.ones(2) for name in "abcd"})
    assert scene.refit({**{name: torch.ones(2) for name in "abc"}, "d": torch.zeros(2)}) == {*"abd"}


class Forgetful(OpenEngine):
    """An engine that has lost what it holds: somebody else put another one in its place."""

    lost = False

    def stage_partial(self, values: Any) -> Any:
        if self.lost:
            raise NotRefittableError("Nobody knows the present weights.")
        return super().stage_partial(values)


def test_an_engine_that_has_lost_its_weights_gets_all_of_them() -> None:
    scene = Scene(make_module(2, kind=Forgetful))
    a, b = weights(1.0, 2), {**weights(1.0, 2), "e1.bias": torch.zeros(2)}
    scene.refit(a)
    engine = scene.module.engines["e1"]
    assert isinstance(engine, Forgetful)
    engine.lost = True
    scene.refit(b)
    assert scene.report is not None
    assert (scene.report.slots_written, scene.report.slots_unchanged) == (4, 0)
    assert same_state(scene.holds(), b)
    engine.lost = False
    assert scene.refit(a) == {"e1.bias"}


def test_an_engine_that_fails_to_stage_is_no_reason_to_write_everything() -> None:
    scene = Scene(make_module(1))
    scene.refit(weights(1.0, 1))
    wire = scene.module.engines["e0"].wire
    wire.arm()
    scene.refit({**weights(1.0, 1), "e0.bias": torch.ones(2)})
    wire.arm({wire.calls.index("e0.stage-end"): RuntimeError("out of memory")})
    with pytest.raises(EngineError, match="out of memory"):
        scene.refit(weights(1.0, 1))


# -- beside other ways to refit ---------------------------------------------------------------


def test_partial_and_delta_together() -> None:
    scene = Scene()
    assert scene.refit({"e0.bias": torch.ones(2)}, partial=True) == {"e0.bias"}
    assert scene.refit({"e0.bias": torch.ones(2)}, partial=True) == set()
    given = {"e0.bias": torch.ones(2), "e1.bias": torch.ones(2)}
    assert scene.refit(given, partial=True) == {"e1.bias"}
    rest = {**weights(), **given}
    assert scene.refit(rest) == set(rest) - set(given)
    assert same_state(scene.holds(), rest)
    assert scene.refit({"e2.bias": torch.zeros(2)}, partial=True) == {"e2.bias"}
    assert scene.refit(rest) == {"e2.bias"}


def test_unchanged_slots_count_as_reached() -> None:
    """Where nobody knows of a slot, given weights that reach no slot are an error; these do."""
    module = make_module(1)
    plan = plan_for(module)
    unknown = LedgerRow(slot=plan.ledger[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    scene = Scene(module, make_plan([plan.ledger[0], unknown], leaves=plan.data.leaves))
    given = {"e0.weight": torch.ones(2, 3)}
    assert scene.refit(given, partial=True) == {"e0.weight"}
    assert scene.refit(given, partial=True) == set()
    with pytest.raises(UnmappedSlotError):
        scene.refit({**given, "e0.bias": torch.ones(2)}, partial=True)


def test_an_interrupt_at_any_line_leaves_what_is_known_right() -> None:
    a, b = weights(1.0, 1), {**weights(1.0, 1), "e0.bias": torch.full((2,), 7.0)}

    def interrupted(at: int | None) -> tuple[Scene, int]:
        scene, interrupter, tracer = Scene(make_module(1)), Interrupter(at), sys.gettrace()
        scene.refit(a)
        sys.settrace(interrupter)
        try:
            with suppress(KeyboardInterrupt, RefitError):
                scene.refit(b)
        finally:
            sys.settrace(tracer)
        return scene, interrupter.lines

    lines = interrupted(None)[1]
    assert lines > 50
    for at in range(lines):
        scene, _ = interrupted(at)
        if not scene.compiled.gate.lost:
            scene.refit(a)
            assert same_state(scene.holds(), a)


def test_the_whole_module_is_judged() -> None:
    """Also slots that were left as they are."""
    scene = Scene()
    scene.refit(weights())
    scene.module.engines["e0"].live["e0.bias"] = torch.full((2,), 5.0)
    with pytest.raises(VerificationError) as info:
        scene.refit({**weights(), "e1.bias": torch.ones(2)})
    assert [p.subject for p in info.value.problems] == ["e0.bias"]
    measures = info.value.report.verification.measures
    assert len(measures) == 6


def test_the_setting_is_the_default() -> None:
    scene = Scene(delta=True)
    scene.refit(weights(), delta=None)
    assert scene.refit(weights(), delta=None) == set()
    assert scene.refit(weights(), delta=False) == set(weights())
    plain = Scene()
    plain.refit(weights(), delta=None)
    assert plain.compiled.state.live is None


def test_unchanged_weights_are_read_to_be_compared_and_checked_only() -> None:
    scene = Scene(check_finite=False)
    scene.refit(weights())
    counting = CountingMapping({**weights(), "e1.bias": torch.ones(2)})
    scene.refit(counting, verify="none")
    told = {name: counting.reads[name] for name in ("e0.bias", "e1.bias")}
    scene.refit(counting, verify="none", delta=False)
    assert told["e1.bias"] == told["e0.bias"] + 1


class Revised(TensorMap):
    """Tensors with revisions, which counts readings; ``None`` among the revisions: read it."""

    def __init__(self, tensors: Any, revisions: Any) -> None:
        super().__init__(tensors, "revised weights")
        self.revisions = revisions
        self.read: list[str] = []

    def revision(self, fqn: str) -> Any:
        return self.revisions[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        self.read.append(fqn)
        return super().get(fqn)


def test_entries_with_a_known_revision_are_not_read() -> None:
    scene = Scene()
    known: dict[str, Any] = dict.fromkeys(weights(), "first")
    assert scene.refit(Revised(weights(), known)) == set(weights())
    later = {**weights(), "e1.bias": torch.ones(2), "e0.bias": torch.full((2,), 5.0)}
    source = Revised(later, {**known, "e1.bias": ("second", 2), "e0.bias": None})
    assert scene.refit(source, verify="none") == {"e1.bias", "e0.bias"}
    assert set(source.read) == {"e1.bias", "e0.bias"}
    assert same_state(scene.holds(), later)


def test_a_revision_is_no_digest() -> None:
    """A slot of which a digest is known is compared with what has one."""
    scene = Scene()
    scene.refit(weights())
    digest = digest_of("e0.bias", TensorMap(weights()))
    known: dict[str, Any] = dict.fromkeys(weights(), None)
    assert scene.refit(Revised(weights(5.0), {**known, "e0.bias": digest})) == set(weights())


def test_what_rules_make_is_known_by_what_it_is_made_of() -> None:
    """Renamed and cast: read only where what it is made of, or how, is another one."""
    given = {f"module.{n}" if n == "e0.bias" else n: value for n, value in weights().items()}
    known: dict[str, Any] = dict.fromkeys(given, "first")
    scene = Scene(rules={"cast": "lossless"})
    scene.refit(Revised(given, known))
    source = Revised(given, known)
    assert scene.refit(source, verify="none") == set()
    assert source.read == []
    later = {**given, "module.e0.bias": torch.full((2,), 7.0)}
    source = Revised(later, {**known, "module.e0.bias": "second"})
    assert scene.refit(source, verify="none") == {"e0.bias"}
    halves = {**later, "module.e0.bias": later["module.e0.bias"].half()}
    source = Revised(halves, {**known, "module.e0.bias": "second"})  # a lie, told apart by the cast
    assert scene.refit(source, verify="none") == {"e0.bias"}


def test_what_a_transform_makes_without_a_formula_is_read() -> None:
    class Doubled:
        name, priority = "doubled", 50

        def groups(self, request: TransformRequest) -> list[WeightGroup]:
            source = request.source
            gives = {"e0.bias": source.info("e0.bias")}
            return [
                WeightGroup(
                    ("e0.bias",), gives, lambda: Made({"e0.bias": source.get("e0.bias") * 2})
                )
            ]

    class Plugin:
        name = "doubling"

        @hookimpl
        def refitkit_weight_transforms(self) -> list[Any]:
            return [Doubled()]

    scene = Scene(None, None, Plugin())
    known: dict[str, Any] = dict.fromkeys(weights(), "first")
    scene.refit(Revised(weights(), known))
    source = Revised({**weights(), "e0.bias": torch.full((2,), 7.0)}, known)
    assert scene.refit(source, verify="none") == {"e0.bias"}
    assert set(source.read) == {"e0.bias"}
