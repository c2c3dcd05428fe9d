"""What tests of network modules share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.worker.client import SERVER
from tests.tensorrt.models import CASES, Case

if TYPE_CHECKING:
    from collections.abc import Mapping

BACKEND = "tensorrt_network"

needs_torch_tensorrt = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed: refitkit[rtx]"
)


def compiled_from(case: Case, seed: int = 0, **options: Any) -> refitkit.CompiledModule:
    return refitkit.compile(case.program(seed), BACKEND, {**case.settings, **options}, prove=False)


def bytes_of(compiled: refitkit.CompiledModule) -> dict[str, bytes]:
    opened: Any = compiled.opened
    return {name: opened.engine_bytes(name) for name in compiled.engines}


def values_of(compiled: refitkit.CompiledModule) -> dict[tuple[str, str], Any]:
    engines: Mapping[str, Any] = compiled.engines
    return {
        (name, slot): engine.read(slot).clone()
        for name, engine in engines.items()
        for slot in engine.slots
    }


def sessions() -> set[int]:
    """Processes that were forked from the server."""
    process = SERVER._process
    return children_of(process.pid) if process is not None else set()


def children_of(parent: int) -> set[int]:
    """Processes, zombies included, whose parent this is."""
    found = set()
    for one in Path("/proc").iterdir():
        if one.name.isdigit() and _parent(int(one.name)) == parent:
            found.add(int(one.name))
    return found


def is_alive(process: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def _parent(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return -1
    return int(text.rpartition(")")[2].split()[1])


def wait_for_end(process: int) -> None:
    """Wait until a process has ended; it need not be a child of this one."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    import select

    try:
        assert select.select([descriptor], [], [], 60)[0], f"{process} goes on"
    finally:
        os.close(descriptor)


__all__ = [
    "BACKEND",
    "CASES",
    "Case",
    "bytes_of",
    "children_of",
    "compiled_from",
    "is_alive",
    "needs_torch_tensorrt",
    "sessions",
    "values_of",
    "wait_for_end",
]
