"""Calls through a library's C interface: side by side, failing, forked, interrupted."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import child_environment, max_error
from aoti_models import CASES
from parts import (
    AT,
    NAMES,
    SECONDS,
    Callers,
    Inside,
    State,
    alive,
    answer,
    answered,
    commit,
    commit_some,
    state,
    undo,
    values,
    weights,
)
from torch import nn

import refitkit
from refitkit.builtin.aotinductor import native
from refitkit.builtin.aotinductor.engine import SwappingEngine
from refitkit.builtin.aotinductor.native import SWITCH, Library
from refitkit.builtin.aotinductor.publishing import PublishingEngine
from tests.forking import forked
from tests.interrupting import Interrupt, Points, in_a_thread

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

    from refitkit.testing.oracles import Storage


# -- calls beside calls ---------------------------------------------------------------------------


def test_two_calls_are_inside_at_once(
    module: Any, engine: PublishingEngine, inside: type[Inside]
) -> None:
    engine.serve(2)
    first, second = inside(lambda: answer(module)), inside(lambda: answer(module))
    third = threading.Thread(target=answer, args=(module,), daemon=True)
    third.start()
    third.join(0.05)
    assert third.is_alive(), "there were only two turns"
    assert first.finish() == second.finish() == state(0)
    third.join(SECONDS)
    assert not third.is_alive()


def test_one_call_is_inside_at_first(module: Any, inside: type[Inside]) -> None:
    first = inside(lambda: answer(module))
    second = threading.Thread(target=answer, args=(module,), daemon=True)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    assert first.finish() == state(0)
    second.join(SECONDS)
    assert not second.is_alive()


def test_two_calls_run_in_the_library_at_once(
    module: Any, engine: PublishingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in C, without the GIL: no switch of threads is possible but there."""
    engine.serve(2)
    before = sys.getswitchinterval()
    events: list[str] = []
    function = engine._library._run

    def recorded(*args: Any) -> Any:
        events.append("in")
        try:
            return function(*args)
        finally:
            events.append("out")

    monkeypatch.setattr(engine._library, "_run", recorded)
    sys.setswitchinterval(SECONDS)
    try:
        with Callers(*[lambda: answer(module)] * 2) as callers:
            for _ in range(1000):
                callers.wait()
                if ("in", "in") in itertools.pairwise(list(events)):
                    break
    finally:
        sys.setswitchinterval(before)
    assert {*callers.found[0], *callers.found[1]} == {state(0)}
    assert ("in", "in") in itertools.pairwise(events)


@pytest.mark.parametrize("number", [0, -1, 1025, 10**9, 1.0, True, "2", None])
def test_a_number_of_calls_that_cannot_be(number: Any, parts_path: Path) -> None:
    with pytest.raises(refitkit.ConfigError, match="not a number from 1 to 1024"):
        refitkit.load(parts_path, num_models=number)


def test_a_model_that_writes_serves_one_call(tally: refitkit.CompiledModule) -> None:
    engine: Any = tally.engines["model"]
    with pytest.raises(refitkit.ConfigError, match=r"buffers \(count\)"):
        engine.serve(2)
    engine.serve(1)
    x = torch.ones(4)
    with Callers(*[lambda: tally(x)] * 3) as callers:
        for _ in callers.steps(200):
            callers.wait()
    calls = sum(map(len, callers.found))
    assert tally.read("count").unique().tolist() == [calls]


@pytest.mark.parametrize("switch", ["", "1"], ids=["c interface", "binding"])
def test_buffers_are_read_between_two_calls(
    switch: str, tally_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, switch)
    tally = refitkit.load(tally_path)
    found: list[torch.Tensor] = []
    with Callers(lambda: tally(torch.ones(4))) as callers:
        for step in callers.steps(200):
            found.append(tally.read("count"))
            if step % 50 == 0:
                tally.save(tmp_path / "later.refit")
                found.append(refitkit.load(tmp_path / "later.refit").read("count"))
    assert {len(count.unique()) for count in found} == {1}
    assert found[0].unique() < found[-1].unique()


