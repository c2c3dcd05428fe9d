"""Files of weights that are rewritten while they are open: of one version, or an error.

What sets times back, and what leaves them as they are: see ``refitkit.builtin.weights.reading``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import refitkit
from refitkit.builtin.weights import reading
from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from refitkit.protocols import SupportsReread
from refitkit.recipe.sources import require_reread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STATE = {"a": torch.full((300,), 0.5), "b": torch.full((300,), 0.5)}
OLD, NEW = (struct.pack("<f", value) for value in (0.5, 0.75))


def safetensors(folder: Path) -> tuple[Any, list[Path]]:
    save_file(STATE, folder / "w.safetensors")
    return folder / "w.safetensors", [folder / "w.safetensors"]


def zipped(folder: Path) -> tuple[Any, list[Path]]:
    torch.save(STATE, folder / "w.pt")
    return folder / "w.pt", [folder / "w.pt"]


def sharded(folder: Path) -> tuple[Any, list[Path]]:
    for name, value in STATE.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    home = {name: f"{name}.safetensors" for name in STATE}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder, [folder / file for file in home.values()]


def distributed(folder: Path) -> tuple[Any, list[Path]]:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(dict(STATE), checkpoint_id=folder, no_dist=True)
    return folder, list(folder.glob("*.distcp"))


def averaged(folder: Path) -> tuple[Any, list[Path]]:
    path, files = safetensors(folder)
    return refitkit.WeightedAverage([(path, 1.0), (STATE, 1.0)]), files


KINDS = [safetensors, zipped, sharded, distributed, averaged]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
MAPPED = [kind for kind in KINDS if kind is not distributed]  # that has checksums, which are wrong


def rewritten(file: Path) -> None:
    """Other values in place; size and modification time are as before."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(file.read_bytes().replace(OLD, NEW))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def mapped() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Maps a file for writing, writes to all pages, and gives what changes the values there."""
    maps: list[mmap.mmap] = []

    def map_(file: Path) -> Callable[[], None]:
        with file.open("r+b") as stream:
            there = mmap.mmap(stream.fileno(), 0)
        maps.append(there)
        there[:] = there[:]
        before = file.stat()

        def rewrite() -> None:
            there[:] = there[:].replace(OLD, NEW)
            assert file.stat().st_ctime_ns == before.st_ctime_ns  # nothing shows it

        return rewrite

    yield map_
    for one in maps:
        one.close()


def opened(weights: Any) -> Any:
    return Pipeline().open_weights(weights)


def require_refused(ask: Callable[[], object], *files: Path) -> SourceError:
    with pytest.raises(SourceError, match="was changed since it was opened") as info:
        ask()
    assert {problem.subject for problem in info.value.problems} <= {file.name for file in files}
    assert "os.replace" in info.value.hint
    return info.value


# -- the times of a file --------------------------------------------------------------------------


@every_kind
def test_setting_the_time_back_hides_nothing(kind: Any, tmp_path: Path) -> None:
    weights, files = kind(tmp_path)
    source = opened(weights)
    assert source.get("a").eq(0.5).all()
    for file in files:
        rewritten(file)
    for ask in (lambda: source.get("b"), source.require_unchanged, source.reread):
        (problem, *_) = require_refused(ask, *files).problems
        assert problem.kind == "changed"
        assert "time set back" in problem.hint


@every_kind
def test_an_index_is_part_of_a_checkpoint(kind: Any, tmp_path: Path) -> None:
    weights, _ = kind(tmp_path)
    tables = [*tmp_path.glob("*.index.json"), *tmp_path.glob(".metadata")]
    source = opened(weights)
    for table in tables:
        rewritten(table)
        require_refused(source.require_unchanged, table)
    assert len(tables) == (kind in {sharded, distributed})


@every_kind
@pytest.mark.parametrize("how", ["link", "unlink", "replace"])
def test_names_of_a_file_are_no_matter(kind: Any, how: str, tmp_path: Path) -> None:
    """They move the change time, too: then the bytes are compared."""
    weights, files = kind(tmp_path)
    source = opened(weights)
    source.get("a")
    for file in files:
        if how == "link":
            os.link(file, f"{file}.backup")
        elif how == "unlink":
            file.unlink()
        else:
            other = file.with_name("other")
            other.write_bytes(file.read_bytes())
            other.replace(file)
    if how != "link" and kind in {sharded, distributed}:  # of two checkpoints, perhaps
        require_refused(source.require_unchanged, *files)
        return
    assert source.get("b").eq(0.5).all()
    source.require_unchanged()


@pytest.mark.parametrize("kind", [safetensors, averaged])
def test_names_hide_no_writing(kind: Any, tmp_path: Path) -> None:
    weights, (file,) = kind(tmp_path)
    source = opened(weights)
    source.get("a")
    rewritten(file)
    file.unlink()
    source.get("b")  # nobody can say yet that it is another version
    require_refused(source.require_unchanged, file)


def test_rights_are_taken_for_content(tmp_path: Path) -> None:
    """Nobody can tell a change of rights from a write whose time was set back."""
    path, (file,) = safetensors(tmp_path)
    source = opened(path)
    file.chmod(0o640)
    require_refused(lambda: source.get("a"), file)


