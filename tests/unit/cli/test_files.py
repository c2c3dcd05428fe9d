"""What is checked of files before anything that takes long."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

from refitkit.cli.files import (
    check_output,
    check_readable,
    load_inputs,
    load_plan,
    load_program,
)
from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    RefitError,
    SourceError,
    UnsupportedTargetError,
)
from refitkit.pipeline import Pipeline


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


# -- reading ------------------------------------------------------------------------------------


def test_files_and_names_of_nothing_are_readable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_readable(tmp_path / "file", SourceError)
    check_readable(tmp_path, SourceError)
    check_readable("zeros:8", SourceError)


def test_devices_are_not_read() -> None:
    with pytest.raises(SourceError, match="not a file"):
        check_readable("/dev/zero", SourceError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0)
    with pytest.raises(SourceError, match="permission denied"):
        check_readable(tmp_path / "file", SourceError)


def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SourceError, match="permission denied"):
        check_readable(tmp_path, SourceError)


# -- writing ------------------------------------------------------------------------------------


def test_new_and_old_files_can_be_outputs(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    check_output(tmp_path / "old", tmp_path / "other", None, "zeros:8")
    check_output(tmp_path / "new", tmp_path / "old")


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefitError, match="folder or a device"):
        check_output(tmp_path)
    with pytest.raises(RefitError, match="there is no folder"):
        check_output(tmp_path / "missing" / "out")
    with pytest.raises(RefitError, match="there is no folder"):
        check_output(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda path, _: path == tmp_path)
    with pytest.raises(RefitError, match="write-protected"):
        check_output(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RefitError, match="its folder is not writable"):
        check_output(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody can write")
def test_a_folder_whose_rights_do_not_say_all() -> None:
    with pytest.raises(
        RefitError, match=r"'/proc/out' cannot be written: .*('/proc'|not writable)"
    ):
        check_output(Path("/proc/out"))


def test_devices_are_not_replaced() -> None:
    with pytest.raises(RefitError, match="folder or a device"):
        check_output(_null())


def _null() -> Path:
    return Path(os.devnull)


@pytest.mark.parametrize("how", ["itself", "link", "hardlink"])
def test_inputs_are_not_replaced(tmp_path: Path, how: str) -> None:
    source, out = tmp_path / "weights", tmp_path / "out"
    source.write_text("x")
    if how == "itself":
        out = tmp_path / "." / "weights"
    elif how == "link":
        out.symlink_to(source)
    else:
        out.hardlink_to(source)
    with pytest.raises(click.UsageError, match="is read by this command"):
        check_output(out, None, str(source))


# -- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["program.pt2", "program"])
def test_programs_are_loaded_whatever_their_name(tmp_path: Path, name: str) -> None:
    program = torch.export.export(Net(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / name)
    loaded = load_program(tmp_path / name)
    assert loaded.module()(torch.ones(2)).tolist() == [2.0, 2.0]


def test_inputs_that_are_nested_are_no_keywords(tmp_path: Path) -> None:
    torch.save({"x": {"a": torch.ones(1)}}, tmp_path / "inputs.pt")
    with pytest.raises(ConfigError, match=r"\['x\.a'\]"):
        load_inputs(Pipeline(), tmp_path / "inputs.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (77,)


def test_what_is_no_program(tmp_path: Path) -> None:
    """None of these reaches torch, and nothing is unpickled."""
    path = tmp_path / "file"
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("data.pkl", pickle.dumps(Bomb()))
    for content in (b"", b"text", os.urandom(4096), pickle.dumps(Bomb()), archive.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UnsupportedTargetError, match="holds no program") as caught:
            load_program(path)
        assert "torch.export.save" in caught.value.hint
    with pytest.raises(UnsupportedTargetError, match="There is no file"):
        load_program(tmp_path / "missing")
    with pytest.raises(UnsupportedTargetError, match="is a folder, not the file") as caught:
        load_program(tmp_path)
    assert "torch.export.save" in caught.value.hint


def test_a_damaged_program_is_told_in_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "program"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("program/archive_format", "pt2")
    with pytest.raises(UnsupportedTargetError, match="cannot be loaded"):
        load_program(path)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(UnsupportedTargetError, match="cannot be loaded"):
        load_program(path, verbose=True)


# -- plans and inputs ---------------------------------------------------------------------------


def test_no_plan_and_no_inputs(tmp_path: Path) -> None:
    pipeline = Pipeline()
    assert load_plan(pipeline, None) is None
    assert load_inputs(pipeline, None) is None
    with pytest.raises(PlanMismatchError):
        load_plan(pipeline, tmp_path / "missing")
    with pytest.raises(SourceError):
        load_inputs(pipeline, tmp_path / "missing.safetensors")


def test_inputs_by_position_and_by_name(tmp_path: Path) -> None:
    file = tmp_path / "inputs.safetensors"
    # eleven, so that an order of texts shows: "10" comes before "2"
    tensors = {str(n): torch.tensor([n]) for n in range(11)}
    save_file({**tensors, "mask": torch.zeros(1), "007": torch.ones(1)}, file)
    loaded = load_inputs(Pipeline(), file)
    assert loaded is not None
    args, kwargs = loaded
    assert [int(arg) for arg in args] == list(range(11))
    assert {name: int(value) for name, value in kwargs.items()} == {"mask": 0, "007": 1}


@pytest.mark.parametrize("names", [["1"], ["0", "2"], []])
def test_inputs_with_gaps_and_without_any(tmp_path: Path, names: list[str]) -> None:
    file = tmp_path / "inputs.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    with pytest.raises(ConfigError):
        load_inputs(Pipeline(), file)