def test_a_model_that_writes_is_not_copied_beside_a_call(
    tally: refitkit.CompiledModule, inside: type[Inside]
) -> None:
    opened: Any = tally.opened
    copies: list[Any] = []
    call = inside(lambda: opened.run((torch.ones(4),), {}))
    copying = threading.Thread(target=lambda: copies.append(opened.reopen()), daemon=True)
    copying.start()
    copying.join(0.05)
    assert not copies
    call.finish()
    copying.join(SECONDS)
    assert copies[0].engines["model"].read("count").unique().tolist() == [1]


def test_refits_keep_what_calls_wrote(tally: refitkit.CompiledModule) -> None:
    engine: Any = tally.engines["model"]
    x, calls = torch.ones(4), 0
    for number in range(20):
        tally(x)
        staged = engine.stage_partial(values(engine, {"weight": torch.full((4,), float(number))}))
        tally(x)
        staged.commit()
        assert tally(x).tolist() == [number + 1] * 4
        calls += 3
        assert tally.read("count").unique().tolist() == [calls]
    staged.rollback()
    assert tally.read("count").unique().tolist() == [calls - 1]  # of the set before


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_of_the_library_arrives_as_text(
    module: Any, engine: PublishingEngine, inside: type[Inside]
) -> None:
    engine.serve(2)
    commit(engine, 1)
    other = inside(lambda: answer(module))
    for _ in range(3):
        with pytest.raises(refitkit.EngineError, match=r"The engine failed: .*index out of"):
            module.run((torch.tensor([0, 99]),), {})
        assert answer(module) == state(1)
    commit(engine, 2)
    assert answer(module) == state(2)
    assert other.finish() == state(1)


@pytest.mark.parametrize("models", [1, 2])
def test_calls_go_on_beside_those_that_fail(
    models: int, module: Any, engine: PublishingEngine
) -> None:
    """A call that waits inside the container could wait for ever after an error."""
    engine.serve(models)

    def fail() -> None:
        with pytest.raises(refitkit.EngineError):
            module.run((torch.tensor([99, 0]),), {})

    with Callers(lambda: answer(module), fail, fail) as callers:
        for _ in callers.steps(50):
            callers.wait()
    assert set(callers.found[0]) == {state(0)}


def test_an_error_keeps_no_weights(
    module: Any, engine: PublishingEngine, sets: list[list[Storage]]
) -> None:
    commit(engine, 1)
    with pytest.raises(refitkit.EngineError) as raised:
        module.run((torch.tensor([0, 99]),), {})
    for number in (2, 3, 4, 5):
        commit(engine, number)
    assert alive(sets) == 2 * len(NAMES)
    assert raised.value.__traceback__ is not None


SILENT = """
import json, sys, torch, refitkit
compiled = refitkit.load(sys.argv[1])
at = torch.tensor([0, 2])
names = [slot.name for slot in compiled.slots]
def weights(number):
    return {slot.name: torch.full(slot.shape, float(number)) for slot in compiled.slots}
compiled(at)
for number in range(4):
    refitkit.refit(compiled, weights(number), inputs=(at,))
    compiled(at)
refitkit.refit(compiled, weights(5)).undo()
copy = refitkit.refit(compiled, weights(6), copy=True).module
assert copy(at)[0].unique().tolist() == [6]
assert compiled(at)[0].unique().tolist() == [3]
compiled.engines["model"].serve(2)
compiled(at)
compiled.save(sys.argv[2])
del copy
json.kept = refitkit.load(sys.argv[2])  # goes after the globals of modules
json.kept(at)
"""


