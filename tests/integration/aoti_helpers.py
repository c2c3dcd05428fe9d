"""What several integration tests need: bits, children, and modules that are compiled once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HERE = Path(__file__).parent
CHILDREN = HERE / "children"
SECONDS = 120
"""So long a child's task may take."""


def bits(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor, whatever its layout: -0 is not 0, and a NaN is itself."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    return flat.view(torch.uint8).numpy().tobytes()


def digest(outputs: Any) -> str:
    """One text for all bits, dtypes and shapes of some outputs."""
    leaves, spec = pytree.tree_flatten(outputs)
    found = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(bits(leaf))
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def max_error(found: Any, expected: Any) -> float:
    """Largest absolute difference of two results of one structure, in float64."""
    mine, spec = pytree.tree_flatten(found)
    theirs, wanted = pytree.tree_flatten(expected)
    assert spec == wanted
    errors = [0.0]
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            errors.append(float((a.detach().double() - b.detach().double()).abs().max()))
    return max(errors)


def slots_of(compiled: Any) -> dict[str, bytes]:
    """The bits of every slot of a compiled module."""
    return {slot.name: bits(compiled.read(slot.name)) for slot in compiled.slots}


def child_environment(**changes: str | None) -> dict[str, str]:
    """The environment of a child that can import what lies beside the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *_inherited()])}
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def _inherited() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [given] if given else []


def start_child(
    script: str, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the children to its end and return what it said.

    Its temporary files go with it, also those of tasks that died.
    """
    command = [sys.executable, str(CHILDREN / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            command,
            env={**(env or child_environment()), "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of a child, as JSON; a child that died of a signal fails the test."""
    assert done.returncode >= 0, f"the child died of signal {-done.returncode}: {done.stderr}"
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def each_in_a_process(tasks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run each task in a process of its own, forked off this one, one after another.

    For children: they have imported everything, and have no threads yet.

    Returns:
        For each task what it returned, or ``{"died": ...}`` with the signal or the traceback.
    """
    return {name: _in_a_process(task) for name, task in tasks.items()}


def _in_a_process(task: Callable[[], Any]) -> Any:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(_told(task))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return {"died": signal.Signals(os.WTERMSIG(status)).name}
    return json.loads(text)


def _told(task: Callable[[], Any]) -> str:
    signal.alarm(SECONDS)  # a task that hangs dies of SIGALRM
    try:
        return json.dumps(task())
    except BaseException:  # noqa: BLE001 - whatever it is, the test has to hear of it
        return json.dumps({"died": traceback.format_exc()})


def members_of(path: Path) -> dict[str, bytes]:
    """All members of an archive, by name."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_members(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive whose checksums are right, whatever its members hold."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = how
            archive.writestr(info, content)
    return path
