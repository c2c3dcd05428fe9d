"""Ctrl-C at every line between the first stage and the last: never a mixture of weights.

Where an interrupt comes after the verdict, the new weights stay although the refit raises: then
the version says so.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from refitkit import pipeline
from refitkit.errors import ModuleLostError, RefitError
from tests.fakes import same_state, weights_for
from tests.interrupting import in_new_thread
from tests.unit.pipeline.test_transaction import Scene

if TYPE_CHECKING:
    from types import FrameType

FILES = {
    str(Path(pipeline.__path__[0]) / name)
    for name in (
        "refit.py",
        "restore.py",
        "stage.py",
        "transaction.py",
        "history.py",
    )
}


class Interrupter:
    """Counts the lines that the files above run, and raises at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def refit_interrupted(scene: Scene, at: int | None) -> Interrupter:
    return in_new_thread(lambda: _refit_interrupted(scene, at))


def _refit_interrupted(scene: Scene, at: int | None) -> Interrupter:
    interrupter, tracer = Interrupter(at), sys.gettrace()
    sys.settrace(interrupter)
    try:
        with suppress(KeyboardInterrupt, RefitError):  # what holds afterwards is the point
            scene.refit()
    finally:
        sys.settrace(tracer)
    return interrupter


@pytest.mark.parametrize("verdict", [True, False], ids=["good", "bad"])
def test_an_interrupt_at_any_line(verdict: bool, subtests: pytest.Subtests) -> None:
    lines = refit_interrupted(Scene.of(2, verdict=verdict), None).lines
    assert lines > 100
    for at in range(lines):
        scene = Scene.of(2, verdict=verdict)
        old = scene.module.holds()
        new = {f"{k[:2]}/{k}": v for k, v in weights_for(scene.module, 100.0).items()}
        where = refit_interrupted(scene, at).where
        with subtests.test(where=where, at=at):
            assert where
            scene.wire.arm()
            if scene.compiled.gate.lost:
                assert not verdict  # the interrupt is the second thing that goes wrong
                with pytest.raises(ModuleLostError):
                    scene.answer_elsewhere()
                continue
            version = scene.compiled.version
            assert version <= verdict
            assert same_state(scene.answer_elsewhere(), new if version else old)
            scene.plugin.verdict = True
            scene.refit()
            assert same_state(scene.answer_elsewhere(), new)


def test_an_interrupt_before_the_commit_loses_nothing() -> None:
    """Refusing to answer is for what is not known: not for what was never touched."""
    lines = refit_interrupted(Scene.of(1), None).lines
    for at in range(lines):
        scene = Scene.of(1)
        refit_interrupted(scene, at)
        if "e0.commit" not in scene.wire.calls:
            assert not scene.compiled.gate.lost