def test_nothing_is_written_to_the_terminal(parts_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SILENT, str(parts_path), str(tmp_path / "again.refit")]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# -- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2])
def test_a_fork_beside_a_call(models: int, module: Any, engine: PublishingEngine) -> None:
    """The child lacks the thread that was inside the library, whose call never ends there."""
    engine.serve(models)
    commit(engine, 1)
    commit(engine, 2)

    def child() -> list[State]:
        found = [answer(module)]
        for number in (3, 4, 5):
            commit(engine, number)
            found.append(answer(module))
        siblings = [module.reopen() for _ in range(4)]  # they use all containers that there are
        found += map(answer, siblings)
        commit(engine, 6).rollback()
        found.append(answer(module))
        with pytest.raises(refitkit.EngineError):
            module.run((torch.tensor([0, 99]),), {})
        return found

    with Callers(*[lambda: answer(module)] * models) as callers:
        for _ in range(4):
            callers.wait()
            assert forked(child) == [state(number) for number in (2, 3, 4, 5, 5, 5, 5, 5, 5)]
    assert set(callers.found[0]) == {state(2)}
    commit(engine, 7)
    assert answer(module) == state(7)


def test_a_container_of_the_parent_is_not_used_again(engine: PublishingEngine) -> None:
    """Another thread may have been inside, and have kept its locks."""
    handle, library = engine.current.container._handle, engine._library

    def is_known() -> bool:
        for number in (1, 2, 3):
            commit(engine, number)
        handles = {handle for handle, _ in library._idle} | {one.handle for one in library._filled}
        return handle in handles

    assert not forked(is_known)
    assert is_known()


def test_a_fork_between_staging_and_the_commit(module: Any, engine: PublishingEngine) -> None:
    commit(engine, 1)
    staged = engine.stage(values(engine, weights(2)))

    def child() -> list[State]:
        staged.commit()
        found = [answer(module)]
        staged.rollback()
        return [*found, answer(module)]

    with Callers(lambda: answer(module)) as callers:
        for _ in range(4):
            callers.wait()
            assert forked(child) == [state(2), state(1)]
    staged.commit()
    assert answer(module) == state(2)


# -- interrupts -----------------------------------------------------------------------------------

_AOTI = str(Path(native.__file__).parent)


def _points(at: int | None) -> Points:
    return Points(at, lambda file: file.startswith(_AOTI))


