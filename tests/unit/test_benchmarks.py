"""The benchmark's own arithmetic, and the probe that its numbers of memory come from."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = 40_000_000
BLUR = 2_000_000


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("memory_probe", monkeypatch)


TAKES = f"""
import memory_probe
with memory_probe.Probe() as probe:
    held = bytearray(b"1") * {SIZE}
print(probe.own, probe.all, any(probe.children))
"""


def test_a_probe_sees_what_is_taken() -> None:
    """In a process of its own: this one may give back as much in the same moment."""
    done = subprocess.run(
        [sys.executable, "-c", TAKES], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    own, whole, others = done.stdout.split()
    assert int(own) == pytest.approx(SIZE, abs=BLUR)
    assert (whole, others) == (own, "False")


def test_a_probe_sees_who_works(memory: Any) -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with memory.Probe(0.02) as probe:
        child = subprocess.Popen([sys.executable, "-c", work], **piped)
        assert child.stdout.readline()
    child.communicate(b"\n")
    assert probe.worked >= 0.28


def test_a_probe_does_not_count_mapped_files(memory: Any) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"1" * SIZE)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapped, memory.Probe() as probe:
            touched = sum(mapped[at] for at in range(0, SIZE, mmap.PAGESIZE))
    assert touched
    assert probe.own < BLUR


def test_the_family_of_a_process_is_found(memory: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert memory.family(os.getppid())[child.pid] >= 0
        assert memory.anonymous(child.pid) > 0
    finally:
        child.communicate(b"\n")
    assert child.pid not in memory.family(os.getppid())
    assert memory.anonymous(child.pid) == 0


def test_growth_counts_from_what_a_process_had_when_it_was_first_seen(memory: Any) -> None:
    tally = memory.Tally()
    for sample in ({1: 100}, {1: 130, 2: 500}, {1: 110, 2: 540}, {1: 120, 2: 0}, {1: 90}):
        tally.add(sample)
    assert tally.peaks == {1: 30, 2: 40}
    assert tally.whole == 50


def found(reference: float, materialize: float, memmove: float, size: int) -> dict[str, Any]:
    """What a model's process reports; the first of three numbers is far off."""
    numbers = {"reference": reference, "materialize": materialize, "memmove": memmove}
    numbers |= {"planning": reference * 1.25, "reference cpu": 2, "planning cpu": 3}
    numbers |= {"materialize cpu": 0.008, "memmove cpu": 0.004}
    listed = {name: [value * 100, value, value] for name, value in numbers.items()}
    stages = {"export": [reference / 4]}
    return {"speed": {**listed, "stages": stages, "slot_bytes": size}}


def test_targets_are_judged_over_all_models_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = loaded("recipe_vs_reference", monkeypatch)
    small, large = found(9, 0.01, 0.001, 1_000_000), found(4, 0.01, 0.02, 30_000_000)
    failed = {"speed": {"error": "it is not known"}}
    measured = {one.name: one.measured([small, large, failed]) for one in bench.TARGETS}
    assert measured == {
        "reference over materialize, geometric mean": pytest.approx(600),
        "the same in CPU time": pytest.approx(250),
        "reference over materialize, lowest": pytest.approx(400),
        "the same in CPU time, lowest": pytest.approx(250),
        "materialize over memmove, geometric mean": pytest.approx(0.5),
        "the same in CPU time, of copies": pytest.approx(2),
        "materialize over memmove, highest": pytest.approx(0.5),
        "the same in CPU time, of copies, highest": pytest.approx(2),
        "planning over the reference, highest": pytest.approx(1.25),
        "the same in CPU time, of planning": pytest.approx(1.5),
    }
    lines = list(bench.verdicts([small, large, failed]))
    missed = [line for line in lines[3:] if line.endswith("| NO |")]
    assert [line.split(" | ")[0] for line in missed] == [
        "| the same in CPU time",
        "| the same in CPU time, of copies",
    ]
    assert len(list(bench.verdicts([failed]))) == 3
    assert not bench.TARGETS[0].met(499.9)
    assert not bench.TARGETS[4].met(0.51)


def test_every_model_of_the_quick_run_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = loaded("recipe_models", monkeypatch)
    assert set(models.QUICK) <= models.MODELS.keys()
    assert all(len(model.inputs()) == len(model.shapes) for model in models.MODELS.values())


def test_memory_of_a_sharded_refit_is_judged_by_its_highest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = loaded("sharded_memory", monkeypatch)
    sizes = {"begin": 3e8, "load_peak": 4.4e9, "loaded": 4.3e9, "refit_peak": 8.4e9}
    sizes |= {"refitted": 8.3e9, "peak": 8.4e9, "engine": 4e9, "high_water": 9e9}
    seconds = {"load_seconds": 3.0, "refit_seconds": 4.0, "compile_seconds": 50}
    rest = {
        "layers": 15,
        "files": 10,
        "torch": "2",
        "which": "refit",
        "verifier": "weights",
        "stages": {"stage": 1},
    }
    found = sizes | seconds | rest
    assert bench.verdict(found, give_up=False) == (pytest.approx(2.1), 2.15)
    assert bench.verdict(found, give_up=True) == (pytest.approx(2.1), 1.15)
    assert "| 2.100 | yes |" in bench.table(found, give_up=False)
    assert "| 2.100 | NO |" in bench.table(found, give_up=True)
