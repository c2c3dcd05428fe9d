"""The container: members by name, and files that are replaced whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from refitkit.errors import RefitError
from refitkit.files.archive import saying_why
from refitkit.files.replacing import replacing
from refitkit.recipe import Archive, ArchiveError, RefitPlan, write_archive
from tests.fakes import make_module, plan_for

MEMBERS = {"a": b"first", "b/c": b"second"}


def written(**members: bytes | Path) -> io.BytesIO:
    file = io.BytesIO()
    write_archive(file, members or MEMBERS)
    file.seek(0)
    return file


def test_members_are_found_by_name() -> None:
    with Archive(written()) as archive:
        assert sorted(archive.names()) == ["a", "b/c"]
        assert archive.size("a") == 5
        assert archive.read("a", 5) == b"first"


def test_unzip_can_read_it() -> None:
    with zipfile.ZipFile(written()) as other:
        assert other.testzip() is None
        assert {n: other.read(n) for n in other.namelist()} == MEMBERS


def test_the_same_members_give_the_same_bytes() -> None:
    assert written().getvalue() == written().getvalue()


def test_members_can_be_copied_in_from_files_and_out_again(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 10_000)
    with Archive(written(member=tmp_path / "in", other=b"y")) as archive:
        archive.extract("member", tmp_path / "out")
        assert archive.read("other", 1) == b"y"
    assert (tmp_path / "out").read_bytes() == b"x" * 10_000


def test_an_archive_is_read_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(written().getvalue())
    with Archive(tmp_path / "file") as archive:
        assert archive.read("a", 5) == b"first"


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    with Archive(written()) as archive:
        for ask in (
            lambda: archive.size("x"),
            lambda: archive.read("x", 9),
            lambda: archive.extract("x", tmp_path / "x"),
        ):
            with pytest.raises(ArchiveError, match="no member 'x'"):
                ask()
    assert not (tmp_path / "x").exists()


def test_a_member_that_is_larger_than_it_may_be() -> None:
    with Archive(written()) as archive, pytest.raises(ArchiveError, match="5 bytes, at most 4"):
        archive.read("a", 4)


def test_a_damaged_member(tmp_path: Path) -> None:
    content = written().getvalue().replace(b"first", b"fir5t")
    with Archive(io.BytesIO(content)) as archive:
        with pytest.raises(ArchiveError, match="'a' is damaged"):
            archive.read("a", 5)
        with pytest.raises(ArchiveError, match="'a' is damaged"):
            archive.extract("a", tmp_path / "a")
        assert archive.read("b/c", 9) == b"second"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError):
        Archive(tmp_path / "missing")


# -- replacing --------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_while_writing_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), fails)
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_data_is_on_disk_before_the_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave an empty file under the final name."""
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        size = os.fstat(handle).st_size if not path.exists() else -1
        order.append(("fsync", size))
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        order.append(("replace", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with replacing(path) as file:
        file.write(b"new")
    assert order == [("fsync", 3), ("replace", 3), ("fsync", -1)]


def test_two_writers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as one, replacing(path) as two:
        one.write(b"one")
        two.write(b"second")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = tmp_path / "plan", plan_for(make_module(1))
    old.save(path)

    def fails(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(KeyboardInterrupt):
        plan_for(make_module(2)).save(path)
    assert RefitPlan.load(path).data == old.data
    assert names(tmp_path) == ["plan"]


# -- saying why ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/x", r"there is no folder '.*missing'\.\nMake it first\."),
        ("file/x", r"there is no folder '.*file'"),
        ("folder", r"it is a folder\.\nName a file\."),
        ("x" * 300, "File name too long"),
        ("a\0b", "it is not a file name"),
    ],
)
def test_what_cannot_be_written_is_told_by_the_name_that_was_given(
    tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    path = tmp_path / name
    with pytest.raises(RefitError, match=why) as info, saying_why(path), replacing(path) as file:
        file.write(b"new")
    assert info.value.message.startswith(f"{str(path)!r} cannot be written: ")
    assert ".part" not in str(info.value)
    assert {one.name for one in tmp_path.rglob("*")} == {"folder", "file"}


def test_rights_and_other_errors_are_told() -> None:
    for error, why in (
        (PermissionError(13, "Permission denied", "x.part"), "not yours to write to"),
        (FileNotFoundError(2, "No such file", "x.part"), r"no file can be created in '\.'"),
        (OSError("the disk is gone"), "the disk is gone"),
    ):
        with (
            pytest.raises(RefitError, match=f"'x' cannot be written: .*{why}"),
            saying_why(Path("x")),
        ):
            raise error


def test_no_name_at_all() -> None:
    with pytest.raises(RefitError, match="not a file name"), saying_why(Path()):
        pytest.fail("it was written")


def test_a_plan_says_why(tmp_path: Path) -> None:
    plan = plan_for(make_module(2))
    with pytest.raises(RefitError, match="there is no folder"):
        plan.save(tmp_path / "missing" / "plan")
    with pytest.raises(RefitError, match="it is a folder"):
        plan.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
