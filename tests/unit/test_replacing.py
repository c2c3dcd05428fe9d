"""Files and folders that replace others: rights, links, what is on disk, what a crash leaves."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from refitkit.errors import RefitError
from refitkit.files import replacing as module
from refitkit.files.archive import saying_why
from refitkit.files.replacing import replacing, replacing_folder


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


# -- rights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444, 0o400, 0o755])
def test_a_file_keeps_the_mode_of_the_one_that_it_replaces(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert (mode_of(path), path.read_bytes()) == (mode, b"new")


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    write(tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o644


def test_nobody_else_can_read_what_replaces_a_private_file_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with replacing(path) as file:
        file.write(b"new")
        assert {mode_of(one) for one in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize(("mode", "left"), [(0o640, 0o600), (0o664, 0o644), (0o666, 0o666)])
def test_another_group_gets_no_rights_that_others_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, left: int
) -> None:
    """The group of a file cannot always be kept."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    real = os.fstat

    def of_another_group(handle: int) -> os.stat_result:
        found = list(real(handle))
        found[stat.ST_GID] += 1
        return os.stat_result(found)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fstat", of_another_group)
        patch.setattr(module.os, "fchown", refuse)
        with path.open("rb+") as file:
            module._copy_rights(file.fileno(), path, path.stat())
    assert mode_of(path) == left


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_keeps_the_owner_and_the_group(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def test_an_access_list_is_kept_or_the_group_loses_its_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    kept: list[tuple[str, bytes]] = []
    monkeypatch.setattr(os, "getxattr", lambda *_: b"a list")
    with monkeypatch.context() as patch:
        patch.setattr(os, "setxattr", lambda _, name, value: kept.append((name, value)))
        write(path)
    assert (mode_of(path), kept) == (0o640, [("system.posix_acl_access", b"a list")])

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    write(path)
    assert mode_of(path) == 0o600


# -- links --------------------------------------------------------------------------------------


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_bytes(b"old")
    (tmp_path / "middle").symlink_to("there/file")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"
    assert names(tmp_path / "there") == ["file"]


def test_a_link_to_a_file_that_is_not_there_makes_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing/file")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("link", "there is no folder '.*missing'"), ("loop", "symbolic links")):
        with (
            pytest.raises(RefitError, match=f"{name}' cannot be written: .*{why}"),
            saying_why(tmp_path / name),
        ):
            write(tmp_path / name)
    assert names(tmp_path) == ["link", "loop"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RefitError, match="it is a device, a pipe or a socket"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["pipe"]


# -- what is on disk ----------------------------------------------------------------------------


def test_a_folder_that_cannot_be_opened_is_synced_with_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files can be made in a folder whose names cannot be listed."""
    real, synced = os.open, []

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "sync", lambda: synced.append((tmp_path / "file").read_bytes()))
    write(tmp_path / "file")
    assert synced == [b"new"]


def test_a_file_system_that_syncs_no_folders_is_synced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "sync", lambda: synced.append((tmp_path / "file").read_bytes()))
    write(tmp_path / "file")
    assert synced == [b"new"]


# -- folders ------------------------------------------------------------------------------------


def fill(path: Path, content: bytes) -> None:
    with replacing_folder(path) as folder:
        (folder / "a").write_bytes(content)
        (folder / "b").write_bytes(content)


def stop_halfway(path: Path) -> None:
    with replacing_folder(path) as folder:
        (folder / "a").write_bytes(b"half")
        raise KeyboardInterrupt


def test_a_folder_replaces_another_with_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "module"
    fill(path, b"old")
    assert (mode_of(path), mode_of(path / "a")) == (0o755, 0o644)
    (path / "c").write_bytes(b"old")
    path.chmod(0o750)
    (path / "a").chmod(0o600)
    (tmp_path / "link").symlink_to("module")
    fill(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert {one.name: one.read_bytes() for one in path.iterdir()} == {"a": b"new", "b": b"new"}
    assert (mode_of(path), mode_of(path / "a"), mode_of(path / "b")) == (0o750, 0o600, 0o644)
    assert names(tmp_path) == ["link", "module"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "module").mkdir(0o700)
    fill(tmp_path / "module", b"new")
    assert mode_of(tmp_path / "module") == 0o700
    assert names(tmp_path / "module") == ["a", "b"]


def test_all_of_a_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order, real = tmp_path / "module", [], os.fsync

    def synced(handle: int) -> None:
        found = Path(f"/proc/self/fd/{handle}").readlink()
        order.append((found.name, path.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", synced)
    fill(path, b"new")
    assert sorted(order[:2]) == [("a", False), ("b", False)]
    assert order[2:] == [("module", False), (tmp_path.name, True)]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failure_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    path = tmp_path / "module"
    fill(path, b"old")
    if not exchange:
        monkeypatch.setattr(module, "_try_exchange", lambda *_: False)
    real = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == path and self.parent.name != ".aside" and path.exists() is exchange:
            raise OSError(errno.EIO, "no")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="no"):
            fill(path, b"new")
    with pytest.raises(KeyboardInterrupt):
        stop_halfway(path)
    assert {one.read_bytes() for one in path.iterdir()} == {b"old"}
    assert names(tmp_path) == ["module"]
    fill(path, b"new")
    assert {one.read_bytes() for one in path.iterdir()} == {b"new"}
    assert names(tmp_path) == ["module"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_a_process_killed_at_any_rename_leaves_a_whole_folder(
    tmp_path: Path, exchange: bool, rename: int
) -> None:
    path = tmp_path / "module"
    fill(path, b"old")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import refitkit.files.replacing as r\n"
        "left, real = int(sys.argv[2]), Path.rename\n"
        "def rename(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), 9)\n"
        "    return real(self, target)\n"
        "Path.rename = rename\n"
        "if sys.argv[3] == 'False': r._try_exchange = lambda *_: False\n"
        "with r.replacing_folder(Path(sys.argv[1])) as folder:\n"
        "    for name in 'ab': (folder / name).write_bytes(b'new')\n"
    )
    command = [sys.executable, "-c", code, str(path), str(rename), str(exchange)]
    subprocess.run(command, check=False)
    write(tmp_path / "other")
    assert names(tmp_path) == ["module", "other"]
    assert len({one.read_bytes() for one in path.iterdir()}) == 1
    assert names(path) == ["a", "b"]
