"""Folders and files for a while: what is removed, by whom, and what never is."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.files import temporary
from refitkit.files.temporary import TemporaryFolder, part_file, part_folder, set_aside
from tests.forking import Child, forked
from tests.interrupting import in_new_thread

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

DEAD = "refitkit-0123456789abcdef.tmp"
DEAD_PART = ".refitkit-0123456789abcdef.part"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(folder: Path) -> Path:
    folder.mkdir()
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_bytes(b"x")
    return folder


# -- one that is used ---------------------------------------------------------------------------


def test_a_folder_is_private_and_goes_with_its_object(scratch: Path) -> None:
    folder = TemporaryFolder()
    (folder.path / "file").write_bytes(b"x")
    assert folder.path.parent == scratch
    assert folder.path.stat().st_mode & 0o777 == 0o700
    del folder
    gc.collect()
    assert names(scratch) == []


def test_a_folder_goes_at_the_end_of_a_block_and_with_a_failure(scratch: Path) -> None:
    def fail() -> None:
        with TemporaryFolder() as folder:
            (folder.path / "file").write_bytes(b"x")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert names(scratch) == []


def test_what_is_used_is_nobodys_litter(scratch: Path) -> None:
    """By this process, or by another one."""
    with TemporaryFolder() as folder, part_file(scratch, 0o600) as (part, _):
        before = names(scratch)
        with TemporaryFolder(), part_folder(scratch):
            assert set(before) < set(names(scratch))
        code = "import refitkit.files.temporary as t\nwith t.TemporaryFolder(): pass"
        environment = {**os.environ, "TMPDIR": str(scratch)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert names(scratch) == before
        assert folder.path.is_dir()
        assert part.is_file()


def test_locks_are_given_back(scratch: Path) -> None:
    """A process that makes many folders and files keeps none of them open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with TemporaryFolder(), part_folder(scratch), part_file(scratch, 0o600):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- litter -------------------------------------------------------------------------------------


def test_what_killed_processes_left_is_removed(scratch: Path) -> None:
    code = (
        "import os, sys, pathlib, refitkit.files.temporary as t\n"
        "folder = t.TemporaryFolder()\n"
        "(folder.path / 'file').write_bytes(b'x')\n"
        "file = t.part_file(pathlib.Path(sys.argv[1]), 0o400); file.__enter__()\n"
        "beside = t.part_folder(pathlib.Path(sys.argv[1])); beside.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", code, str(scratch)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(scratch)) == 3
    with TemporaryFolder():
        pass
    with part_file(scratch, 0o600):
        pass
    assert names(scratch) == []


@pytest.mark.parametrize(
    "name",
    [
        "refitkit-demo",
        "refitkit-0123456789abcdef",
        "refitkit-0123456789abcdeg.tmp",
        "refitkit-0123456789abcdef.tmp.old",
        ".model.refitkit.0123456789ab.part",
        "xrefitkit-0123456789abcdef.tmp",
    ],
)
def test_names_of_others_are_left_alone(scratch: Path, name: str) -> None:
    full(scratch / name)
    with TemporaryFolder(), part_file(scratch, 0o600):
        pass
    assert names(scratch) == [name]


def test_links_and_pipes_with_our_names_lead_nowhere(scratch: Path) -> None:
    kept = full(scratch / "kept")
    (scratch / DEAD).symlink_to(kept)
    (scratch / DEAD_PART).symlink_to(kept / "deep" / "file")
    os.mkfifo(scratch / DEAD_PART.replace("0", "1"))
    with TemporaryFolder(), part_file(scratch, 0o600):
        pass
    assert (kept / "deep" / "file").read_bytes() == b"x"