# -- the bytes of a file --------------------------------------------------------------------------


@pytest.fixture
def nobody_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with files of other users, or in a network: who writes to them is not known."""
    monkeypatch.setattr(reading, "open_for_writing", lambda _fd: False)


@pytest.mark.parametrize("kind", MAPPED)
@pytest.mark.usefixtures("nobody_seen")
def test_who_reads_twice_reads_the_same(kind: Any, tmp_path: Path, mapped: Any) -> None:
    weights, files = kind(tmp_path)
    rewrites = [mapped(file) for file in files]
    source = opened(weights)
    assert source.get("a").eq(0.5).all()
    for rewrite in rewrites:
        rewrite()
    require_refused(lambda: source.get("a").sum(), *files)


@pytest.mark.usefixtures("nobody_seen")
def test_pieces_are_the_same_whoever_reads_them(tmp_path: Path, mapped: Any) -> None:
    """The verifier reads a tensor as a whole, an engine in pieces."""
    save_file({"w": torch.full((3 << 20,), 0.5)}, tmp_path / "w.safetensors")
    rewrite = mapped(tmp_path / "w.safetensors")
    source = opened(tmp_path / "w.safetensors")
    source.get("w")
    assert sum(piece.numel() for piece in source.pieces("w")) == 3 << 20
    into = torch.zeros(3 << 20)
    assert sum(piece.numel() for piece in source.pieces("w", into)) == 3 << 20
    assert into.eq(0.5).all()
    rewrite()
    require_refused(lambda: list(source.pieces("w")), tmp_path / "w.safetensors")
    require_refused(lambda: list(source.pieces("w", into)), tmp_path / "w.safetensors")
    require_refused(lambda: source.get("w"), tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", MAPPED)
def test_a_mapping_that_somebody_has_is_seen(kind: Any, tmp_path: Path, mapped: Any) -> None:
    """All is read a second time, as no time of the file shows when it is written to."""
    weights, files = kind(tmp_path)
    rewrites = [mapped(file) for file in files]
    source = opened(weights)
    assert source.get("a").eq(0.5).all()
    for rewrite in rewrites:
        rewrite()
    source.get("b")
    require_refused(source.require_unchanged, *files)


@pytest.mark.parametrize("kind", MAPPED)
@pytest.mark.usefixtures("nobody_seen")
def test_a_second_reading_on_request(kind: Any, tmp_path: Path, mapped: Any) -> None:
    weights, files = kind(tmp_path)
    rewrites = [mapped(file) for file in files]
    source = opened(weights)
    assert isinstance(source, SupportsReread)
    source.get("a")
    source.reread()
    for rewrite in rewrites:
        rewrite()
    source.get("b")
    source.require_unchanged()  # does not see it
    require_refused(source.reread, *files)
    require_refused(lambda: require_reread(source), *files)


@pytest.mark.usefixtures("nobody_seen")
def test_a_file_that_is_read_as_a_whole_can_be_read_again(tmp_path: Path, mapped: Any) -> None:
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    rewrite = mapped(tmp_path / "w.pt")
    source = opened(tmp_path / "w.pt")
    source.reread()
    rewrite()
    require_refused(source.reread, tmp_path / "w.pt")
    assert source.get("a").eq(0.5).all()


@every_kind
def test_a_file_that_is_open_for_writing_can_be_read(kind: Any, tmp_path: Path) -> None:
    weights, files = kind(tmp_path)
    streams = [file.open("r+b") for file in files]
    source = opened(weights)
    for name in STATE:
        assert source.get(name).eq(0.5).all()
    source.require_unchanged()
    for stream in streams:
        stream.close()


# -- who has it open ------------------------------------------------------------------------------


def asked(path: Path) -> bool:
    with path.open("rb") as stream:
        return reading.open_for_writing(stream.fileno())


def test_who_has_a_file_open_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(4096))
    assert not asked(path)
    with path.open("r+b") as stream:
        assert asked(path)
        there = mmap.mmap(stream.fileno(), 0)
    assert asked(path)  # mapped, though closed
    there.close()
    with path.open("rb"):
        assert not asked(path)
    with path.open("rb") as stream:
        assert not reading.open_for_writing(stream.fileno())
        path.write_bytes(b"new")  # nobody waits for a lease


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL, errno.ENOSYS])
def test_where_nobody_can_tell(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    path, _ = safetensors(tmp_path)
    monkeypatch.setattr(fcntl, "fcntl", refuses)
    with path.open("r+b"):
        assert not asked(path)
        opened(path).require_unchanged()


# -- what a refit asks for ------------------------------------------------------------------------


class Changing:
    """A third party's file."""

    description = "a file of another plugin"

    def require_unchanged(self) -> None:
        """Nothing is ever wrong with it."""


def test_a_source_that_cannot_be_read_again() -> None:
    source: Any = Changing()
    with pytest.raises(
        SourceError, match="a file of another plugin cannot be read a second time"
    ) as info:
        require_reread(source)
    assert "reread" in info.value.hint
    require_reread(opened(STATE))  # memory is no file
