"""The parts of the benchmark on a GPU, and of the run of upstream's tests, that need no GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
UPSTREAM = """import torch
from torch_tensorrt.dynamo import refit_module_weights
def test_all():
    model = models.resnet18(pretrained=False).eval()
    other = models.resnet18(pretrained=True).eval()
    bert = BertModel.from_pretrained("bert-base-uncased").eval().to("cuda")
"""


def loaded(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    file = ROOT / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("benchmarks/gpu_tables.py", monkeypatch)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("benchmarks/gpu.py", monkeypatch)


@pytest.fixture
def tests_of_upstream(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("scripts/gpu_upstream_tests.py", monkeypatch)


# -- numbers --------------------------------------------------------------------------------


def test_a_percentile_is_one_of_the_values(tables: Any) -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert tables.percentile(values, 0.99) == 99
    assert tables.percentile(values, 1) == 100
    assert tables.percentile([3.0, 1.0], 0.5) == 1
    assert tables.percentile([7.0], 0.99) == 7
    assert tables.summary([0.001, 0.003, 0.002]) == {"p50_ms": 2, "p99_ms": 3, "runs": 3}


def test_gaps_are_between_ends(tables: Any) -> None:
    found = tables.gaps([0.0, 1.0, 1.5, 4.0])
    assert (found["p50_ms"], found["longest_ms"], found["calls"]) == (1000, 2500, 4)
    assert tables.gaps([1.0]) == {"calls": 1}


def test_a_split_tells_what_no_stage_accounts_for(tables: Any) -> None:
    reports = [{"map": 0.001, "stage": 0.004}, {"map": 0.003, "stage": 0.004}]
    found = tables.split(reports, [0.006, 0.010])
    assert found["map"] == pytest.approx(2)
    assert found["stage"] == pytest.approx(4)
    assert found["commit"] == 0
    assert found["rest"] == pytest.approx(2)


def test_rates_are_bytes_per_second(tables: Any) -> None:
    assert tables.rate(1_000_000_000, 1000) == pytest.approx(1)
    assert tables.rate(5, 0) == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (0.0, "0"),
        (7, "7"),
        (True, "yes"),
        (False, "NO"),
        ("word", "word"),
        (float("inf"), "inf"),
    ],
)
def test_cells_have_three_digits(tables: Any, value: Any, text: str) -> None:
    assert tables.cell(value) == text


# -- tables ---------------------------------------------------------------------------------


def found(refit_ms: float, copy_ms: float, upstream_s: float | None = None) -> dict[str, Any]:
    """What a model's process writes."""
    one = {"p50_ms": float(refit_ms), "p99_ms": refit_ms * 2.0, "runs": 30}
    stages = dict.fromkeys(("load", "map", "check", "prepare", "stage", "drain", "commit"), 0.5)
    row: dict[str, Any] = {
        "model": "net",
        "dtype": "float32",
        "slots": 3,
        "nbytes": 2_000_000,
        "copies": {"device_ms": float(copy_ms), "pinned_ms": 1.0},
        "refit": {"device": {"refit": one, "first_output": one, "split": {**stages, "rest": 1.5}}},
        "correct": {"a_b_a": True},
    }
    return row if upstream_s is None else {**row, "upstream": {"map": upstream_s}}


def test_the_goal_is_judged(tables: Any) -> None:
    good, bad = tables.goal([found(4, 1, 5.0), found(6, 1, 5.0)])
    assert good == "net float32: 4 copies (met), 1250x upstream (met), A, B, A bit-equal"
    assert bad == "net float32: 6 copies (NOT met), 833x upstream (NOT met), A, B, A bit-equal"
    (without,) = tables.goal([{**found(4, 1), "correct": {"a_b_a": False}}])
    assert without == "net float32: 4 copies (met), A, B, A NOT bit-equal"
    assert list(tables.goal([{"model": "net", "dtype": "float32", "refit": {}}])) == []


def test_what_was_not_measured_leaves_a_cell_empty(tables: Any) -> None:
    lines = list(tables.table(tables.REFITS, [found(4, 1)]))
    assert len({line.count("|") for line in lines}) == 1
    cells = dict(
        zip(*(map(str.strip, line.split("|")) for line in (lines[0], lines[2])), strict=True)
    )
    assert cells["device p50 ms"] == "4.00"
    assert cells["device p99 ms"] == "8.00"
    assert cells["pinned p50 ms"] == ""
    assert cells["refit alone over device copy"] == "4.00"
    assert list(tables.table(tables.REFITS, [])) == []


