"""What shows that a file was written to."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.files import file_state
from refitkit.files.file_state import FileState

if TYPE_CHECKING:
    from pathlib import Path

STATE = FileState(device=1, inode=2, size=3, modified=4, changed=5, links=1)


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ({}, ""),
        ({"changed": 6}, "attributes"),
        ({"changed": 6, "links": 0}, "links"),
        ({"changed": 6, "links": 0, "modified": 5}, "written"),
        ({"changed": 6, "links": 0, "size": 4}, "size"),
        ({"inode": 3, "size": 4}, "another file"),
        ({"device": 3}, "another file"),
    ],
)
def test_how_two_states_differ(moved: dict[str, int], expected: str) -> None:
    assert STATE.difference(STATE._replace(**moved)) == expected


def test_a_state_is_what_stat_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    found = (tmp_path / "file").stat()
    state = FileState.of(found)
    assert (state.size, state.links) == (3, 1)
    assert (state.inode, state.changed) == (found.st_ino, found.st_ctime_ns)
    os.utime(tmp_path / "file", (1, 1))
    assert state.difference(FileState.of((tmp_path / "file").stat())) == "written"


def looked_at(monkeypatch: pytest.MonkeyPatch, *changed: int, clock: list[int]) -> tuple[Any, Any]:
    """The settled state of a file of these change times, while the clock shows those."""
    times, looks = iter(clock), iter(changed)
    monkeypatch.setattr(file_state, "_now", lambda: next(times))
    monkeypatch.setattr(file_state.time, "sleep", lambda _seconds: None)

    def look() -> Any:
        facts = dict.fromkeys(("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_nlink"), 1)
        return SimpleNamespace(**facts, st_ctime_ns=next(looks))

    return FileState.settled(look), looks


def test_a_file_of_an_earlier_tick_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state, rest = looked_at(monkeypatch, 5, 7, clock=[6])
    assert state.changed == 5
    assert next(rest) == 7


def test_a_file_of_this_tick_is_looked_at_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write within the tick would leave the time as it is."""
    state, rest = looked_at(monkeypatch, 6, 6, 6, 9, clock=[6, 6, 7])
    assert state.changed == 6
    assert next(rest) == 9


def test_nobody_waits_forever_for_another_machines_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monotonic = iter(range(0, 1 << 40, 1 << 24))
    monkeypatch.setattr(file_state.time, "monotonic_ns", lambda: next(monotonic))
    state, _ = looked_at(monkeypatch, *[99] * 9, clock=[1] * 9)
    assert state.changed == 99


def test_the_next_write_is_seen(tmp_path: Path) -> None:
    """Whatever the tick of this machine: written to at once, with the time set back."""
    file = tmp_path / "file"
    for number in range(20):
        file.write_bytes(b"%04d" % number)
        state = FileState.settled(file.stat)
        with file.open("r+b") as stream:
            stream.write(b"abcd")
        os.utime(file, ns=(state.modified, state.modified))
        assert state.difference(FileState.of(file.stat())) == "attributes"