@pytest.fixture
def ignored(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Types of exceptions that Python ignores: nobody could get them while an object goes."""
    found: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: found.append(about.exc_type))
    return found


def interrupted(do: Callable[[], Any], ignored: list[type]) -> Iterator[int]:
    """Run a function again and again, and interrupt it at each of its places in turn."""
    with _points(None) as points:
        do()
    assert points.count > 20
    for number in range(points.count):
        ignored.clear()
        with _points(number) as points:
            try:
                do()
            except Interrupt:
                ignored.append(Interrupt)
        # the number of places is not always the same
        assert ignored == [Interrupt] * bool(points.where)
        yield number


@pytest.mark.parametrize("models", [1, 2])
def test_an_interrupt_in_a_call_loses_no_turn(
    models: int, module: Any, engine: PublishingEngine
) -> None:
    """Ctrl-C at random places of calls, in a child: its only thread has the signals."""
    engine.serve(models)
    commit(engine, 1)

    def interrupt(*_: object) -> None:
        raise Interrupt

    def child() -> tuple[State, ...]:
        chance, interrupts = random.Random(0), 0  # noqa: S311 - no secret
        signal.signal(signal.SIGALRM, interrupt)
        while interrupts < 500:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 4e-4))
                module.run((AT,), {})
                module.run((AT,), {})
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupts += 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        # a turn that is lost would be free for this thread alone
        in_turns = [in_a_thread(lambda: answer(module)) for _ in range(2 * models)]
        commit(engine, 2)
        return (*in_turns, answer(module))

    assert forked(child) == (state(1),) * 2 * models + (state(2),)


STEPS: dict[str, Callable[[PublishingEngine, int], Any]] = {
    "commit": commit,
    "discard": lambda engine, number: engine.stage(values(engine, weights(number))).discard(),
    "rollback": lambda engine, number: commit(engine, number).rollback(),
    "partial": lambda engine, number: commit_some(engine, number, NAMES[:2]),
    "undo": undo,
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_in_a_refit_leaks_no_weights(
    name: str,
    module: Any,
    engine: PublishingEngine,
    ignored: list[type],
    sets: list[list[Storage]],
) -> None:
    """What an interrupt leaves goes with the next refits."""
    commit(engine, 1)
    numbers = iter(range(2, 1 << 30))
    for _ in interrupted(lambda: STEPS[name](engine, next(numbers)), ignored):
        answer(module)
    for _ in range(3):
        commit(engine, next(numbers), keepable=True)  # in no memory from before
    assert alive(sets) == 2 * len(NAMES)
    assert answer(module) == state(next(numbers) - 1)


# -- through torch's binding ----------------------------------------------------------------------


def _folded(self: Any, name: str, handle: Any, *args: Any) -> None:
    _CALL(self, name, handle, *args)
    if name == "GetConstantFromFolded":
        args[-1]._obj.value = True


def _without_containers(self: Any, name: str, handle: Any, *args: Any) -> None:
    if name == "CreateWithDevice":
        raise refitkit.EngineError("no memory")
    _CALL(self, name, handle, *args)


_CALL = native._Code.call

REASONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "chosen": (lambda patch: patch.setenv(SWITCH, "1"), "environment variable REFITKIT_AOTI"),
    "no function": (
        lambda patch: patch.setattr(native, "_ALL_NEEDED", (*native._ALL_NEEDED, "NoSuch")),
        "without NoSuch",
    ),
    "old torch": (lambda patch: patch.setattr(native, "_aoti", object()), "no handles of tensors"),
    "folded": (lambda patch: patch.setattr(native._Code, "call", _folded), "at run time"),
    "one name": (
        lambda patch: patch.setattr(Library, "_text", lambda *_: b"one"),
        "two weights of the name 'one'",
    ),
    "no container": (
        lambda patch: patch.setattr(native._Code, "call", _without_containers),
        "cannot make a container: no memory",
    ),
    "operators": (
        lambda patch: patch.setattr(native, "_needs_proxy_executor", lambda _: True),
        "operators that only torch's binding can call",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_engine_says_why_it_needs_the_binding(
    name: str, parts_path: Path, monkeypatch: pytest.MonkeyPatch, native_calls: Counter[str]
) -> None:
    patch, reason = REASONS[name]
    patch(monkeypatch)
    compiled = refitkit.load(parts_path)
    engine: Any = compiled.engines["model"]
    assert type(engine) is SwappingEngine
    assert reason in engine.binding
    refitkit.refit(compiled, weights(2), inputs=(AT,))
    assert answered(compiled(AT)) == state(2)
    assert compiled.opened.reopen().engines["model"].binding == engine.binding  # type: ignore[attr-defined]


def test_an_engine_without_a_reason_uses_the_c_interface(engine: PublishingEngine) -> None:
    assert engine.binding == ""


def test_a_package_of_torch_uses_the_c_interface_once_its_inputs_are_known(
    torch_package: Callable[[bool], Path],
) -> None:
    case = CASES["small"]
    compiled = refitkit.load(torch_package(True))
    assert "its inputs are not known" in compiled.engines["model"].binding  # type: ignore[attr-defined]
    refitkit.plan(case.program(0), compiled)
    assert type(compiled.engines["model"]) is PublishingEngine
    refitkit.refit(compiled, case.model(1))
    assert max_error(compiled(*case.args()), case.expected(case.model(1))) < 1e-5


def test_operators_without_a_c_function_use_the_binding(tmp_path: Path) -> None:
    """Their description lies beside the library, also in a saved file."""

    @torch.library.custom_op("refitkit_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @doubled.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(x + self.weight)

    x = torch.ones(3)
    compiled = refitkit.compile(torch.export.export(Doubled().eval(), (x,)), prove=False)
    compiled.save(tmp_path / "doubled.refit")
    for one in (compiled, refitkit.load(tmp_path / "doubled.refit")):
        assert "operators that only" in one.engines["model"].binding  # type: ignore[attr-defined]
        refitkit.refit(one, {"weight": torch.full((3,), 4.0)}, inputs=(x,))
        assert one(x).tolist() == [10] * 3
