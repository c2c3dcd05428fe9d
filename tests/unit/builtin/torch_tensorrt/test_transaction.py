"""Whatever TensorRT does, at whichever call: all old weights, or a module that is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refitkit.errors import ModuleLostError, RefitError, VerificationError
from tests.fakes import same_state
from tests.unit.builtin.torch_tensorrt.fake_trt import Refusal
from tests.unit.builtin.torch_tensorrt.scenes import Scene, expected

if TYPE_CHECKING:
    from collections.abc import Mapping

RUNTIMES = [("python", "python"), ("direct", "direct"), ("cpp", "cpp"), ("python", "cpp")]
PREPARED = ["fresh", "refitted", "adopted", "spoilt"]
NEW = 2
KINDS = (RuntimeError, KeyboardInterrupt, Refusal)


def calls_of(
    runtimes: tuple[str, str],
    prepared: str,
    *,
    verdict: bool = True,
    faults: Mapping[int, BaseException] | None = None,
) -> list[str]:
    """Labels of all calls of TensorRT in a refit with these faults."""
    scene = Scene(runtimes, prepared, verdict=verdict)
    try:
        scene.refit(NEW, faults)
    except BaseException:  # noqa: BLE001 - only what was called matters
        assert faults or not verdict
    return scene.wire.calls


def attempt(scene: Scene, faults: Mapping[int, BaseException]) -> BaseException | None:
    try:
        scene.refit(NEW, faults)
    except BaseException as exc:  # noqa: BLE001 - judged by the caller
        return exc
    return None


def assert_lost(scene: Scene, raised: BaseException | None) -> None:
    assert isinstance(raised, ModuleLostError)
    scene.wire.arm()
    with pytest.raises(ModuleLostError):
        scene.compiled()
    with pytest.raises(ModuleLostError):
        scene.refit(NEW)


def assert_whole(scene: Scene, raised: BaseException | None) -> None:
    """Everything holds the weights from before the refit, or those of it: live, called, stored."""
    seed = scene.seed
    assert seed == NEW if raised is None else seed != NEW
    scene.wire.arm()
    assert same_state(scene.module.holds(), expected(seed))
    assert same_state(scene.compiled(), expected(seed))
    stored = scene.module.stored()
    assert same_state(stored, {k: v for k, v in expected(seed).items() if k in stored})
    scene.plugin.verdict = True
    scene.refit(3)  # and it goes on
    assert same_state(scene.compiled(), expected(3))


def assert_never_mixed(scene: Scene, raised: BaseException | None) -> None:
    if scene.compiled.gate.lost:
        assert_lost(scene, raised)
    else:
        assert_whole(scene, raised)


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_a_fault_at_any_call_of_a_good_refit(
    runtimes: tuple[str, str], prepared: str, subtests: pytest.Subtests
) -> None:
    for number, label in enumerate(calls_of(runtimes, prepared)):
        for kind in KINDS:
            with subtests.test(number=number, label=label, kind=kind.__name__):
                scene = Scene(runtimes, prepared)
                raised = attempt(scene, {number: kind("on purpose")})
                if raised is None:  # while it was learned what can be written: the refitter can
                    assert "direct" in runtimes
                else:
                    assert isinstance(raised, RefitError | KeyboardInterrupt)
                assert not scene.compiled.gate.lost
                assert_whole(scene, raised)


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_a_fault_at_any_call_of_a_refit_that_is_taken_back(
    runtimes: tuple[str, str], prepared: str, subtests: pytest.Subtests
) -> None:
    good = len(calls_of(runtimes, prepared))
    labels = calls_of(runtimes, prepared, verdict=False)
    for number in range(good, len(labels)):
        for kind in KINDS:
            with subtests.test(number=number, label=labels[number], kind=kind.__name__):
                scene = Scene(runtimes, prepared, verdict=False)
                raised = attempt(scene, {number: kind("on purpose")})
                if kind is KeyboardInterrupt:  # the way back starts again
                    assert_whole(scene, raised)
                else:
                    assert_lost(scene, raised)


@pytest.mark.parametrize(
    ("runtimes", "prepared"),
    [
        (("direct", "direct"), "refitted"),
        *((runtimes, prepared) for runtimes in RUNTIMES[2:] for prepared in ("fresh", "refitted")),
    ],
)
def test_two_faults(runtimes: tuple[str, str], prepared: str, subtests: pytest.Subtests) -> None:
    """After a first fault, whatever is called next fails, too."""
    lost = 0
    for first, label in enumerate(calls_of(runtimes, prepared)):
        faults: dict[int, BaseException] = {first: Refusal("the first")}
        after = calls_of(runtimes, prepared, faults=faults)
        for second in range(first + 1, len(after)):
            with subtests.test(first=label, second=after[second]):
                scene = Scene(runtimes, prepared)
                raised = attempt(scene, {**faults, second: RuntimeError("the second")})
                assert_never_mixed(scene, raised)
                lost += scene.compiled.gate.lost
    assert lost  # there are such pairs: else this tests nothing


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_a_bad_verdict_brings_old_weights_back(runtimes: tuple[str, str], prepared: str) -> None:
    scene = Scene(runtimes, prepared, verdict=False)
    raised = attempt(scene, {})
    assert isinstance(raised, VerificationError)
    assert_whole(scene, raised)


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_any_number_of_refits(runtimes: tuple[str, str], prepared: str) -> None:
    scene = Scene(runtimes, prepared)
    for seed in (2, 3, 3, 4, 2, 5):
        scene.refit(seed)
        assert same_state(scene.compiled(), expected(seed))
        if seed == 4:
            stored = scene.module.stored()
            assert same_state(stored, {k: v for k, v in expected(4).items() if k in stored})


@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_a_commit_that_fails_on_the_device_loses_the_module(
    runtimes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(runtimes, "refitted")
    monkeypatch.setattr(scene.module, "settle", lambda: 1 / 0)
    assert_lost(scene, attempt(scene, {}))


@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_an_interrupt_after_the_commit_says_what_is_live(
    runtimes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(runtimes, "refitted")
    left = [KeyboardInterrupt(), None, None, None]

    def settle() -> None:
        # the first time is before anything is staged
        found = left.pop(0) if scene.compiled.version == 2 else None
        if found is not None:
            raise found

    monkeypatch.setattr(scene.module, "settle", settle)
    raised = attempt(scene, {})
    assert isinstance(raised, KeyboardInterrupt)
    assert "the new weights are live" in raised.__notes__[0]
    assert scene.compiled.version == 2
    scene.seed = NEW
    assert_whole(scene, None)


@pytest.mark.parametrize("runtimes", RUNTIMES)
def test_warming(runtimes: tuple[str, str], subtests: pytest.Subtests) -> None:
    """A fault at any call leaves all as it was; one on its way back, too, loses the module."""
    scene = Scene(runtimes, "adopted")
    scene.wire.arm()
    scene.compiled.warm()
    assert same_state(scene.compiled(), expected(0))
    calls = scene.wire.calls
    for number, label in enumerate(calls):
        for kind in KINDS:
            with subtests.test(number=number, label=label, kind=kind.__name__):
                scene = Scene(runtimes, "adopted")
                scene.wire.arm({number: kind("on purpose")})
                try:
                    scene.compiled.warm()
                except (RefitError, KeyboardInterrupt):
                    pass
                else:  # while it was learned what can be written: the refitter can
                    assert "direct" in runtimes
                assert_whole(scene, KeyboardInterrupt())


def test_warming_that_loses_the_module() -> None:
    def warm(faults: Mapping[int, BaseException]) -> tuple[Scene, BaseException | None]:
        scene = Scene(("python", "python"), "adopted")
        scene.wire.arm(faults)
        try:
            scene.compiled.warm()
        except RefitError as exc:
            return scene, exc
        return scene, None

    first = warm({})[0].wire.calls.index("refit")
    again = warm({first: Refusal()})[0].wire.calls.index("refit", first + 1)
    scene, raised = warm({first: Refusal(), again: Refusal()})
    assert_lost(scene, raised)
