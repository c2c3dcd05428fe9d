"""Refits whose checkpoint is spoilt while it is read, each in a process of its own; tells JSON.

usage: spoiling.py MODEL FOLDER CASE...

A case is ``KIND HOW WHEN OPTIONS``: what kind of checkpoint is spoilt how and when, and arguments
of the refit as JSON.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from aoti_helpers import bits, each_in_a_process
from safetensors.torch import save_file

import refitkit

State = dict[str, torch.Tensor]
WIDTH = 1024
OLD, OTHER = (struct.pack("<f", value) * 4 for value in (0.02, 0.020001))
MAPPED: dict[Path, mmap.mmap] = {}


def safetensors(folder: Path, state: State) -> tuple[Path, Path]:
    save_file(state, folder / "new.safetensors")
    return folder / "new.safetensors", folder / "new.safetensors"


def zipped(folder: Path, state: State) -> tuple[Path, Path]:
    torch.save(state, folder / "new.pt")
    return folder / "new.pt", folder / "new.pt"


def sharded(folder: Path, state: State) -> tuple[Path, Path]:
    home = {}
    for number, (name, value) in enumerate(state.items()):
        home[name] = f"{number}.safetensors"
        save_file({name: value}, folder / home[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder, folder / home["1.weight"]


def distributed(folder: Path, state: State) -> tuple[Path, Path]:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (file,) = folder.glob("*.distcp")
    return folder, file


def merged(folder: Path, state: State) -> tuple[Any, Path]:
    path, file = safetensors(folder, state)
    return refitkit.WeightedAverage([(path, 0.5), (dict(state), 0.5)]), file


KINDS = {f.__name__: f for f in (safetensors, zipped, sharded, distributed, merged)}


def cut(file: Path) -> None:
    """To one page: what is mapped behind it is gone."""
    os.truncate(file, 4096)


def overwrite(file: Path) -> None:
    """The second half of it, in place: what is left is a checkpoint of the same layout."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size // 4))


def rewrite(file: Path) -> None:
    """All values of another checkpoint in place, with size and modification time as before.

    As ``cp -p`` and ``rsync --inplace -t`` do it of files that were made at the same time.
    """
    times, content = file.stat(), file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content.replace(OLD, OTHER))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite_mapped(file: Path) -> None:
    """The same through a shared mapping whose pages were written to before: no time moves."""
    times = file.stat()
    mapped = MAPPED[file]
    mapped[:] = mapped[:].replace(OLD, OTHER)
    assert (times.st_mtime_ns, times.st_ctime_ns) == _times(file)


def _times(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_ctime_ns


def map_for_writing(file: Path) -> None:
    """Map a file as another process might, and write to all pages."""
    with file.open("r+b") as stream:
        mapped = mmap.mmap(stream.fileno(), 0)
    mapped[:] = mapped[:]
    MAPPED[file] = mapped


def link(file: Path) -> None:
    """One more name of it, as backups make: nothing was written to."""
    os.link(file, file.with_name("backup"))


def replace(file: Path) -> None:
    """By another one: the old one is still there for who has it open."""
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def remove(file: Path) -> None:
    file.unlink()


HOWS = {f.__name__: f for f in (cut, overwrite, rewrite, rewrite_mapped, link, replace, remove)}


class Spoiler:
    """Spoils a file once: at an event, or after so many reads from it."""

    def __init__(self, how: str, when: str, file: Path) -> None:
        self._spoil = functools.partial(HOWS[how], file)
        self.when, self.reads, self.done = when, 0, False

    def now(self, when: str) -> None:
        if when == self.when and not self.done:
            self.done = True
            self._spoil()

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        self.now(f"{type(event).__name__} {event.stage}")
        if f"reads of {event.stage}" in self.when and type(event).__name__ == "StageStarted":
            self.reads = 0
            self._stage = event.stage

    def read(self, *args: Any) -> int:
        count = PREADV(*args)
        self.reads += 1
        self.now(f"{self.reads} reads of {getattr(self, '_stage', '')}")
        return count


PREADV = os.preadv


def outcome(model: Path, folder: Path, case: str) -> dict[str, Any]:
    kind, how, when, options = case.split(" | ")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    folder = folder / str(os.getpid())
    folder.mkdir()
    state = {f"{n}.weight": torch.full((WIDTH, WIDTH), 0.02) for n in range(3)}
    weights, file = KINDS[kind](folder, state)
    if how == "rewrite_mapped":
        map_for_writing(file)
    spoiler = Spoiler(how, when, file)
    os.preadv = spoiler.read
    pipeline = refitkit.Pipeline(plugins=[spoiler])
    compiled = pipeline.load(model)
    x = torch.ones(1, WIDTH)
    before = bits(compiled(x))
    found: dict[str, Any] = {"error": "", "message": "", "file": file.name}
    try:
        pipeline.refit(compiled, weights, **json.loads(options))
    except refitkit.RefitError as exc:
        found["error"], found["message"] = type(exc).__name__, str(exc)
        found["message"] += "".join(getattr(exc, "__notes__", ()))
    found["spoilt"] = spoiler.done
    try:
        found["answers"] = "as before" if bits(compiled(x)) == before else "anew"
    except refitkit.ModuleLostError:
        found["answers"] = "never"
        return found
    new = all(bool((compiled.read(name) == 0.02).all()) for name in state)
    found["holds"] = "new" if new else "other"
    return found


def main() -> None:
    model, folder, *cases = sys.argv[1:]
    tasks = {case: functools.partial(outcome, Path(model), Path(folder), case) for case in cases}
    sys.stdout.write(json.dumps(each_in_a_process(tasks)))


if __name__ == "__main__":
    main()
