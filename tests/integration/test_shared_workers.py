"""Processes that serve from one set of weights: one refit reaches all, a dead one harms none."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits, slots_of
from shared_workers import (
    INPUTS,
    SIDE,
    Even,
    Worker,
    answer,
    is_locked,
    locked,
    memfds,
    memory_of,
    pages,
    weights,
)

import refitkit
from refitkit.builtin.aotinductor.shared_memory import Description
from tests.forking import Child, forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is of Linux")

SET = 2 * SIDE * SIDE * 4
KINDS = ("fork", "spawn", "forkserver")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved module with weights full of 0."""
    file = tmp_path_factory.mktemp("modules") / "even.refit"
    refitkit.compile(torch.export.export(Even(0), INPUTS)).save(file)
    return file


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of OpenMP do not live on in forked processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled(path: Path) -> Iterator[refitkit.CompiledModule]:
    """A module that shares its weights; afterwards nobody has a lock on them."""
    module = refitkit.load(path)
    module.share()
    yield module
    assert locked(memory_of(module)) == []


@pytest.fixture
def start(compiled: refitkit.CompiledModule, path: Path) -> Iterator[Callable[..., list[Worker]]]:
    """Starts workers, and ends them."""
    started: list[Worker] = []

    def some(*kinds: str) -> list[Worker]:
        new = [
            Worker(compiled if kind == "fork" else compiled.shared, path, kind) for kind in kinds
        ]
        started.extend(new)
        return new

    yield some
    for worker in started:
        worker.end()


def everybody(compiled: refitkit.CompiledModule, workers: list[Worker]) -> set[Any]:
    """The answers and versions of all processes."""
    here = answer(compiled), compiled.version
    return {here, *(worker.ask("call") for worker in workers)}


# -- one refit reaches all ------------------------------------------------------------------------


