"""A compiled module in forked children: each process goes on as if it were alone.

So do web servers that load before they fork, workers of data loaders, and ``multiprocessing``.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import child_environment, slots_of
from aoti_models import CASES

import refitkit
from tests.forking import forked, raised_by

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fresh = Callable[[str], refitkit.CompiledModule]

CASE = CASES["mixed"]


def verbs(compiled: refitkit.CompiledModule, folder: Path) -> dict[str, Callable[[], Any]]:
    """Each verb, and a check of its result."""
    folder.mkdir(exist_ok=True)
    weights = CASE.model(1).state_dict()
    saved = folder / f"{os.getpid()}.refit"
    inputs = CASE.inputs()

    def load() -> None:
        assert slots_of(refitkit.load(saved)) == slots_of(compiled)

    def copy() -> None:
        refitkit.refit(compiled, weights, copy=True, inputs=inputs)

    return {
        "call": lambda: compiled(*inputs),
        "read": lambda: slots_of(compiled),
        "save": lambda: compiled.save(saved),
        "load": load,
        "copy": copy,
        "refit": lambda: refitkit.refit(compiled, weights, inputs=inputs),
        "again": lambda: refitkit.refit(compiled, CASE.model(2).state_dict(), inputs=inputs),
        "restore": lambda: compiled.restore(0),
        "free": compiled.free_spare,
    }


def failed(compiled: refitkit.CompiledModule, folder: Path) -> dict[str, str]:
    raised = {name: raised_by(verb) for name, verb in verbs(compiled, folder).items()}
    return {name: error for name, error in raised.items() if error}


def test_verbs_in_parent_and_child(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh("mixed")
    before = slots_of(compiled)
    assert forked(lambda: failed(compiled, tmp_path), exits=True) == {}
    assert slots_of(compiled) == before
    assert failed(compiled, tmp_path) == {}
    assert forked(lambda: failed(compiled, tmp_path)) == {}


@pytest.mark.parametrize("exits", [False, True], ids=["_exit", "exit"])
def test_a_child_that_drops_the_module_leaves_the_parents(
    exits: bool, fresh: Fresh, tmp_path: Path
) -> None:
    modules = [fresh("mixed")]

    def drop() -> None:
        modules.clear()
        gc.collect()

    forked(drop, exits=exits)
    assert failed(modules[0], tmp_path) == {}


def test_workers_of_a_data_loader(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh("mixed")

    class Data(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return len(slots_of(compiled)) + index

    loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
    count = len(slots_of(compiled))
    assert [int(one) for one in loader] == [count + index for index in range(4)]
    assert failed(compiled, tmp_path) == {}


def _answer(queue: Any, compiled: refitkit.CompiledModule, folder: Path) -> None:
    queue.put(failed(compiled, folder))


def test_multiprocessing_with_fork(fresh: Fresh, tmp_path: Path) -> None:
    compiled, context = fresh("mixed"), multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_answer, args=(queue, compiled, tmp_path)) for _ in "ab"]
    for one in processes:
        one.start()
    assert [queue.get() for _ in processes] == [{}, {}]
    for one in processes:
        one.join()
    assert failed(compiled, tmp_path) == {}


def test_multiprocessing_with_spawn_says_what_to_do(fresh: Fresh) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=slots_of, args=(fresh("mixed"),))
    with pytest.raises(TypeError, match=r"refitkit\.load"):
        process.start()


def test_a_fork_in_the_middle_of_a_commit(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh("mixed")
    inside, go_on = threading.Event(), threading.Event()

    class Waits:
        @refitkit.hookimpl
        def refitkit_weights_changed(self) -> None:
            inside.set()
            go_on.wait()

    pipeline = refitkit.Pipeline(plugins=[Waits()])
    weights = CASE.model(1).state_dict()
    thread = threading.Thread(target=lambda: pipeline.refit(compiled, weights), daemon=True)
    thread.start()
    inside.wait()
    found = forked(lambda: failed(compiled, tmp_path), exits=True)
    go_on.set()
    thread.join()
    assert found.pop("load") == "UnsupportedTargetError"  # there is nothing to load
    assert set(found.values()) == {"ModuleLostError"}
    assert found.keys() == verbs(compiled, tmp_path).keys() - {"load"}
    assert compiled.version == 1
    assert failed(compiled, tmp_path) == {}


SCRIPT = """
import os, sys, refitkit
compiled = refitkit.load(sys.argv[1])
if os.fork() == 0:
    sys.exit(0)
_, status = os.wait()
compiled.save(sys.argv[2])
print(status, compiled.opened.files.path)
"""


def test_exits_of_both_processes(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """With real exits of interpreters; nothing is left behind."""
    command = [sys.executable, "-c", SCRIPT, str(saved("mixed")), str(tmp_path / "again")]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = child_environment(TMPDIR=str(temporary))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    status, folder = done.stdout.split()
    assert status == "0"
    assert folder.startswith(str(temporary))
    assert list(temporary.glob("*refitkit*")) == []
