"""What the system refuses is reported as that, whoever met it, and as nobody's fault."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit import errors
from refitkit.cli import main
from refitkit.cli.files import check_output
from refitkit.errors import PluginError, RefitError, ResourceError, raised_as, resource_error
from refitkit.files.archive import saying_why
from refitkit.files.file_state import stat_of
from refitkit.files.replacing import replacing
from refitkit.files.temporary import TemporaryFolder, part_file
from refitkit.pipeline.history import LoadOrigin
from refitkit.program.keep import KeptProgram
from refitkit.recipe import Archive, ArchiveError, write_archive
from tests.faulting import Faults

if TYPE_CHECKING:
    from collections.abc import Callable

CODES = sorted(set(errors._HINTS) - {errno.ENOENT})
STATE = {"a": torch.ones(2, 3), "b": torch.zeros(4)}


def fault(code: int, path: str = "") -> OSError:
    return OSError(code, os.strerror(code), *([path] if path else []))


def fails(code: int) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> None:
        raise fault(code)

    return failing


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def number_of(run: Callable[[], object], name: str, last: bool = False) -> int:
    """The first or last call of this name, among those that something makes."""
    run()  # what is cached is cached then
    with Faults() as faults:
        run()
    found = [number for number, call in enumerate(faults.calls) if call == name]
    return found[-1 if last else 0]


# -- what an exception is -----------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_every_error_of_the_system_has_its_reason_its_file_and_a_hint(code: int) -> None:
    error = resource_error(fault(code, "/some/file"), "'x' cannot be read")
    assert error is not None
    assert error.message == f"'x' cannot be read: {os.strerror(code)}: '/some/file'."
    assert error.hint
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize(
    ("exc", "reason"),
    [
        (MemoryError(), "Cannot allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory. Tried to"),
        (RuntimeError("C++ compile error\nld: No space left on device"), "No space left on device"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (ImportError("libx.so: Too many open files"), "libx.so: Too many open files"),
        (FileNotFoundError("No usable temporary directory found"), "No usable temporary directory"),
    ],
)
def test_libraries_say_it_in_their_own_ways(exc: Exception, reason: str) -> None:
    error = resource_error(exc, "It cannot be done")
    assert error is not None
    assert reason in error.message
    assert error.hint


def test_torch_without_memory() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(1 << 60, dtype=torch.uint8)
    error = resource_error(info.value, "A tensor cannot be made")
    assert error is not None
    assert "memory" in error.message


@pytest.mark.parametrize(
    "exc",
    [
        OSError("not a gzip file"),
        fault(errno.EINVAL),
        fault(errno.ENOENT, "/gone"),
        fault(errno.EISDIR, "/folder"),
        ValueError("Permission denied"),
        RuntimeError("shapes differ"),
    ],
    ids=repr,
)
def test_all_else_is_something_else(exc: Exception) -> None:
    assert resource_error(exc, "It cannot be done") is None
    with (
        pytest.raises(PluginError, match="The plugin failed"),
        raised_as(PluginError, "The plugin failed"),
    ):
        raise exc


def test_what_an_exception_was_raised_from_counts() -> None:
    exc = ValueError("it did not work")
    exc.__cause__ = MemoryError()
    error = resource_error(exc, "It cannot be done")
    assert error is not None
    assert error.__cause__ is exc
    assert resource_error(error, "Something else") is error


def test_what_was_met_meanwhile_does_not_count() -> None:
    exc = ValueError("a fault of its own")
    exc.__context__ = fault(errno.EACCES)
    assert resource_error(exc, "It cannot be done") is None
    hiding = zipfile.BadZipFile("not a zip file")
    hiding.__context__ = fault(errno.EIO)
    assert resource_error(hiding, "It cannot be read") is not None


# -- who meets it -------------------------------------------------------------------------------


@pytest.mark.parametrize("exc", [MemoryError(), fault(errno.ENOSPC, "/x"), fault(errno.EMFILE)])
def test_it_is_no_plugins_fault(exc: Exception) -> None:
    class Reader:
        name = "reader"

        @refitkit.hookimpl
        def refitkit_load_weights(self, source: object) -> None:
            raise exc

    with pytest.raises(ResourceError) as info:
        refitkit.Pipeline(plugins=[Reader()]).open_weights(STATE)
    assert "The plugin" not in str(info.value)
    assert "refitkit_load_weights of 'reader'" in info.value.message


def test_a_strategy_that_finds_no_memory_is_not_blamed() -> None:
    with (
        pytest.raises(ResourceError, match="Values cannot be had: Cannot allocate memory"),
        raised_as(PluginError, "The strategy failed", doing="Values cannot be had"),
    ):
        raise MemoryError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with replacing(tmp_path / "archive") as file:
        write_archive(file, {"member": b"x" * 100_000})
    return tmp_path / "archive"


@pytest.mark.parametrize("name", ["open", "write"])
def test_a_full_disk_is_no_damaged_archive(name: str, archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "member"
    with Archive(archive) as opened:
        at = number_of(lambda: opened.extract("member", to), name)
        with (
            pytest.raises(ResourceError, match="member' cannot be written: No space left") as info,
            Faults(at, errno.ENOSPC),
        ):
            opened.extract("member", to)
    assert "TMPDIR" in info.value.hint


def test_a_folder_that_is_gone_is_no_damaged_archive(archive: Path, tmp_path: Path) -> None:
    with (
        Archive(archive) as opened,
        pytest.raises(ResourceError, match="cannot be written: No such"),
    ):
        opened.extract("member", tmp_path / "gone" / "member")


def test_a_failing_disk_is_no_damaged_archive(archive: Path) -> None:
    def read() -> None:
        with Archive(archive) as opened:
            opened.read("member", 1 << 20)

    with Faults() as faults:
        read()
    for at, name in enumerate(faults.calls):
        if name in {"open", "read"}:
            with (
                pytest.raises(ResourceError, match="archive' cannot be read: Input/output error"),
                Faults(at, errno.EIO),
            ):
                read()


def test_a_damaged_archive_is_one(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match="not a readable archive"):
        Archive(archive)


def test_what_fails_while_an_archive_is_written_is_what_is_raised(tmp_path: Path) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            if len(data) > 1000:
                raise fault(errno.ENOSPC)
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    with (
        pytest.raises(ResourceError, match="No space left"),
        saying_why(tmp_path / "x"),
        (tmp_path / "x").open("wb") as file,
    ):
        write_archive(Full(file), {"a": b"x" * 5000})  # type: ignore[arg-type]


def test_a_file_that_was_read_is_named_when_it_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "elsewhere" / "library.so"
    with (
        pytest.raises(ResourceError, match=r"x' cannot be written: No such file .*library\.so"),
        saying_why(tmp_path / "x"),
    ):
        gone.read_bytes()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_looked_at_is_not_missing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    assert stat_of(path) is not None
    assert stat_of(tmp_path / "none") is None
    assert stat_of(tmp_path / ("x" * 300)) is None
    assert stat_of(Path("a\0b")) is None
    monkeypatch.setattr(Path, "stat", fails(code))
    with pytest.raises(ResourceError, match=os.strerror(code)):
        stat_of(path)
    with pytest.raises(ResourceError, match=os.strerror(code)):
        refitkit.Pipeline().open_weights(str(path))


def test_a_checkpoint_is_not_called_incomplete(tmp_path: Path) -> None:
    """Readers that list all that is wrong with a checkpoint do not list this."""
    save_file(STATE, tmp_path / "one.safetensors")
    index = '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    pipeline = refitkit.Pipeline()
    pipeline.open_weights(tmp_path)
    with Faults() as faults:
        pipeline.open_weights(tmp_path)
    for at, name in enumerate(faults.calls):
        if name in {"open", "preadv"}:
            with (
                pytest.raises(ResourceError, match="Input/output error") as info,
                Faults(at, errno.EIO),
            ):
                pipeline.open_weights(tmp_path)
            assert "whole" not in str(info.value)


def test_checks_of_torchs_files_are_not_left_out(tmp_path: Path) -> None:
    """A fault while a file is looked at does not make it one that is looked at less."""
    torch.save(STATE, tmp_path / "w.pt")
    pipeline = refitkit.Pipeline()
    at = number_of(lambda: pipeline.open_weights(tmp_path / "w.pt"), "preadv")
    with (
        pytest.raises(ResourceError, match=r"w\.pt' cannot be read: Input/output error"),
        Faults(at, errno.EIO),
    ):
        pipeline.open_weights(tmp_path / "w.pt")


def test_weights_are_not_taken_for_a_module(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    pipeline = refitkit.Pipeline()
    with (
        pytest.raises(ResourceError, match="cannot be read: Too many open files"),
        Faults(
            number_of(lambda: pipeline.open_weights(tmp_path / "w.safetensors"), "open"),
            errno.EMFILE,
        ),
    ):
        pipeline.diff(tmp_path / "w.safetensors", STATE)


def test_an_origin_is_not_called_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "module"
    path.write_bytes(b"x")
    origin = LoadOrigin.of(path)
    assert origin is not None
    origin.require_unchanged()
    monkeypatch.setattr(Path, "stat", fails(errno.EIO))
    assert not origin.is_unchanged()
    with pytest.raises(ResourceError, match="Input/output error"):
        origin.require_unchanged()
    with pytest.raises(ResourceError, match="Input/output error"):
        LoadOrigin.of(path)


def test_a_program_is_kept_or_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    assert KeptProgram.of(program) is not None
    from torch._export.serde import serialize

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(serialize.ExportedProgramSerializer, "serialize", full)
    with pytest.raises(ResourceError, match="The program cannot be kept: Cannot allocate memory"):
        KeptProgram.of(program)


# -- temporary files ----------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["mkdir", "open", "fstat"])
def test_a_folder_that_cannot_be_made_leaves_nothing(name: str, scratch: Path) -> None:
    with Faults() as faults:
        made = TemporaryFolder()
    calls = faults.calls
    del made
    gc.collect()
    before = descriptors()
    for at in range(calls.index("mkdir"), len(calls)):
        if calls[at] == name:
            with (
                pytest.raises(ResourceError, match="No temporary folder can be created: "),
                Faults(at, errno.EMFILE, lasting=True),
            ):
                TemporaryFolder()
            assert list(scratch.iterdir()) == []
            assert descriptors() == before


def test_no_folder_for_temporary_files(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "none"))
    with pytest.raises(ResourceError, match=r"No such file or directory: '.*none") as info:
        TemporaryFolder()
    assert "TMPDIR" in info.value.hint


def test_a_file_that_cannot_be_locked_leaves_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", fails(errno.EIO))
        with pytest.raises(OSError, match="Input/output"), part_file(scratch, 0o600):
            pytest.fail("it was made")
    assert list(scratch.iterdir()) == []
    assert descriptors() == before


# -- commands -----------------------------------------------------------------------------------


def test_a_machine_without_memory_is_no_bug() -> None:
    assert main.exit_code(MemoryError()) == main.REFUSED
    text = "\n".join(main.as_lines(MemoryError()))
    assert "Cannot allocate memory" in text
    assert "bug" not in text


def test_a_command_says_what_to_do() -> None:
    assert "Free space" in main.as_refit_error(fault(errno.ENOSPC, "/x")).hint


def test_an_output_on_a_file_system_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(tempfile, "TemporaryFile", fails(errno.EROFS))
    with pytest.raises(ResourceError, match="Read-only file system"):
        check_output(tmp_path / "out")


def test_a_program_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    from refitkit.cli.files import load_program

    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive_format", "pt2")
    with pytest.raises(RefitError):
        load_program(path)
    at = number_of(lambda: zipfile.ZipFile(path).close(), "read")
    with pytest.raises(ResourceError, match="Input/output error"), Faults(at + 4, errno.EIO):
        load_program(path)
