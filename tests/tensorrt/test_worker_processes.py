"""Processes of sessions: builds that fail for real, and what is left when the user's is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import refitkit
from refitkit import CompileError
from tests.tensorrt.helpers import (
    CASES,
    bytes_of,
    compiled_from,
    needs_torch_tensorrt,
    sessions,
    values_of,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_torch_tensorrt
CHILDREN = Path(__file__).parent / "children"
ROOT = Path(__file__).parents[2]
CASE = CASES["odd"]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """While this file is there, TensorRT refuses to build; needs a server of its own."""
    from refitkit.builtin.torch_tensorrt.worker.client import SERVER

    path = tmp_path / "broken"
    monkeypatch.setenv("REFITKIT_TEST_BROKEN", str(path))
    monkeypatch.syspath_prepend(str(ROOT))
    SERVER._stop()
    yield path
    SERVER._stop()


def test_a_build_that_tensorrt_refuses_leaves_the_module_and_does_not_poison_the_next(
    broken: Path,
) -> None:
    """In a process in which a build failed, every later one fails, too."""
    before = sessions()
    compiled = compiled_from(CASE, imports=["tests.tensorrt.children.failing_builds"])
    (session,) = sessions() - before
    held, engines = values_of(compiled), bytes_of(compiled)
    broken.touch()
    for _ in range(2):
        with pytest.raises(CompileError, match="cannot build"):
            refitkit.refit(compiled, CASE.model(1).state_dict())
        assert bytes_of(compiled) == engines
        found = values_of(compiled)
        assert all(torch.equal(found[key], value) for key, value in held.items())
    broken.unlink()
    refitkit.refit(compiled, CASE.model(1).state_dict())
    assert bytes_of(compiled) == bytes_of(compiled_from(CASE, 1))
    assert session in sessions()


def test_a_compile_whose_build_fails_says_so_and_leaves_nothing(broken: Path) -> None:
    broken.touch()
    before = sessions()
    with pytest.raises(CompileError, match="cannot build"):
        compiled_from(CASE, imports=["tests.tensorrt.children.failing_builds"])
    for one in sessions() - before:
        wait_for_end(one)


def _child(name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(CHILDREN / name), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("end", ["exit", "wait"], ids=["it exits", "it is killed"])
def test_no_process_outlives_the_users(end: str) -> None:
    with _child("compile_and_tell.py", end) as child:
        assert child.stdout is not None
        told = [int(word) for word in child.stdout.readline().split()]
        assert len(told) == 2
        if end == "wait":
            child.send_signal(signal.SIGKILL)
        child.wait()
        for one in told:
            wait_for_end(one)


def test_without_torch_tensorrt_the_rest_works_and_messages_say_what_to_install(
    tmp_path: Path,
) -> None:
    path = tmp_path / "plan.refitplan"
    compiled = compiled_from(CASE)
    assert compiled.plan is not None
    compiled.plan.save(path)
    with _child("without_torch_tensorrt.py", str(path)) as child:
        said, _ = child.communicate()
    assert child.returncode == 0
    *refusals, backends, rows = said.splitlines()
    assert backends == "['aotinductor', 'tensorrt_network', 'torch_tensorrt']"
    assert int(rows) == len(compiled.slots)
    assert [line.split()[:2] for line in refusals] == [
        ["tensorrt_network", "compile"],
        ["tensorrt_network", "plan"],
        ["torch_tensorrt", "compile"],
        ["torch_tensorrt", "plan"],
    ]
    assert all("refitkit[rtx]" in line for line in refusals), refusals
