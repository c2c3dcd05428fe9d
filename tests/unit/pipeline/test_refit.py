"""One refit: order of stages, what the report says, partial refits, limits, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.config import Config
from refitkit.errors import (
    ConfigError,
    NotRefittableError,
    PlanMismatchError,
    Problem,
    UnmappedSlotError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.model import (
    LeafKind,
    LedgerRow,
    RefitReport,
    SlotState,
    SourceRef,
    StageFinished,
    StageStarted,
)
from refitkit.pipeline import Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER
from tests.fakes import (
    FakeEngine,
    FakeModule,
    FakePlugin,
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
    pipeline_with,
    plan_for,
    recipe_row,
    same_state,
    weights_for,
)

if TYPE_CHECKING:
    from refitkit.pipeline import CompiledModule, RefitResult
    from refitkit.recipe import RefitPlan

STAGES = ["load", "map", "check", "prepare", "stage", "commit", "verify"]


def refit(module: FakeModule, weights: Any, **how: Any) -> RefitResult:
    return pipeline_with().refit(module, weights, **how)


# -- a whole refit ----------------------------------------------------------------------------


def test_new_weights_are_served() -> None:
    module = make_module(2)
    new = weights_for(module, 10.0)
    result = refit(module, new)
    assert same_state(result.module(), {f"{k[:2]}/{k}": v for k, v in new.items()})
    assert result.module.version == 1


def test_the_callers_tensors_stay_the_callers() -> None:
    module = make_module(1)
    new = {k: v.requires_grad_() for k, v in weights_for(module, 10.0).items()}
    kept = {k: v.detach().clone() for k, v in new.items()}
    refit(module, new)
    assert all(v.requires_grad and v.grad is None for v in new.values())
    assert same_state({k: v.detach() for k, v in new.items()}, kept)
    with torch.no_grad():
        new["e0.bias"].fill_(-1.0)
    assert module.holds()["e0/e0.bias"].tolist() == [11.0, 11.0]


def test_a_refit_leaves_gradient_mode_and_autocast_alone() -> None:
    module = make_module(1)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        refit(module, weights_for(module, 10.0))
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_stages_come_in_order_and_are_told_and_timed() -> None:
    plugin, module = TrippingPlugin(Tripwire()), make_module(1)
    made = pipeline_with(plugin)
    compiled = made.load(module)
    plugin.events.clear()
    report = made.refit(compiled, weights_for(module, 1.0)).report
    assert [stage.stage for stage in report.stages] == STAGES
    started = [e.stage for e in plugin.events if isinstance(e, StageStarted)]
    finished = [e.stage for e in plugin.events if isinstance(e, StageFinished)]
    assert (started, finished) == (STAGES, STAGES)
    assert {e.verb for e in plugin.events} == {"refit"}
    assert report.seconds == sum(s.seconds for s in report.stages)


def test_the_report_says_what_was_done() -> None:
    module = make_module(2)
    report = refit(module, weights_for(module, 5.0)).report
    assert (report.outcome, report.backend, report.version) == ("committed", "fake", 1)
    assert (report.slots_written, report.bytes_written) == (4, 2 * (6 + 2) * 4)
    assert report.changed is True
    assert not report.partial
    assert [(m.engine, m.kind, m.bytes) for m in report.memory] == [
        ("e0", "device", 32),
        ("e1", "device", 32),
    ]
    assert {(r.engine, r.slot) for r in report.ledger} == {
        (f"e{n}", f"e{n}.{name}") for n in (0, 1) for name in ("weight", "bias")
    }
    assert {r.strategy for r in report.ledger} == {"recipe"}
    assert report.ledger[0].sources == ("e0.weight",)
    assert report.verification is not None
    assert report.verification.verifier == "weights"
    assert report.notes == ()
    assert "state_dict" in report.source


def test_a_report_survives_json() -> None:
    module = make_module(2)
    report = refit(module, weights_for(module, 10.0)).report
    assert RefitReport.model_validate_json(report.model_dump_json()) == report


def test_weights_that_are_the_same_are_told() -> None:
    module = make_module(2)
    same = module.by_slot()
    report = refit(module, same).report
    assert report.changed is False
    assert any("nothing changed" in note for note in report.notes)
    assert refit(module, {**same, "e1.bias": torch.tensor([0.0, 1.0])}).report.changed is True


def test_an_engine_that_cannot_tell_makes_changed_unknown() -> None:
    module = make_module(2)
    same = module.by_slot()
    compiled = pipeline_with().load(module)
    stage = module.engines["e1"].stage

    def cannot_tell(values: Any) -> Any:
        staged = stage(values)
        staged.changed = lambda: None  # type: ignore[method-assign]
        return staged

    module.engines["e1"].stage = cannot_tell  # type: ignore[method-assign]
    assert pipeline_with().refit(compiled, same).report.changed is None
    same["e0.bias"] = torch.tensor([5.0, 5.0])
    assert pipeline_with().refit(compiled, same).report.changed is True


def test_versions_count_commits_only() -> None:
    module = make_module(1)
    made = pipeline_with()
    compiled = made.load(module)
    assert compiled.version == 0
    made.refit(compiled, weights_for(module, 1.0))
    with pytest.raises(WeightMismatchError):
        made.refit(compiled, {})
    made.refit(compiled, weights_for(module, 2.0))
    assert compiled.version == 2


def test_forward_and_back_again_is_exact() -> None:
    module = make_module(3)
    before = module.holds()
    old = {k.partition("/")[2]: v for k, v in before.items()}
    compiled = pipeline_with().load(module)
    pipeline_with().refit(compiled, weights_for(module, 1.0))
    pipeline_with().refit(compiled, old)
    assert same_state(module.holds(), before)


# -- copies -----------------------------------------------------------------------------------


def test_a_copy_is_refitted_and_the_original_is_not() -> None:
    module = make_module(2)
    before = module.holds()
    made = pipeline_with()
    compiled = made.load(module)
    result = made.refit(compiled, weights_for(module, 9.0), copy=True)
    assert result.module is not compiled
    assert same_state(compiled(), before)
    assert not same_state(result.module(), before)
    assert compiled.version == 0
    assert result.module.plan is compiled.plan


def test_a_copy_of_an_opened_object_leaves_the_object() -> None:
    module = make_module(2)
    before = module.holds()
    result = pipeline_with().refit(module, weights_for(module, 9.0), copy=True)
    assert same_state(module.holds(), before)
    assert not same_state(result.module(), before)


def test_without_copy_the_module_itself_is_refitted() -> None:
    made, module = pipeline_with(), make_module(1)
    compiled = made.load(module)
    assert made.refit(compiled, weights_for(module, 9.0)).module is compiled


def test_a_copy_that_fails_leaves_the_original() -> None:
    made, module = pipeline_with(), make_module(1)
    compiled = made.load(module)
    before = module.holds()
    with pytest.raises(WeightMismatchError):
        made.refit(compiled, {}, copy=True)
    assert same_state(compiled(), before)


# -- refusals before anything is staged -------------------------------------------------------


def refused(module: FakeModule, weights: Any, *plugins: object, **how: Any) -> Any:
    """The error of a refit that must be refused before anything is staged."""
    settings = how.pop("settings", {})
    before = module.holds()
    with pytest.raises(Exception) as info:  # noqa: PT011 - returned
        pipeline_with(*plugins, **settings).refit(module, weights, **how)
    assert module.staged() == []
    assert same_state(module.holds(), before)
    return info.value


def test_a_module_without_a_plan() -> None:
    module = make_module(1)
    module.attachments = {}
    error = refused(module, {})
    assert isinstance(error, PlanMismatchError)
    assert "refitkit.plan" in error.hint


def test_a_plan_can_be_given() -> None:
    module = make_module(1)
    plan = plan_for(module)
    module.attachments = {}
    new = weights_for(module, 2.0)
    assert refit(module, new, plan=plan).report.outcome == "committed"


def test_a_given_plan_comes_before_the_modules_own() -> None:
    module = make_module(1)
    error = refused(module, weights_for(module, 1.0), plan=plan_for(make_module(2)))
    assert isinstance(error, PlanMismatchError)
    assert {p.subject for p in error.problems} == {"e1/e1.weight", "e1/e1.bias"}


def test_a_plan_for_another_backend() -> None:
    module = make_module(1)
    error = refused(module, {}, plan=plan_for(module, backend="other"))
    assert isinstance(error, PlanMismatchError)
    assert [p.subject for p in error.problems] == ["backend"]


def test_checks_of_all_plugins_are_reported_at_once() -> None:
    plugin = TrippingPlugin(Tripwire())
    plugin.problems = [Problem("mine", "one"), Problem("mine", "two")]
    error = refused(make_module(1), {"odd": torch.ones(1)}, plugin)
    assert isinstance(error, WeightMismatchError)
    kinds = [(p.subject, p.kind) for p in error.problems]
    assert kinds == [
        ("odd", "unexpected"),
        ("e0.weight", "missing"),
        ("e0.bias", "missing"),
        ("mine", "one"),
        ("mine", "two"),
    ]


def test_rollback_limit() -> None:
    module = make_module(2)
    new = weights_for(module, 1.0)
    error = refused(module, new, settings={"rollback_limit": 63})
    assert isinstance(error, NotRefittableError)
    assert "64" in str(error)
    assert "rollback_limit" in str(error)
    done = pipeline_with(rollback_limit=64).refit(module, new)
    assert done.report.outcome == "committed"


def test_reading_back_what_cannot_be_read() -> None:
    module = make_module(2, kind=FakeEngine)
    error = refused(module, weights_for(module, 1.0), verify="weights")
    assert isinstance(error, NotRefittableError)
    assert {p.subject for p in error.problems} == {"e0", "e1"}


def test_comparing_outputs_without_inputs_or_reference() -> None:
    module = make_module(1)
    new = weights_for(module, 1.0)
    assert isinstance(refused(module, new, verify="outputs"), ConfigError)
    without_reference = refused(module, new, inputs=(torch.ones(1),))
    assert isinstance(without_reference, ConfigError)
    assert "reference" in str(without_reference)


def test_a_verifier_that_does_not_exist() -> None:
    module = make_module(1)
    error = refused(module, weights_for(module, 1.0), verify="wieghts")
    assert isinstance(error, ConfigError)
    assert "weights, none" in error.hint


def test_unmapped_slots_stop_a_refit() -> None:
    module = make_module(1)
    rows = list(plan_for(module).ledger)
    rows[1] = LedgerRow(slot=rows[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    error = refused(module, {"e0.weight": torch.ones(2, 3)}, plan=make_plan(rows))
    assert isinstance(error, UnmappedSlotError)
    assert [p.subject for p in error.problems] == ["e0/e0.bias"]
    assert "nobody knows" in str(error)


# -- verification -----------------------------------------------------------------------------


def test_weights_are_read_back_where_they_can_be() -> None:
    module = make_module(1)
    report = refit(module, weights_for(module, 1.0)).report
    assert report.verification is not None
    assert report.verification.verifier == "weights"


@pytest.mark.parametrize("how", [{"verify": "none"}, {}])
def test_the_report_says_where_nothing_was_verified(how: dict[str, str]) -> None:
    module = make_module(1, kind=OpenEngine if how else FakeEngine)
    report = refit(module, weights_for(module, 1.0), **how).report
    assert report.verification is None
    assert any("only staging was checked" in note for note in report.notes)
    assert "verify" not in {s.stage for s in report.stages}


def test_one_engine_that_cannot_be_read_is_enough() -> None:
    wire = Tripwire()
    engines = [kind(f"e{n}", {f"w{n}": torch.ones(2)}, wire) for n, kind in [
        (0, OpenEngine), (1, FakeEngine)
    ]]  # fmt: skip
    module = FakeModule(engines)
    report = refit(module, weights_for(module, 1.0), plan=plan_for(module)).report
    assert report.verification is None


def test_outputs_are_compared_where_there_are_inputs() -> None:
    module = make_module(1)
    new = weights_for(module, 1.0)
    right = {f"e0/{k}": v * 3.0 for k, v in new.items()}
    x = torch.tensor(3.0)
    report = refit(module, new, inputs=(x,), reference=right).report
    assert report.verification is not None
    assert report.verification.verifier == "outputs"
    assert report.verification.ok


def test_wrong_outputs_bring_the_old_weights_back() -> None:
    module = make_module(1)
    before, new = module.holds(), weights_for(module, 1.0)
    wrong = {f"e0/{k}": v * 3.5 for k, v in new.items()}
    with pytest.raises(VerificationError) as info:
        refit(module, new, inputs=(torch.tensor(3.0),), reference=wrong)
    assert same_state(module.holds(), before)
    assert len(info.value.problems) == 2
    report = info.value.report
    assert RefitReport.model_validate_json(report.model_dump_json()) == report


class Corrupting(OpenEngine):
    """An engine that loses a bit on the way in."""

    def _stage(self, values: Any) -> Any:
        staged = super()._stage(values)
        staged.values["e0.bias"] = -staged.values["e0.bias"]
        return staged


def test_a_corrupted_weight_is_found_by_reading_back() -> None:
    module = make_module(1, kind=Corrupting)
    before = module.holds()
    new = {**weights_for(module, 1.0), "e0.bias": torch.tensor([0.0, -0.0])}
    with pytest.raises(VerificationError) as info:
        refit(module, new)
    assert [p.subject for p in info.value.problems] == ["e0.bias"]
    assert same_state(module.holds(), before)


# -- partial refits ---------------------------------------------------------------------------


def test_a_partial_refit_changes_what_is_given() -> None:
    module = make_module(2)
    before = module.holds()
    bias = torch.tensor([5.0, 6.0])
    report = refit(module, {"e1.bias": bias}, partial=True).report
    assert same_state(module.holds(), {**before, "e1/e1.bias": bias})
    assert (report.partial, report.slots_written, report.bytes_written) == (True, 1, 8)
    served = {r.slot: r.strategy for r in report.ledger}
    assert served == {"e0.weight": "", "e0.bias": "", "e1.weight": "", "e1.bias": "recipe"}
    assert module.engines["e0"].staged == []


def test_a_partial_refit_that_fails_changes_nothing() -> None:
    module = make_module(1, kind=Corrupting)
    before = module.holds()
    with pytest.raises(VerificationError):
        refit(module, {"e0.bias": torch.tensor([5.0, 6.0])}, partial=True)
    assert same_state(module.holds(), before)


def test_a_partial_refit_needs_engines_that_can() -> None:
    module = make_module(2, kind=FakeEngine)
    error = refused(module, {"e1.bias": torch.tensor([5.0, 6.0])}, partial=True)
    assert isinstance(error, NotRefittableError)
    assert {p.subject for p in error.problems} == {"e0", "e1"}


def test_a_partial_refit_with_nothing_to_refit() -> None:
    error = refused(make_module(1), {}, partial=True)
    assert isinstance(error, WeightMismatchError)
    assert [p.kind for p in error.problems] == ["nothing to refit"]


def test_a_partial_refit_still_refuses_what_does_not_fit() -> None:
    weights = {"e0.bias": torch.ones(3), "odd": torch.ones(1)}
    error = refused(make_module(1), weights, partial=True)
    assert {(p.subject, p.kind) for p in error.problems} == {
        ("e0.bias", "shape"),
        ("odd", "unexpected"),
    }


def with_pinned() -> tuple[FakeModule, RefitPlan]:
    """A module whose slot ``mask`` is pinned to [1, 2] and holds [9, 9]."""
    module = FakeModule([OpenEngine("e0", {"w": torch.zeros(2), "mask": torch.full((2,), 9.0)})])
    slots = module.engines["e0"].slots
    rows = [recipe_row(slots["w"]), pinned_row(slots["mask"], "mask")]
    return module, make_plan(rows, pinned={"mask": torch.tensor([1.0, 2.0])})


def test_a_full_refit_writes_pinned_values() -> None:
    module, plan = with_pinned()
    refit(module, {"w": torch.ones(2)}, plan=plan)
    assert module.holds()["e0/mask"].tolist() == [1.0, 2.0]


def test_a_source_overrides_a_pinned_value() -> None:
    module, plan = with_pinned()
    refit(module, {"w": torch.ones(2), "mask": torch.tensor([3.0, 4.0])}, plan=plan)
    assert module.holds()["e0/mask"].tolist() == [3.0, 4.0]


def test_a_partial_refit_leaves_pinned_values_as_they_are() -> None:
    module, plan = with_pinned()
    refit(module, {"w": torch.ones(2)}, plan=plan, partial=True)
    assert module.holds()["e0/mask"].tolist() == [9.0, 9.0]
    refit(module, {"mask": torch.tensor([3.0, 4.0])}, plan=plan, partial=True)
    assert module.holds()["e0/mask"].tolist() == [3.0, 4.0]


def test_a_partial_refit_leaves_unmapped_slots_as_they_are() -> None:
    module = make_module(1)
    rows = list(plan_for(module).ledger)
    rows[1] = LedgerRow(slot=rows[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    weights = {"e0.weight": torch.ones(2, 3)}
    report = refit(module, weights, plan=make_plan(rows), partial=True).report
    assert {r.slot: r.reason for r in report.ledger}["e0.bias"].startswith("recipe: nobody knows")
    assert module.holds()["e0/e0.weight"].eq(1).all()


def test_frozen_slots_are_never_asked_for() -> None:
    module = FakeModule([OpenEngine("e0", {"w": torch.zeros(2)})])
    frozen = LedgerRow(slot=make_slot("eps", engine="e0"), state=SlotState.FROZEN, reason="literal")
    plan = make_plan([recipe_row(module.engines["e0"].slots["w"]), frozen])
    module.engines["e0"].slots["eps"] = frozen.slot

    def without_eps(values: Any) -> Any:
        assert [v.slot.name for v in values] == ["w"]
        return module.engines["e0"]._stage(values)

    module.engines["e0"].stage = without_eps  # type: ignore[method-assign]
    report = refit(module, {"w": torch.ones(2)}, plan=plan).report
    assert report.slots_written == 1
    assert report.ledger[1].reason == "literal"


# -- hooks inside the transaction -------------------------------------------------------------


def test_a_hook_may_call_the_module_inside_the_transaction() -> None:
    import refitkit

    seen: list[Any] = []

    class Caller:
        name = "caller"

        @refitkit.hookimpl
        def refitkit_weights_changed(self, report: RefitReport) -> None:
            seen.append((report.outcome, compiled()["e0/e0.bias"].tolist()))

    made, module = pipeline_with(Caller()), make_module(1)
    compiled: CompiledModule = made.load(module)
    made.refit(compiled, weights_for(module, 7.0))
    assert seen == [("committed", [8.0, 8.0])]


def test_settings_reach_the_checks() -> None:
    module = make_module(1)
    new = {**weights_for(module, 1.0), "e0.bias": torch.tensor([float("nan"), 0.0])}
    with pytest.raises(WeightMismatchError) as info:  # judged where it is staged
        pipeline_with().refit(module, new)
    assert [(p.subject, p.kind) for p in info.value.problems] == [("e0.bias", "non-finite")]
    assert [one.did for one in module.staged()] == [["discard"]]
    made = Pipeline(Config(check_finite=False), plugins=[FakePlugin()])
    assert made.refit(module, new).report.outcome == "committed"


def test_the_plan_inside_a_module_is_used() -> None:
    module = make_module(1)
    assert PLAN_MEMBER in module.attachments
    compiled = pipeline_with().load(module)
    assert compiled.plan is not None
    assert len(compiled.plan.ledger) == 2


def test_a_partial_refit_leaves_out_no_given_weight_without_a_word() -> None:
    """A weight that reaches no written slot may belong to one of which nobody knows."""
    module = make_module(1)
    rows = list(plan_for(module).ledger)
    leaves = plan_for(module).data.leaves
    rows[1] = LedgerRow(slot=rows[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    weights = {"e0.weight": torch.ones(2, 3), "e0.bias": torch.ones(2)}
    before = module.holds()
    with pytest.raises(UnmappedSlotError) as info:
        refit(module, weights, plan=make_plan(rows, leaves=leaves), partial=True)
    assert {(p.subject, p.kind) for p in info.value.problems} == {
        ("e0.bias", "no written slot follows from it"),
        ("e0/e0.bias", "may follow from it"),
    }
    assert same_state(module.holds(), before)


def test_both_names_of_a_tied_weight_reach_its_slot() -> None:
    module = make_module(1)
    rows = list(plan_for(module).ledger)
    weight = rows[0].slot
    rows[0] = recipe_row(weight, "e0.weight", "e0.twin")
    rows[1] = LedgerRow(slot=rows[1].slot, state=SlotState.UNMAPPED, reason="nobody knows")
    leaves = [*plan_for(module).data.leaves, leaf_for(weight, fqn="e0.twin")]
    plan = make_plan(rows, leaves=leaves, ties=[("e0.weight", "e0.twin")])
    weights = dict.fromkeys(("e0.weight", "e0.twin"), torch.ones(2, 3))
    refit(module, weights, plan=plan, partial=True)
    assert module.by_slot()["e0.weight"].equal(torch.ones(2, 3))


# -- partial refits of computed slots ---------------------------------------------------------


def folded() -> tuple[FakeModule, RefitPlan]:
    """A slot that is a product of two weights, one that is a weight, and one of a kept value."""
    module = FakeModule([OpenEngine("e0", {n: torch.zeros(2) for n in ("scale", "w", "mask")})])
    scale, w, mask = module.engines["e0"].slots.values()
    leaves = [leaf_for(scale, fqn=name) for name in ("bn.weight", "bn.var", "w")]
    leaves.append(leaf_for(mask, LeafKind.NON_PERSISTENT_BUFFER))
    return module, make_plan(
        [
            call_row(scale, 0, "bn.weight", "bn.var"),
            recipe_row(w),
            call_row(mask, 1, "mask"),
        ],
        leaves=leaves,
        calls=[op_call("mul.Tensor", "@bn.weight", "@bn.var"), op_call("neg.default", "@mask")],
        pinned={"mask": torch.ones(2)},
    )


def test_a_computed_slot_is_refitted_in_full() -> None:
    module, plan = folded()
    two = torch.full((2,), 2.0)
    refit(module, {"bn.weight": two, "bn.var": two * 2, "w": two}, plan=plan)
    live = module.engines["e0"].live
    assert [live[name].tolist()[0] for name in ("scale", "w", "mask")] == [8.0, 2.0, -1.0]


def test_a_computed_slot_of_which_some_weights_are_given_is_not_left_behind() -> None:
    module, plan = folded()
    before = module.holds()
    with pytest.raises(UnmappedSlotError) as info:
        refit(module, {"bn.weight": torch.ones(2), "w": torch.ones(2)}, plan=plan, partial=True)
    (found,) = info.value.problems
    assert found.subject == "e0/scale"
    assert (found.found, found.wanted) == ("bn.weight", "bn.var with it")
    assert "Pass these weights too" in info.value.hint
    assert same_state(module.holds(), before)


def test_a_computed_slot_with_all_its_weights_is_refitted_in_part() -> None:
    module, plan = folded()
    given = {"bn.weight": torch.ones(2), "bn.var": torch.ones(2)}
    report = refit(module, given, plan=plan, partial=True).report
    assert [row.strategy for row in report.ledger] == ["recipe", "", ""]
    assert report.slots_written == 1
    report = refit(module, {"mask": torch.ones(2)}, plan=plan, partial=True).report
    assert [row.strategy for row in report.ledger] == ["", "", "recipe"]


def mixed() -> tuple[FakeModule, RefitPlan]:
    """A slot that is the product of a weight and a kept value, and one that is another weight."""
    module = FakeModule([OpenEngine("e0", {n: torch.zeros(2) for n in ("scale", "w")})])
    scale, w = module.engines["e0"].slots.values()
    leaves = [leaf_for(scale, fqn="g"), leaf_for(w)]
    leaves.append(leaf_for(scale, LeafKind.NON_PERSISTENT_BUFFER, "eps"))
    return module, make_plan(
        [call_row(scale, 0, "g", "eps"), recipe_row(w)],
        leaves=leaves,
        calls=[op_call("mul.Tensor", "@g", "@eps")],
        pinned={"eps": torch.ones(2)},
    )


def test_a_kept_value_that_was_given_another_value_has_to_be_given_in_part_too() -> None:
    module, plan = mixed()
    made = pipeline_with()
    compiled = made.load(module)
    full, five = {n: torch.ones(2) for n in ("g", "w")}, torch.full((2,), 5.0)
    part = {"g": torch.full((2,), 3.0)}

    def scale(weights: Any, target: Any = compiled, **how: Any) -> Any:
        found = made.refit(target, weights, plan=plan, **how).module
        return found.read("scale").tolist()[0]

    assert scale({**full, "eps": torch.ones(2)}) == 1.0  # as the plan has it
    assert scale(part, partial=True) == 3.0
    assert scale({**full, "eps": five}) == 5.0
    with pytest.raises(UnmappedSlotError) as info:
        scale(part, partial=True)
    (found,) = info.value.problems
    assert (found.subject, found.found, found.wanted) == ("e0/scale", "g", "eps with it")
    with pytest.raises(UnmappedSlotError):
        scale(part, partial=True, copy=True)
    assert scale({"w": torch.zeros(2)}, partial=True) == 5.0
    with pytest.raises(UnmappedSlotError):
        scale(part, partial=True)
    assert scale({**part, "eps": five}, partial=True) == 15.0
    with pytest.raises(UnmappedSlotError):
        scale(part, partial=True)
    assert scale({**part, "eps": torch.ones(2)}, partial=True) == 3.0
    assert scale({"g": five}, partial=True) == 5.0
    with pytest.raises(VerificationError):
        scale({**full, "eps": five}, inputs=(), reference={}, verify="outputs")
    assert scale(part, partial=True) == 3.0
    assert scale({**full, "eps": five}) == 5.0
    assert scale(full) == 1.0
    assert scale(part, partial=True) == 3.0


def test_a_refit_in_part_with_a_broken_guard_leaves_nothing_behind() -> None:
    module, plan = folded()
    guard = guard_of(SourceRef(fqn="w"), torch.zeros(2), "bool() of w")
    guarded = make_plan(
        plan.ledger,
        leaves=plan.data.leaves,
        calls=plan.data.calls,
        guards=[guard],
        pinned={"mask": torch.ones(2)},
    )
    assert refit(module, {"w": torch.zeros(2)}, plan=guarded, partial=True).report.slots_written
    with pytest.raises(UnmappedSlotError) as info:
        refit(module, {"w": torch.ones(2)}, plan=guarded, partial=True)
    assert [(p.subject, p.kind) for p in info.value.problems] == [
        ("w", "guard"),
        ("e0/w", "recipe"),
    ]
    with pytest.raises(UnmappedSlotError) as info:
        refit(
            module, {n: torch.ones(2) for n in ("bn.weight", "bn.var")}, plan=guarded, partial=True
        )
    assert info.value.problems[0].hint == "the source has no 'w'"