def test_a_refit_in_any_process_reaches_all(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start(*KINDS)
    assert everybody(compiled, workers) == {(0.0, 0)}
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    assert everybody(compiled, workers) == {(1.0, 1)}
    for version, worker in enumerate(workers, 2):
        assert worker.ask("refit", version) == version
        assert everybody(compiled, workers) == {(float(version), version)}


def test_workers_call_all_the_time_and_see_no_mixture(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    serving = start("fork", "fork")
    (refitting,) = start("fork")
    for worker in serving:
        assert worker.ask("serve") == "serving"
    values = [float(value) for value in range(1, 201)]
    for number, value in enumerate(values):
        if number % 2:
            refitting.ask("refit", value, "none")
        else:
            refitkit.refit(compiled, weights(value), verify="none")
    assert answer(compiled) == values[-1]
    for worker in serving:
        found = worker.ask("stop serving")
        # every answer is one that was live, in the order of the refits
        assert found == sorted(found)
        assert set(found) <= {0.0, *values}
        assert len(found) > 2
        assert worker.ask("call") == (200.0, 200)


def test_calls_of_one_process_side_by_side(path: Path, compiled: refitkit.CompiledModule) -> None:
    module = refitkit.load(path, shared=compiled.shared, num_models=3)
    found: list[list[float]] = [[] for _ in range(3)]
    done = threading.Event()

    def serve(mine: list[float]) -> None:
        while not done.is_set():
            mine.append(answer(module))

    threads = [threading.Thread(target=serve, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for value in range(1, 21):
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
    done.set()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) and -1.0 not in mine for mine in found)
    assert answer(module) == 20.0


def test_a_call_looks_again_once_it_has_its_lock(
    path: Path, compiled: refitkit.CompiledModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = refitkit.load(path, shared=compiled.shared)
    lock, late = Description.lock, [True]

    def lock_late(self: Any, byte: int, *, exclusive: bool = False) -> bool:
        if late and not exclusive:
            late.clear()
            refitkit.refit(other, weights(1), inputs=INPUTS)
            with pytest.raises(refitkit.VerificationError):  # its values are in the first set now
                refitkit.refit(other, weights(2), inputs=INPUTS, reference=lambda x: x)
        return lock(self, byte, exclusive=exclusive)

    monkeypatch.setattr(Description, "lock", lock_late)
    assert answer(compiled) == 1.0
    assert not late


def test_refits_of_two_processes_follow_one_another(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork", "fork")
    for round_ in range(10):
        for worker in workers:
            worker.tell("refit", round_)
        for worker in workers:
            assert isinstance(worker.hear(), int)
    assert everybody(compiled, workers) == {(9.0, 20)}


# -- processes that die or stand still ------------------------------------------------------------


def stopped_inside_a_call(compiled: refitkit.CompiledModule, worker: Worker) -> None:
    """Stop a worker that serves, where it has a lock on the live set."""
    memory, pid = memory_of(compiled), worker.process.pid
    assert pid is not None
    chance = random.Random(0)  # noqa: S311 - no secret
    for _ in range(10_000):
        time.sleep(chance.uniform(0, 1e-3))  # it runs on, to another place each time
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        if is_locked(memory, 1 + memory.live):
            return
        os.kill(pid, signal.SIGCONT)
    pytest.fail("calls take no lock")


def test_a_call_that_takes_long_stops_nobody_and_ends_on_its_weights(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    slow, other = start("fork", "fork")
    assert slow.ask("serve") == "serving"
    stopped_inside_a_call(compiled, slow)
    for value in range(1, 7):
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
        assert other.ask("call") == (float(value), value)
    os.kill(slow.process.pid or 0, signal.SIGCONT)
    found = slow.ask("stop serving")
    assert found[0] == 0.0
    assert -1.0 not in found
    assert set(found) <= {0.0, 6.0}
    assert slow.ask("call") == (6.0, 6)


def test_a_worker_killed_inside_a_call(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    memory = memory_of(compiled)
    for value in range(1, 5):
        dying, other = start("fork", "fork")
        assert dying.ask("serve") == "serving"
        stopped_inside_a_call(compiled, dying)
        dying.kill()
        assert locked(memory) == []
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
        assert everybody(compiled, [other]) == {(float(value), value)}


@pytest.mark.parametrize("where", ["staging", "staged", "committed"])
def test_a_process_killed_in_a_refit(
    where: str, compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    dying, other = start("fork", "fork")
    assert dying.ask("stop", where, 2) == where
    # a commit is one store, so what is stored counts
    live = (2.0, 2) if where == "committed" else (1.0, 1)
    assert everybody(compiled, [other]) == {live}
    other.tell("refit", 3)
    assert is_locked(memory_of(compiled), 0)
    dying.kill()
    assert other.hear() == live[1] + 1
    assert everybody(compiled, [other]) == {(3.0, live[1] + 1)}
    refitkit.refit(compiled, weights(4), inputs=INPUTS).undo()
    assert everybody(compiled, [other]) == {(3.0, live[1] + 3)}


def test_no_half_written_weights_are_restored(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    result = refitkit.refit(compiled, weights(1), inputs=INPUTS)
    (dying,) = start("fork")
    # the set of version 0 is written to, as it is the one that nobody uses
    assert dying.ask("stop", "staging", 2) == "staging"
    dying.kill()
    assert {row.where for row in compiled.kept} == {"file"}
    assert result.undo().report.outcome == "committed"  # from the file
    assert answer(compiled) == 0.0


def test_a_module_that_goes_leaves_nothing_open_or_mapped(path: Path) -> None:
    module = refitkit.load(path)
    key = module.share().key
    other = refitkit.load(path, shared=module.shared)
    refitkit.refit(module, weights(1), inputs=INPUTS)
    assert (answer(module), answer(other)) == (1.0, 1.0)
    assert memfds(key) > 0
    assert pages(key, "Size") >= 3 * SET
    del module
    assert answer(other) == 1.0
    del other
    gc.collect()
    assert memfds(key) == 0
    assert pages(key, "Size") == 0


def test_many_workers_and_refits_leave_nothing_open(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    key = memory_of(compiled).key
    for value in range(1, 6):
        workers = start("fork", "fork")
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
        assert everybody(compiled, workers) == {(float(value), value)}
        # the memory, its mapping, and one for the locks of calls
        assert {memfds(key, worker.process.pid or 0) for worker in workers} == {3}
        workers[0].kill()
        workers[1].end()
    assert memfds(key) == 3
    assert locked(memory_of(compiled)) == []


# -- refits that fail, and ways back --------------------------------------------------------------


def test_a_failed_verification_changes_nothing_anywhere(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork", "fork")
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    with pytest.raises(refitkit.VerificationError):
        refitkit.refit(compiled, weights(2), inputs=INPUTS, reference=lambda x: x)
    assert everybody(compiled, workers) == {(1.0, 1)}
    assert workers[0].ask("fail", 3)[0] == "VerificationError"
    assert everybody(compiled, workers) == {(1.0, 1)}
    refitkit.refit(compiled, weights(4), inputs=INPUTS)
    assert everybody(compiled, workers) == {(4.0, 2)}


class Refusing:
    """A plugin that refuses new weights after their commit."""

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        if report.outcome == "committed":
            raise RuntimeError("refused")


def test_a_rollback_reaches_all(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork")
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    with pytest.raises(refitkit.PluginError):
        refitkit.Pipeline(plugins=[Refusing()]).refit(compiled, weights(2), inputs=INPUTS)
    assert everybody(compiled, workers) == {(1.0, 1)}
    assert workers[0].ask("refit", 3) == 2
    assert everybody(compiled, workers) == {(3.0, 2)}


def test_undo_in_the_process_that_refitted(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork", "spawn")
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    result = refitkit.refit(compiled, weights(2), inputs=INPUTS)
    assert [row.where for row in compiled.kept] == ["file", "engine"]
    for worker in workers:
        kind, text = worker.ask("restore", 1)
        assert kind == "NotRefittableError"
        assert "another process has refitted the shared weights" in text
    result.undo()
    assert everybody(compiled, workers) == {(1.0, 3)}


def test_another_process_has_refitted_since(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    result = refitkit.refit(compiled, weights(1), inputs=INPUTS)
    workers = start("fork")
    assert workers[0].ask("refit", 2) == 2
    assert "another process" in compiled.state.history.base_lost
    # version 0 is in the file; any slot may have been written since
    result.undo()
    assert everybody(compiled, workers) == {(0.0, 3)}
    later = refitkit.refit(compiled, weights(3), inputs=INPUTS)
    assert workers[0].ask("refit", 4) == 5
    with pytest.raises(refitkit.NotRefittableError, match="another process has refitted"):
        later.undo()
    assert everybody(compiled, workers) == {(4.0, 5)}


def test_a_delta_after_a_refit_of_another_process(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    new = {"a": weights(1)["a"], "b": weights(1)["b"]}
    refitkit.refit(compiled, new, delta=True)
    workers = start("fork")
    assert workers[0].ask("refit", 2) == 2
    # the same weights as those of the last delta of this process, and yet all of them change
    refitkit.refit(compiled, new, delta=True)
    assert everybody(compiled, workers) == {(1.0, 3)}
    report = refitkit.refit(compiled, {**new, "b": weights(5)["b"]}, delta=True).report
    assert report.delta
    assert bits(compiled.read("a")) == bits(new["a"])
    assert bits(compiled.read("b")) == bits(weights(5)["b"])


def test_partial_and_in_place_refits(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork")
    refitkit.refit(compiled, {"a": weights(1)["a"]}, partial=True)
    assert bits(compiled.read("b")) == bits(weights(0)["b"])
    refitkit.refit(compiled, {"b": weights(1)["b"]}, partial=True, rollback=False)
    assert everybody(compiled, workers) == {(1.0, 2)}
    assert compiled.free_spare() >= SET
    assert compiled.free_spare() == 0
    refitkit.refit(compiled, weights(3), rollback=False)
    assert everybody(compiled, workers) == {(3.0, 3)}


# -- memory, and what is kept from being written to ------------------------------------------------


def test_workers_share_the_pages(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]]
) -> None:
    workers = start("fork", "fork", "spawn", "spawn")
    assert everybody(compiled, workers) == {(0.0, 0)}
    key = memory_of(compiled).key
    processes: list[int | str] = ["self", *(worker.process.pid or 0 for worker in workers)]
    assert all(pages(key, "Rss", pid) >= SET for pid in processes)
    assert SET <= sum(pages(key, "Pss", pid) for pid in processes) < 1.1 * SET
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    refitkit.refit(compiled, weights(2), inputs=INPUTS)
    assert everybody(compiled, workers) == {(2.0, 2)}
    # two sets; the third one has no memory unless calls need it
    used = os.fstat(memory_of(compiled)._fd).st_blocks * 512
    assert 2 * SET <= used < 2.1 * SET


def test_aliases_stay_as_they_are(compiled: refitkit.CompiledModule) -> None:
    refitkit.refit(compiled, weights(1), inputs=INPUTS)
    engine: Any = compiled.engines["model"]
    aliases = engine.values()
    for value in range(2, 7):
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
    assert all(bool((alias == 1).all()) for alias in aliases.values())

    def child() -> bool:
        refitkit.refit(compiled, weights(7), inputs=INPUTS)
        refitkit.refit(compiled, weights(7), inputs=INPUTS)
        return all(bool((alias == 1).all()) for alias in aliases.values())

    assert forked(child)
    reading = os.pipe()
    waiting = Child(lambda: os.read(reading[0], 1) and child())
    held = locked(memory_of(compiled))
    aliases.clear()  # the parent's; the child has its own lock
    assert locked(memory_of(compiled)) == held != []
    for value in range(8, 14):
        refitkit.refit(compiled, weights(value), inputs=INPUTS)
    os.write(reading[1], b"x")
    assert waiting.answer()
    assert locked(memory_of(compiled)) == []
    for fd in reading:
        os.close(fd)


def test_a_copy_is_of_its_own(
    compiled: refitkit.CompiledModule, start: Callable[..., list[Worker]], tmp_path: Path
) -> None:
    workers = start("fork")
    copy = compiled.with_weights(weights(1))
    assert copy.shared is None
    assert answer(copy) == 1.0
    assert everybody(compiled, workers) == {(0.0, 0)}
    refitkit.refit(compiled, weights(2))
    compiled.save(tmp_path / "saved.refit")
    assert answer(copy) == 1.0
    assert slots_of(refitkit.load(tmp_path / "saved.refit")) == slots_of(compiled)


# -- forks at bad times ---------------------------------------------------------------------------


def test_forks_beside_calls(compiled: refitkit.CompiledModule) -> None:
    done = threading.Event()
    found: list[float] = []

    def serve() -> None:
        while not done.is_set():
            found.append(answer(compiled))

    thread = threading.Thread(target=serve)
    thread.start()
    children = [Child(lambda: answer(compiled)) for _ in range(20)]
    assert [child.answer() for child in children] == [0.0] * 20
    done.set()
    thread.join()
    assert set(found) == {0.0}


def test_a_fork_inside_a_refit(compiled: refitkit.CompiledModule) -> None:
    parent, child = os.getpid(), 0

    def forking(x: torch.Tensor) -> torch.Tensor:
        nonlocal child
        child = os.fork()
        return torch.full((len(x), 2 * SIDE), float(SIDE))

    outcome = "committed"
    try:
        refitkit.refit(compiled, weights(1), inputs=INPUTS, reference=forking)
    except refitkit.EngineError:
        outcome = "refused"
    finally:
        if os.getpid() != parent:
            os._exit(0 if outcome == "refused" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert outcome == "committed"
    assert answer(compiled) == 1.0
    refitkit.refit(compiled, weights(2), inputs=INPUTS)


# -- refusals -------------------------------------------------------------------------------------


def test_two_modules_of_one_process(path: Path, compiled: refitkit.CompiledModule) -> None:
    assert compiled.share() is compiled.shared
    second = refitkit.load(path, shared=compiled.shared)
    refitkit.refit(second, weights(1), inputs=INPUTS)
    assert (answer(compiled), compiled.version) == (1.0, 1)
    with pytest.raises(refitkit.ConfigError):
        refitkit.refit_all([(compiled, weights(2)), (second, weights(3))])
    assert (answer(compiled), answer(second)) == (1.0, 1.0)


def test_weights_of_another_module(
    compiled: refitkit.CompiledModule, fresh: Callable[[str], Any], saved: Callable[[str], Path]
) -> None:
    with pytest.raises(refitkit.WeightMismatchError) as caught:
        refitkit.load(saved("small"), shared=compiled.shared)
    names = {problem.subject for problem in caught.value.problems}
    assert names == {"a", "b", *(slot.name for slot in fresh("small").slots)}
    wrong: Any = object()
    with pytest.raises(refitkit.ConfigError, match=r"compiled\.share"):
        refitkit.load(saved("small"), shared=wrong)


def test_modules_that_cannot_share(
    fresh: Callable[[str], Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(refitkit.ConfigError, match="write to its buffers"):
        fresh("mixed").share()
    monkeypatch.setenv("REFITKIT_AOTI_BINDING", "1")
    module = refitkit.load(path)
    with pytest.raises(refitkit.ConfigError, match="REFITKIT_AOTI_BINDING"):
        module.share()
    assert answer(module) == 0.0


def test_a_system_without_shared_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = refitkit.load(path)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(refitkit.ConfigError, match="Linux only"):
        module.share()
    assert module.shared is None


@pytest.mark.parametrize("name", ["storage", "bfloat16", "transformer", "convnet"])
def test_layouts_and_dtypes(name: str, fresh: Callable[[str], Any]) -> None:
    from aoti_models import CASES

    case, module = CASES[name], fresh(name)
    before = slots_of(module)
    module.share()
    assert slots_of(module) == before
    own = fresh(name)
    for seed in (1, 2, 3):
        state = case.model(seed).state_dict()
        refitkit.refit(module, state, inputs=case.inputs())
        refitkit.refit(own, state)
        assert slots_of(module) == slots_of(own)
        assert bits(module(*case.args())) == bits(own(*case.args()))
