"""Whatever fails, wherever: all old weights, or a module that refuses to answer.

The places where something can fail are not listed here: a dry run counts every call of an engine,
a hook, a strategy, a verifier and a source, and then each of them fails in turn.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.errors import (
    EngineError,
    ModuleLostError,
    PluginError,
    RefitError,
    VerificationError,
)
from tests.fakes import (
    END,
    FakeModule,
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
    from pathlib import Path

    from refitkit.pipeline import CompiledModule, Pipeline

PATIENCE = 30.0  # seconds until a call that waits for ever is called a failure


@dataclass
class Scene:
    """A module, ready to be refitted by a pipeline that fails when told to."""

    wire: Tripwire
    module: FakeModule
    plugin: TrippingPlugin
    pipeline: Pipeline
    compiled: CompiledModule

    @classmethod
    def of(cls, engines: int, *, verdict: bool = True) -> Scene:
        wire = Tripwire()
        module = make_module(engines, wire=wire)
        plugin = TrippingPlugin(wire, verdict=verdict)
        pipeline = pipeline_with(plugin, keep_base=True)
        return cls(wire, module, plugin, pipeline, pipeline.load(module))

    def refit(self, faults: Mapping[int, BaseException] | None = None) -> Any:
        self.wire.arm(faults)
        weights = Tripping(weights_for(self.module, 100.0))
        return self.pipeline.refit(self.compiled, weights, verify="tripping-verifier")

    def answer_elsewhere(self) -> Any:
        """What the module answers in another thread; an error that it raises there, here."""
        answers: list[Any] = []

        def call() -> None:
            try:
                answers.append(self.compiled())
            except BaseException as exc:  # noqa: BLE001 - handed over
                answers.append(exc)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert answers, "the call waits for ever"
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]


def calls_of(engines: int, *, verdict: bool, faults: Mapping[int, BaseException]) -> list[str]:
    """Labels of everything that a refit with these faults calls."""
    scene = Scene.of(engines, verdict=verdict)
    try:
        scene.refit(faults)
    except BaseException:  # noqa: BLE001 - only what was called matters
        assert faults or not verdict
    return scene.wire.calls


def fault_points() -> Iterator[Any]:
    for engines in (1, 3):
        for verdict in (True, False):
            for number, label in enumerate(calls_of(engines, verdict=verdict, faults={})):
                name = f"{engines}-{'good' if verdict else 'bad'}-{number}-{label}"
                yield pytest.param(engines, verdict, number, id=name.replace(" ", "-"))


def is_way_back(label: str) -> bool:
    """Whether a failure here means that nobody knows which weights the module answers with."""
    return ".rollback" in label or label == "refitkit_weights_changed rolled-back"


def is_unheard(label: str, error: object) -> bool:
    """Whether a failure here is nobody's business: a listener fails."""
    return label.startswith("refitkit_event") and error is not KeyboardInterrupt


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from."""
    return [error, *causes(error.__cause__)] if error is not None else []


def assert_lost(scene: Scene, raised: BaseException, tmp_path: Path) -> None:
    assert isinstance(raised, ModuleLostError)
    scene.wire.arm()
    with pytest.raises(ModuleLostError):
        scene.compiled()
    with pytest.raises(ModuleLostError):
        scene.answer_elsewhere()
    with pytest.raises(ModuleLostError):
        scene.refit()
    with pytest.raises(ModuleLostError):
        scene.pipeline.refit(scene.compiled, {}, copy=True)
    with pytest.raises(ModuleLostError):
        scene.compiled.save(tmp_path / "lost")
    with pytest.raises(ModuleLostError):
        scene.compiled.read("e0.weight")
    assert not (tmp_path / "lost").exists()


def assert_as_before(scene: Scene, before: Mapping[str, Any]) -> None:
    """All old bits, nothing left staged, version unchanged, and open for calls and refits."""
    assert same_state(scene.module.holds(), before)
    assert scene.compiled.version == 0
    for staged in scene.module.staged():
        # a rollback that was interrupted is called again
        assert staged.did in (["discard"], ["commit", *["rollback"] * staged.did.count("rollback")])
        assert staged.did.count("rollback") <= 2
    scene.wire.arm()
    assert same_state(scene.answer_elsewhere(), before)
    scene.plugin.verdict = True
    scene.refit()
    new = weights_for(scene.module, 100.0)
    assert same_state(scene.answer_elsewhere(), {f"{k[:2]}/{k}": v for k, v in new.items()})
    assert scene.compiled.version == 1


def assert_right_error(label: str, raised: BaseException, error: BaseException) -> None:
    """The error is typed, names who failed, and leads back to what was raised."""
    if not isinstance(error, Exception):
        assert raised is error
        return
    assert isinstance(raised, RefitError)
    assert str(error) in str(raised)
    owner, _, method = label.partition(".")
    if label.startswith("refitkit_"):
        assert isinstance(raised, PluginError)
        assert "'tripping'" in str(raised)
        assert label.partition(" ")[0] in str(raised)
    elif owner in {"strategy", "verifier"}:
        assert isinstance(raised, PluginError)
        assert f"tripping-{owner}" in str(raised)
    elif label == "synchronize" or method.startswith(("stage", "changed", "commit")):
        assert isinstance(raised, EngineError)
        assert raised.__cause__ is error
        assert label == "synchronize" or owner in str(raised)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("engines", "verdict", "number"), list(fault_points()))
def test_a_fault_anywhere(
    engines: int, verdict: bool, number: int, kind: type[BaseException], tmp_path: Path
) -> None:
    scene = Scene.of(engines, verdict=verdict)
    before, error = scene.module.holds(), kind("on purpose")
    raised: BaseException | None = None
    try:
        scene.refit({number: error})
    except BaseException as exc:  # noqa: BLE001 - judged below
        raised = exc
    label = scene.wire.calls[number]
    if is_unheard(label, kind):
        assert scene.wire.calls == calls_of(engines, verdict=verdict, faults={})
        assert type(raised) is (type(None) if verdict else VerificationError)
        assert scene.compiled.version == verdict
        return
    assert raised is not None
    if label == END and verdict:
        assert raised is error
        assert raised.__notes__ == ["The refit was complete when it was interrupted."]
        assert scene.compiled.version == 1
        return
    assert error in causes(raised) or label.endswith("discard")
    if is_way_back(label) and isinstance(error, Exception):
        assert_lost(scene, raised, tmp_path)
        return
    assert not scene.compiled.gate.lost
    if label.endswith("discard") and isinstance(error, Exception):
        assert isinstance(raised, VerificationError)  # nobody needs what was to be discarded
    elif is_way_back(label):
        assert raised is error
        assert isinstance(raised.__cause__, VerificationError)  # why it was on its way back
    else:
        assert_right_error(label, raised, error)
    assert_as_before(scene, before)


@pytest.mark.parametrize("second", [RuntimeError, KeyboardInterrupt])
def test_a_second_fault_on_the_way_back(
    second: type[BaseException], subtests: pytest.Subtests, tmp_path: Path
) -> None:
    """After a first fault from the commit on, whatever happens next fails too."""
    first = RuntimeError("the first")
    labels = calls_of(3, verdict=True, faults={})
    for number in range(labels.index("synchronize"), labels.index("verifier.judge") + 1):
        if is_unheard(labels[number], RuntimeError):
            continue
        after = calls_of(3, verdict=True, faults={number: first})
        for again in range(number + 1, len(after)):
            with subtests.test(first=labels[number], second=after[again]):
                scene = Scene.of(3)
                before = scene.module.holds()
                with pytest.raises(BaseException) as info:  # noqa: PT011 - judged below
                    scene.refit({number: first, again: second("the second")})
                if is_way_back(after[again]) and second is RuntimeError:
                    assert_lost(scene, info.value, tmp_path)
                else:
                    assert_as_before(scene, before)


@pytest.mark.parametrize("interrupts", [1, 2, 3])
def test_a_way_back_that_is_interrupted_again_and_again(interrupts: int, tmp_path: Path) -> None:
    scene = Scene.of(2, verdict=False)
    before = scene.module.holds()
    first = calls_of(2, verdict=False, faults={}).index("e1.rollback")
    errors = [KeyboardInterrupt(str(number)) for number in range(interrupts)]
    faults = {first + number: error for number, error in enumerate(errors)}
    with pytest.raises((KeyboardInterrupt, ModuleLostError)) as info:
        scene.refit(faults)
    if interrupts == 3:
        assert_lost(scene, info.value, tmp_path)
        return
    assert info.value is errors[-1]
    assert not scene.compiled.gate.lost
    assert same_state(scene.answer_elsewhere(), before)


def test_the_error_of_a_lost_module_tells_both_reasons() -> None:
    scene = Scene.of(1, verdict=False)
    calls = calls_of(1, verdict=False, faults={})
    error = RuntimeError("cannot go back")
    with pytest.raises(ModuleLostError, match="cannot go back") as info:
        scene.refit({calls.index("e0.rollback"): error})
    assert info.value.__cause__ is error
    assert any("VerificationError" in note for note in info.value.__notes__)
    assert info.value.hint
    with pytest.raises(ModuleLostError, match="cannot go back") as later:
        scene.compiled()
    assert later.value.__cause__ is error


def test_all_engines_are_tried_where_one_rollback_fails() -> None:
    scene = Scene.of(3, verdict=False)
    calls = calls_of(3, verdict=False, faults={})
    with pytest.raises(ModuleLostError):
        scene.refit({calls.index("e1.rollback"): RuntimeError("no way back")})
    assert [one.did for one in scene.module.staged()] == [["commit", "rollback"]] * 3


def test_engines_go_back_in_the_reverse_order_of_their_commits() -> None:
    calls = calls_of(3, verdict=False, faults={})
    assert [c for c in calls if c.endswith(".commit")] == ["e0.commit", "e1.commit", "e2.commit"]
    back = [c for c in calls if c.endswith(".rollback")]
    assert back == ["e2.rollback", "e1.rollback", "e0.rollback"]


def test_a_bad_verdict_brings_a_report() -> None:
    scene = Scene.of(3, verdict=False)
    with pytest.raises(VerificationError) as info:
        scene.refit()
    report = info.value.report
    assert (report.outcome, report.version) == ("rolled-back", 0)
    assert report.verification.verifier == "tripping-verifier"
    assert not report.verification.ok
    assert info.value.problems
    assert scene.plugin.reports[-1].outcome == "rolled-back"


def test_a_good_verdict_commits_everything_once() -> None:
    scene = Scene.of(3)
    result = scene.refit()
    assert [one.did for one in scene.module.staged()] == [["commit"]] * 3
    assert (result.report.outcome, result.report.version) == ("committed", 1)
    assert [r.outcome for r in scene.plugin.reports] == ["committed"]
    assert scene.plugin.reports[0].version == 1  # number of the weights that are live now
    new = weights_for(scene.module, 100.0)
    assert same_state(scene.compiled(), {f"{k[:2]}/{k}": v for k, v in new.items()})


def test_pending_work_is_drained_before_the_first_commit() -> None:
    calls = calls_of(3, verdict=True, faults={})
    assert calls.index("synchronize") < calls.index("e0.commit")
    assert calls.index("e2.stage") < calls.index("synchronize")


def test_hooks_hear_of_new_weights_before_the_verdict() -> None:
    calls = calls_of(1, verdict=True, faults={})
    committed = calls.index("refitkit_weights_changed committed")
    assert calls.index("e0.commit") < committed < calls.index("verifier.judge")


def test_hooks_hear_of_old_weights_after_all_engines_went_back() -> None:
    calls = calls_of(3, verdict=False, faults={})
    last = max(n for n, c in enumerate(calls) if c.endswith(".rollback-end"))
    assert last < calls.index("refitkit_weights_changed rolled-back")


def test_nothing_is_told_where_nothing_was_committed() -> None:
    scene = Scene.of(1)
    calls = calls_of(1, verdict=True, faults={})
    with pytest.raises(RefitError):
        scene.refit({calls.index("synchronize"): RuntimeError("stuck")})
    assert scene.plugin.reports == []
