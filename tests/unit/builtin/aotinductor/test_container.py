"""The files that containers map: no other process can cut them, and no file system can fill."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import IO

import pytest
import torch

from refitkit.builtin.aotinductor import container
from refitkit.errors import ResourceError, UnsupportedTargetError

GRAIN = mmap.ALLOCATIONGRANULARITY


class Mapping:
    """A container that maps its file, as torch does, and looks at it."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.content = b""
        self.seals = 0
        self.mode = 0

    def update_constant_buffer_from_blob(self, path: str) -> None:
        handle = os.open(path, os.O_RDONLY)
        self.mode = os.fstat(handle).st_mode
        if stat.S_ISREG(self.mode):
            self.seals = fcntl.fcntl(handle, fcntl.F_GET_SEALS)
            with mmap.mmap(handle, self.needed, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
                self.content = mapped[:]
        os.close(handle)

    def extract_constants_map(self, use_inactive: bool) -> dict[str, torch.Tensor]:
        assert not use_inactive
        return {"weight": torch.zeros(self.needed, dtype=torch.uint8)}


def filled(runner: Mapping, content: bytes) -> None:
    def copy(to: IO[bytes]) -> None:
        to.write(content)

    container.fill_from_blob(runner, copy)


def test_a_blob_is_mapped_from_sealed_memory() -> None:
    runner, content = Mapping(3 * GRAIN), os.urandom(3 * GRAIN)
    filled(runner, content)
    assert runner.content == content
    for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE):
        assert runner.seals & seal


def test_a_blob_that_is_too_short_is_refused_and_no_crash() -> None:
    """The container reads as far as its library says, before anybody can look."""
    runner = Mapping(3 * GRAIN)
    with pytest.raises(UnsupportedTargetError, match="have 10 bytes, and its library reads"):
        filled(runner, b"x" * 10)
    assert runner.content == b"x" * 10 + bytes(3 * GRAIN - 10)


def test_a_limit_of_file_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(ResourceError, match="File too large") as info:
        filled(Mapping(1), b"x")
    assert "ulimit -f" in info.value.hint


def test_zeros_come_from_no_file() -> None:
    runner = Mapping(GRAIN)
    container.fill_with_zeros(runner)
    assert stat.S_ISCHR(runner.mode)


def test_zeros_that_cannot_be_mapped_are_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("mmap() failed\nframe #0: somewhere")

    runner = Mapping(GRAIN)
    monkeypatch.setattr(runner, "update_constant_buffer_from_blob", refuse)
    with pytest.raises(UnsupportedTargetError, match=r"mmap\(\) failed$"):
        container.fill_with_zeros(runner)


def test_nothing_of_all_that_stays_open() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    filled(Mapping(1), b"x")
    assert sorted(Path("/proc/self/fd").iterdir()) == before
