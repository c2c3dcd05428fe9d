"""Memory and CPU time of a process and its descendants, seen from another process.

Anonymous memory is what has no file behind it: what ``RssAnon`` of ``/proc/PID/status`` says, read
here as resident less shared pages of ``statm``, which is faster. A descendant counts from what it
had when it was seen first: a fork starts with its parent's pages, which are not used twice.
Samples are taken about every 0.2 ms; the kernel's own counters may be off by a few 100 kB, and CPU
time has a resolution of 10 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAUSE = 0.0002
_FAMILY_EVERY = 0.005


class Probe:
    """Measures while a ``with`` block runs; the numbers are there afterwards.

    Attributes:
        own: Bytes by which this process grew, at its peak.
        all: The same of this process and its descendants together.
        children: The same by descendant, largest first.
        worked: Seconds that processors worked for all of them.
    """

    def __init__(self, pause: float = _PAUSE) -> None:
        """Measure.

        Args:
            pause: Seconds between two samples: where time is measured, too, take few.
        """
        self._pause = pause
        self.own, self.all, self.worked = 0, 0, 0.0
        self.children: list[int] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-S", "-E", __file__, str(os.getpid()), str(self._pause)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        said, _ = self._process.communicate()
        found = json.loads(said)
        self.own, self.all, self.worked = found["own"], found["all"], found["worked"]
        self.children = sorted(found["children"], reverse=True)


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 where there is none."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def family(process: int) -> dict[int, float]:
    """A process and all its descendants, without this one: seconds of CPU time of each."""
    parents: dict[int, int] = {}
    worked: dict[int, float] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - it runs thousands of times
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/stat").read_text()
            except OSError:
                continue
            fields = text.rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
            worked[int(name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return {one: worked[one] for one in found if one in worked and one != os.getpid()}


class Tally:
    """Growth of processes since they were first seen, and its peaks.

    Attributes:
        peaks: The highest growth of each.
        whole: The highest growth of all together that are there.
    """

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self.whole = 0
        self._base: dict[int, int] = {}

    def add(self, sample: Mapping[int, int]) -> None:
        """Take one sample: bytes by process, 0 for one that is gone."""
        there = {one: now for one, now in sample.items() if now}
        grown = {one: now - self._base.setdefault(one, now) for one, now in there.items()}
        for one, more in grown.items():
            self.peaks[one] = max(self.peaks.get(one, 0), more)
        self.whole = max(self.whole, sum(grown.values()))


def watch(process: int, pause: float) -> dict[str, object]:
    """Sample until stdin is closed, and once more."""
    tally, known, looked = Tally(), family(process), time.perf_counter()
    before, worked = known, dict(known)
    tally.add({one: anonymous(one) for one in known})
    os.set_blocking(0, False)
    print("ready", flush=True)
    ended = False
    while not ended:
        ended = sys.stdin.buffer.read(1) is not None
        if ended or time.perf_counter() - looked > _FAMILY_EVERY:
            known, looked = family(process), time.perf_counter()
            worked |= known
        tally.add({one: anonymous(one) for one in known})
        time.sleep(pause)
    own = tally.peaks.pop(process, 0)
    return {
        "own": own,
        "all": tally.whole,
        "children": list(tally.peaks.values()),
        "worked": sum(worked.values()) - sum(before.values()),
    }


if __name__ == "__main__":
    print(json.dumps(watch(int(sys.argv[1]), float(sys.argv[2]))))