def test_the_report_shows_splits_and_failures(tables: Any) -> None:
    text = tables.report([found(4, 1), {"model": "other", "dtype": "float16", "error": "exit 1"}])
    assert "other float16: exit 1" in text
    rows = [line for line in text.splitlines() if line.startswith("| net")]
    assert any("| device | 0.500 |" in row and row.endswith("| 0.500 |") for row in rows)


# -- processes ------------------------------------------------------------------------------


def test_a_batch_is_of_one_dtype(bench: Any) -> None:
    given = bench.arguments(["--models", "resnet18", "gpt2"])
    batches = list(bench.jobs_of(given))
    assert [(j.model, j.dtype, j.options) for j in batches[0]] == [
        ("resnet18", "float32", ("--upstream", "--profile", "--immutable")),
        ("resnet18", "float32", ("--runtime", "cpp")),
        ("gpt2", "float32", ("--immutable",)),
    ]
    assert [(j.model, j.dtype, j.options) for j in batches[1]] == [
        ("resnet18", "float16", ()),
        ("gpt2", "float16", ()),
    ]


def test_pairs_are_one_batch(bench: Any) -> None:
    given = bench.arguments(["--pairs", "gpt2:float32", "llama:float16"])
    (batch,) = bench.jobs_of(given)
    assert [(j.model, j.dtype) for j in batch] == [("gpt2", "float32"), ("llama", "float16")]


CHILD = """
import json, sys
from pathlib import Path
file = Path(sys.argv[3])
if sys.argv[1] == "dies": sys.exit("on purpose\\nExtension modules: a, b")
print("noise"); print("READY", flush=True)
sys.stdin.readline()
file.write_text(json.dumps({"model": sys.argv[1], "dtype": sys.argv[2], "measured": True}))
if sys.argv[1] == "hangs": sys.stdin.read(); import time; time.sleep(60)
"""


def test_processes_wait_for_their_turn(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_measure.py").write_text(CHILD)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    jobs = [bench.Job(name, "float32") for name in ("works", "dies", "hangs")]
    for job in jobs:
        job.start(tmp_path, 1)
    assert [job.is_ready(20) for job in jobs] == [True, False, True]
    assert not any("measured" in job.found() for job in jobs)
    jobs[0].measure(20)
    jobs[1].measure(20)
    jobs[2].measure(1)
    works, dies, hangs = (job.found() for job in jobs)
    assert works == {"model": "works", "dtype": "float32", "measured": True}
    assert (dies["error"], dies["log"]) == ("exit 1", "on purpose")
    assert hangs["measured"]
    assert hangs["error"].startswith("exit -")


def test_a_process_that_never_is_ready_is_ended(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_measure.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    job = bench.Job("net", "float32")
    job.start(tmp_path, 1)
    assert not job.is_ready(0.2)
    job.measure(5)
    assert job.found()["error"].startswith("exit -")


# -- upstream's tests -----------------------------------------------------------------------


def test_upstreams_tests_call_ours_and_download_nothing(tests_of_upstream: Any) -> None:
    text = tests_of_upstream.rewritten(UPSTREAM)
    assert "from refitkit.compat import refit_module_weights" in text
    assert "torch_tensorrt.dynamo" not in text
    assert text.count("models.resnet18(weights=None).eval()") == 2
    assert 'BertModel(__import__("transformers").BertConfig()).eval()' in text
    compile(text, "upstream", "exec")
    theirs = tests_of_upstream.rewritten(UPSTREAM, theirs=True)
    assert "from torch_tensorrt.dynamo import refit_module_weights" in theirs
    assert "pretrained" not in theirs


def test_an_unknown_file_of_upstreams_is_refused(tests_of_upstream: Any) -> None:
    with pytest.raises(SystemExit, match="does not import"):
        tests_of_upstream.rewritten("import torch\n")
    with pytest.raises(SystemExit, match="still download"):
        tests_of_upstream.rewritten(UPSTREAM + "GPT2Model.from_pretrained('gpt2')\n")


def test_outcomes_are_read(tests_of_upstream: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a' time='1.5'/>"
        "<testcase name='b'><failure message='wrong'>trace</failure></testcase>"
        "<testcase name='c'><skipped message='not here'>x</skipped></testcase>"
        "</testsuite></testsuites>"
    )
    outcomes = {one["test"]: one for one in tests_of_upstream.results(report)}
    assert [outcomes[name]["outcome"] for name in "abc"] == ["passed", "failed", "skipped"]
    assert (outcomes["b"]["why"], outcomes["b"]["trace"]) == ("wrong", "trace")
    assert outcomes["a"]["seconds"] == "1.5"


def test_what_is_profiled_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = loaded("benchmarks/gpu_profile.py", monkeypatch)
    assert [name for owner, name in profile.WATCHED if not hasattr(owner, name)] == []