def test_folders_of_other_users_are_left_alone(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(scratch / DEAD)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with TemporaryFolder():
        pass
    assert names(scratch) == [DEAD]


def test_where_there_are_no_locks_nothing_is_removed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(scratch / DEAD)

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with TemporaryFolder() as folder, part_file(scratch, 0o600) as (part, _):
        assert folder.path.is_dir()
        assert part.is_file()
    assert names(scratch) == [DEAD]


def test_a_folder_that_cannot_be_listed_can_be_written_to(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterator[object]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with part_file(scratch, 0o600) as (part, _):
        assert part.is_file()
    assert not part.exists()


# -- races --------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "locked"])
def test_what_is_swept_before_it_was_locked_is_made_again(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """Whoever sweeps may come between making something and locking it."""
    real, swept = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not swept:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            swept.append(path)
            other = os.open(path, os.O_RDONLY)
            real(other, fcntl.LOCK_EX)
            if removed:
                path.rmdir() if path.is_dir() else path.unlink()
                os.close(other)
            else:
                opened.append(other)
        real(handle, how)

    opened: list[int] = []
    monkeypatch.setattr(fcntl, "flock", late)
    for make in (part_folder(scratch), part_file(scratch, 0o600)):
        swept.clear()
        with make as made:
            path = made if isinstance(made, Path) else made[0]
            assert path != swept[0]
            assert names(scratch) == [path.name]
    for handle in opened:
        os.close(handle)


def test_a_failure_to_lock_leaves_nothing(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupted)
    for make in (part_folder(scratch), part_file(scratch, 0o600)):
        with pytest.raises(KeyboardInterrupt):
            make.__enter__()
    with pytest.raises(KeyboardInterrupt):
        TemporaryFolder()
    assert names(scratch) == []


# -- forks --------------------------------------------------------------------------------------


def in_child(code: str, scratch: Path) -> None:
    """Run code that forks, in a process of its own, with this folder for temporary files."""
    environment = {**os.environ, "TMPDIR": str(scratch)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_fork_that_ends_removes_nothing(scratch: Path) -> None:
    in_child(
        "import os, refitkit.files.temporary as t\n"
        "folder = t.TemporaryFolder()\n"
        "child = os.fork()\n"
        "if not child: raise SystemExit\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert folder.path.is_dir()\n",
        scratch,
    )
    assert names(scratch) == []


def test_a_fork_keeps_the_folder_of_a_parent_that_was_killed(scratch: Path) -> None:
    """Until it ends itself, which nobody has to be told."""
    code = (
        "import os, sys, refitkit.files.temporary as t\n"
        "folder = t.TemporaryFolder()\n"
        "if os.fork():\n"
        "    os.kill(os.getpid(), 9)\n"
        "print(folder.path, flush=True)\n"
        "sys.stdin.read()\n"
        "os._exit(0)\n"
    )
    environment = {**os.environ, "TMPDIR": str(scratch)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    path = Path(parent.stdout.readline().strip())
    assert parent.wait() == -signal.SIGKILL
    with TemporaryFolder():
        assert path.is_dir()
    parent.stdin.close()
    assert parent.stdout.read() == ""  # the fork has ended
    parent.stdout.close()
    with TemporaryFolder():
        assert not path.exists()


@pytest.mark.parametrize("exits", [False, True], ids=["dropped", "dropped at exit"])
def test_a_folder_lasts_as_long_as_a_fork_that_outlives_its_parent(
    exits: bool, scratch: Path
) -> None:
    folders = [TemporaryFolder()]
    path = folders[0].path
    (path / "file").touch()
    reading, writing = os.pipe()

    def use() -> bool:
        os.close(writing)
        os.read(reading, 1)
        found = (path / "file").exists()
        folders.clear()
        gc.collect()
        return found

    child = Child(use, exits=exits)
    os.close(reading)
    folders.clear()
    gc.collect()
    assert names(scratch) == [path.name]
    os.close(writing)
    assert child.answer() is True
    assert names(scratch) == []


@pytest.mark.parametrize("exits", [False, True], ids=["_exit", "exit"])
def test_a_fork_that_drops_a_folder_leaves_it_to_its_parent(exits: bool, scratch: Path) -> None:
    folders = [TemporaryFolder()]

    def drop() -> None:
        folders.clear()
        gc.collect()

    forked(drop, exits=exits)
    assert names(scratch) == [folders[0].path.name]
    folders.clear()
    assert names(scratch) == []


def test_without_locks_the_process_that_made_a_folder_removes_it(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(temporary.fcntl, "flock", none)
    folders = [TemporaryFolder()]
    forked(folders.clear, exits=True)
    assert names(scratch) == [folders[0].path.name]
    folders.clear()
    assert names(scratch) == []


@pytest.mark.parametrize("part", [part_folder, lambda parent: part_file(parent, 0o600)])
def test_a_fork_that_leaves_a_part_leaves_it_to_its_parent(part: Any, scratch: Path) -> None:
    """A listener that is told of progress and forks, say."""
    context = part(scratch)
    made = context.__enter__()
    path = made if isinstance(made, Path) else made[0]
    assert forked(lambda: context.__exit__(SystemExit, SystemExit(), None)) is False
    assert path.exists()
    context.__exit__(None, None, None)
    assert names(scratch) == []


def test_a_daemon_that_closed_all_files_closes_none_of_others(scratch: Path) -> None:
    in_child(
        "import os, refitkit.files.temporary as t\n"
        "folder = t.TemporaryFolder()\n"
        "os.closerange(3, 100)\n"
        "others = [os.open('/dev/null', os.O_RDONLY) for _ in range(50)]\n"
        "del folder\n"
        "for one in others: os.close(one)\n",
        scratch,
    )
    assert names(scratch) == []


# -- folders that are set aside -----------------------------------------------------------------


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_set_aside_is_put_back_if_nothing_took_its_place(
    scratch: Path, replaced: bool
) -> None:
    litter = full(scratch / DEAD_PART)
    set_aside(full(scratch / "module"), litter)
    if replaced:
        (scratch / "module").mkdir()
    with part_file(scratch, 0o600):
        pass
    assert names(scratch) == ["module"]
    assert (scratch / "module" / "deep" / "file").exists() is not replaced


def test_what_cannot_be_put_back_stays(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(full(scratch / "module"), full(scratch / DEAD_PART))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with part_file(scratch, 0o600):
            pass
    assert names(scratch) == [DEAD_PART]
    assert (scratch / DEAD_PART / temporary._ASIDE / "module" / "deep" / "file").exists()


# -- interrupts ---------------------------------------------------------------------------------


class Interrupter:
    """Raises KeyboardInterrupt before one of the instructions that the module runs."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != temporary.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count - 1 == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def created(scratch: Path, at: int | None) -> tuple[int, BaseException | None]:
    """Create a file with an interrupt; the number of instructions, and the error."""
    return in_new_thread(lambda: _created(scratch, at))


def _created(scratch: Path, at: int | None) -> tuple[int, BaseException | None]:
    interrupter, tracer = Interrupter(at), sys.gettrace()
    error: BaseException | None = None
    sys.settrace(interrupter)
    try:
        _, file = temporary._create_file(scratch, 0o600)
        file.close()
    except BaseException as exc:  # noqa: BLE001 - it is looked at
        error = exc
    finally:
        sys.settrace(tracer)
    return interrupter.count, error


# an interrupt before the file has a name frees it, which closes it, with a warning
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_file_interrupted_at_any_instruction_has_one_owner(scratch: Path) -> None:
    """The interrupt comes out, and not the failure of a second close."""
    count, error = created(scratch, None)
    assert error is None
    assert count > 50
    gc.collect()
    gc.freeze()  # else each collection looks at all objects of all tests before
    try:
        for at in range(count):
            _, error = created(scratch, at)
            assert type(error) is KeyboardInterrupt, (at, error)
            del error  # its traceback holds the file
            gc.collect()
    finally:
        gc.unfreeze()
