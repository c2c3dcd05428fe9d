"""Several modules in one transaction: all of them hold their new weights, or none, or lost ones."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.errors import (
    ConfigError,
    ModuleLostError,
    NotRefittableError,
    RefitError,
    SourceError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.pipeline import CompiledModule, Pipeline
from tests.fakes import (
    END,
    FakeEngine,
    FakeModule,
    FakePlugin,
    Tripping,
    TrippingPlugin,
    Tripwire,
    make_module,
    pipeline_with,
    same_state,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PATIENCE = 30.0


@dataclass
class Scene:
    """Three modules of two engines, one pipeline, one wire."""

    wire: Tripwire
    modules: list[FakeModule]
    compiled: list[CompiledModule]
    plugin: TrippingPlugin
    pipeline: Pipeline

    @classmethod
    def of(cls, *, verdict: bool = True, **settings: Any) -> Scene:
        wire = Tripwire()
        modules = [make_module(2, wire=wire) for _ in range(3)]
        plugin = TrippingPlugin(wire, verdict=verdict)
        pipeline = pipeline_with(plugin, **settings)
        return cls(wire, modules, [pipeline.load(m) for m in modules], plugin, pipeline)

    def new(self, number: int) -> dict[str, torch.Tensor]:
        return weights_for(self.modules[number], 100.0 * (number + 1))

    def refit(self, faults: Mapping[int, BaseException] | None = None) -> Any:
        self.wire.arm(faults)
        jobs = [(one, Tripping(self.new(number))) for number, one in enumerate(self.compiled)]
        return self.pipeline.refit_all(jobs, verify="tripping-verifier")

    def holds(self) -> list[dict[str, torch.Tensor]]:
        return [module.holds() for module in self.modules]

    def all_new(self) -> list[dict[str, torch.Tensor]]:
        return [
            {f"{name[:2]}/{name}": value for name, value in self.new(number).items()}
            for number in range(3)
        ]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(same_state(one, other) for one, other in zip(a, b, strict=True))


def test_all_are_refitted_and_told_one_by_one() -> None:
    scene = Scene.of()
    results = scene.refit()
    assert isinstance(results, refitkit.RefitResults)
    assert [r.module for r in results] == scene.compiled
    assert [r.report.version for r in results] == [1, 1, 1]
    assert same(scene.holds(), scene.all_new())
    assert [report.outcome for report in scene.plugin.reports] == ["committed"] * 3


def test_each_is_committed_before_any_is_judged() -> None:
    scene = Scene.of()
    scene.refit()
    calls = scene.wire.calls
    last = max(n for n, label in enumerate(calls) if label.endswith(".commit"))
    assert last < calls.index("verifier.judge")
    assert max(n for n, c in enumerate(calls) if "stage-end" in c) < calls.index("synchronize")


def fault_points() -> Iterator[Any]:
    for verdict in (True, False):
        scene = Scene.of(verdict=verdict)
        try:
            scene.refit()
        except VerificationError:
            assert not verdict
        for number, label in enumerate(scene.wire.calls):
            name = f"{'good' if verdict else 'bad'}-{number}-{label}"
            yield pytest.param(verdict, number, id=name.replace(" ", "-"))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("verdict", "number"), list(fault_points()))
def test_a_fault_anywhere(verdict: bool, number: int, kind: type[BaseException]) -> None:
    scene = Scene.of(verdict=verdict)
    before = scene.holds()
    raised: BaseException | None = None
    try:
        scene.refit({number: kind("on purpose")})
    except (RefitError, KeyboardInterrupt) as exc:
        raised = exc
    label = scene.wire.calls[number]
    if label.startswith("refitkit_event") and kind is RuntimeError and verdict:
        assert raised is None  # a listener is nobody's business
        assert same(scene.holds(), scene.all_new())
        return
    assert raised is not None
    if label == END and verdict:
        assert raised.__notes__ == ["The refit was complete when it was interrupted."]
        assert same(scene.holds(), scene.all_new())
        return
    lost = [one.gate.lost for one in scene.compiled]
    way_back = ".rollback" in label or label == "refitkit_weights_changed rolled-back"
    if way_back and kind is RuntimeError:
        assert sum(lost) == 1
        assert isinstance(raised, ModuleLostError)
    else:
        assert not any(lost)
    scene.wire.arm()
    for one, module, old, gone in zip(scene.compiled, scene.modules, before, lost, strict=True):
        assert one.version == 0
        if gone:
            with pytest.raises(ModuleLostError):
                one()
        else:
            assert same_state(module.holds(), old)
            assert same_state(one(), old)
    if not any(lost):
        scene.plugin.verdict = True
        scene.refit()
        assert same(scene.holds(), scene.all_new())


def test_problems_of_all_are_told_at_once_and_nothing_is_staged() -> None:
    scene = Scene.of()
    before = scene.holds()
    wrong, missing = scene.new(0), scene.new(2)
    wrong["e0.weight"] = torch.zeros(5)
    del missing["e1.bias"]
    jobs = [
        (scene.compiled[0], wrong),
        (scene.compiled[1], scene.new(1)),
        (scene.compiled[2], missing),
    ]
    with pytest.raises(WeightMismatchError) as info:
        scene.pipeline.refit_all(jobs)
    told = [(p.subject, p.kind) for p in info.value.problems]
    assert told == [
        ("module 1 (fake): e0.weight", "shape"),
        ("module 3 (fake): e1.bias", "missing"),
    ]
    assert "2 of 3 modules" in str(info.value)
    assert same(scene.holds(), before)
    assert not any(engine.staged for module in scene.modules for engine in module.engines.values())


def test_errors_of_several_kinds_are_one_error() -> None:
    scene = Scene.of()
    wrong = {**scene.new(0), "e0.weight": torch.zeros(5)}
    jobs = [(scene.compiled[0], wrong), (scene.compiled[1], "no/such/file.safetensors")]
    with pytest.raises(RefitError) as info:
        scene.pipeline.refit_all(jobs)
    assert type(info.value) is RefitError
    assert [p.subject for p in info.value.problems] == [
        "module 1 (fake): e0.weight",
        "module 2 (fake): SourceError",
    ]
    assert "no/such/file.safetensors" in str(info.value)


def test_the_last_of_three_that_cannot_be_staged() -> None:
    """Nothing of the others has changed, and what was staged is discarded."""
    scene = Scene.of()
    before = scene.holds()
    calls = _calls(scene)
    stages = [n for n, c in enumerate(calls) if c.endswith("e1.stage")]
    scene = Scene.of()
    with pytest.raises(RefitError, match=r"1 of 3 modules .* Module 3 .*on purpose"):
        scene.refit({stages[2]: RuntimeError("on purpose")})
    assert same(scene.holds(), before)
    dids = [one.did for module in scene.modules for one in module.staged()]
    assert dids == [["discard"]] * 5


def test_a_bad_verdict_on_the_last_takes_all_back() -> None:
    scene = Scene.of(verdict=False)
    before = scene.holds()
    with pytest.raises(VerificationError) as info:
        scene.refit()
    assert info.value.report.outcome == "rolled-back"
    assert same(scene.holds(), before)
    assert [one.version for one in scene.compiled] == [0, 0, 0]


def _calls(scene: Scene) -> list[str]:
    scene.refit()
    return scene.wire.calls


def test_options_for_all_and_for_one() -> None:
    scene = Scene.of()
    part = {"e0.weight": scene.new(1)["e0.weight"]}
    jobs = [
        (scene.compiled[0], scene.new(0)),
        (scene.compiled[1], part, {"partial": True, "verify": "none"}),
    ]
    first, second = scene.pipeline.refit_all(jobs, verify="weights", delta=True)
    assert first.report.verification is not None
    assert (second.report.verification, second.report.slots_written) == (None, 1)
    assert first.report.delta
    assert second.report.delta


def test_options_that_do_not_exist_and_no_pairs() -> None:
    scene = Scene.of()
    jobs: Any = [(scene.compiled[0], {}, {"copy": True}), scene.compiled[1]]
    with pytest.raises(ConfigError) as info:
        scene.pipeline.refit_all(jobs, weights=1)
    assert [(p.subject, p.kind) for p in info.value.problems] == [
        ("module 1", "no such option"),
        ("module 1", "no such option"),
        ("module 2", "not a pair"),
    ]


def test_a_module_is_given_once() -> None:
    scene = Scene.of()
    one = scene.compiled[0]
    with pytest.raises(ConfigError) as info:
        scene.pipeline.refit_all(
            [(one, scene.new(0)), (scene.compiled[1], {}), (one, scene.new(0))]
        )
    assert [p.subject for p in info.value.problems] == ["module 3 (fake)"]
    assert one.version == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_handle_and_what_it_was_loaded_from_are_one_module(order: tuple[int, int]) -> None:
    scene = Scene.of()
    module = scene.modules[0]
    other = scene.pipeline.load(module)
    before = scene.holds()
    for second in (module, other):
        both = (scene.compiled[0], second)
        jobs = [(both[number], scene.new(0)) for number in order]
        with pytest.raises(ConfigError, match="once") as info:
            scene.pipeline.refit_all(jobs)
        assert [p.kind for p in info.value.problems] == ["the same module"]
    assert all(map(same_state, scene.holds(), before))
    scene.pipeline.refit_all([(scene.compiled[0], scene.new(0)), (scene.modules[1], scene.new(1))])


def test_no_modules_are_no_refit() -> None:
    assert Scene.of().pipeline.refit_all([]) == ()


def test_undoing_all_is_one_transaction() -> None:
    scene = Scene.of()
    before = scene.holds()
    results = scene.refit()
    scene.wire.arm()
    undone = results.undo()
    assert same(scene.holds(), before)
    assert [result.report.version for result in undone] == [2, 2, 2]
    again = scene.refit()
    scene.compiled[1].free_spare()
    scene.compiled[1].forget()
    with pytest.raises(NotRefittableError, match="1 of 3 modules"):
        again.undo()
    assert same(scene.holds(), scene.all_new())


def test_a_lost_module_is_refused_with_the_others() -> None:
    scene = Scene.of()
    before = scene.holds()
    scene.compiled[1].gate.poison("on purpose")
    with pytest.raises(ModuleLostError):
        scene.refit()
    assert same(scene.holds(), before)


def test_two_refits_of_the_same_modules_in_other_orders_both_end() -> None:
    scene = Scene.of()
    jobs = [(one, scene.new(number)) for number, one in enumerate(scene.compiled)]
    threads = [
        threading.Thread(
            target=lambda some=some: [scene.pipeline.refit_all(some) for _ in range(20)],
            daemon=True,  # where two wait for one another, the test run goes on
        )
        for some in (jobs, jobs[::-1], [jobs[1], jobs[2], jobs[0]])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert [one.version for one in scene.compiled] == [60, 60, 60]


def test_calls_of_all_wait_until_all_are_judged() -> None:
    """A call that comes during the verdict on the first answers with new weights of all."""
    scene = Scene.of()
    answers: list[Any] = []
    threads: list[threading.Thread] = []

    def call() -> None:
        answers.append([one() for one in scene.compiled])

    def once() -> None:
        if not threads:
            thread = threading.Thread(target=call)
            threads.append(thread)
            thread.start()

    scene.modules[0].on_run = once
    scene.refit()
    threads[0].join(PATIENCE)
    assert same(answers[0], scene.all_new())


def test_engines_that_cannot_be_read_are_refitted_with_others() -> None:
    closed = FakeModule(
        [FakeEngine("e0", {"e0.weight": torch.zeros(2, 3), "e0.bias": torch.zeros(2)})]
    )
    closed.attachments = make_module(1).attachments
    pipeline = Pipeline(plugins=[FakePlugin()])
    modules = [pipeline.load(closed), pipeline.load(make_module(1))]
    jobs = [(one, weights_for(make_module(1), 3.0)) for one in modules]
    results = pipeline.refit_all(jobs)
    assert [result.report.verification is None for result in results] == [True, False]
    with pytest.raises(SourceError):
        pipeline.refit_all([(modules[0], "no/such/file.pt"), (modules[1], "no/such/file.pt")])


@pytest.mark.parametrize("where", ["synchronize", "commit", "verifier.judge", "rollback"])
def test_errors_name_the_module(where: str) -> None:
    """Of three modules of one kind, the second fails: before, at and after the commit, and back."""
    dry = Scene.of()
    dry.refit()
    calls, scene = dry.wire.calls, Scene.of()
    later = "commit" if where == "rollback" else where
    found = [
        number
        for number, label in enumerate(calls)
        if label.endswith(later) and not label.startswith("refitkit_event")
    ]
    number = found[len(found) // 3 * 2 - 1]
    faults = {number: RuntimeError("on purpose")}
    if where == "rollback":
        # the first thing that is taken back, after the event that the stage has failed
        faults[number + 2] = RuntimeError("again")
    with pytest.raises(RefitError) as info:
        scene.refit(faults)
    assert info.value.message.startswith("Module 2 (fake): ")
    assert isinstance(info.value, ModuleLostError) == (where == "rollback")
    assert [one.gate.lost for one in scene.compiled] == [False, where == "rollback", False]
