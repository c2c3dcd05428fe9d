"""What no plugin can open: it is told what it is, and where it belongs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from refitkit.errors import SourceError, UnsupportedTargetError
from refitkit.pipeline import targets as unopened
from refitkit.recipe import write_archive
from tests.fakes import Loaded, make_module, plan_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.pipeline.targets import FileType

STATE = {"weight": torch.zeros(2, 2)}


def _script(path: Path) -> None:
    file = io.BytesIO()
    write_archive(file, {"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/a.py": b""})
    path.write_bytes(file.getvalue())


def _program(path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with path.open("wb") as file:
        torch.export.save(program, file)


def _old_program(path: Path) -> None:
    with path.open("wb") as file:
        write_archive(file, {"serialized_exported_program.json": b"{}", "version": b"8.8"})


FILES: dict[str, tuple[Callable[[Path], Any], FileType]] = {
    "empty": (Path.touch, unopened.EMPTY),
    "x.safetensors": (lambda path: save_file(STATE, path), unopened.WEIGHTS),
    "no-suffix": (lambda path: save_file(STATE, path), unopened.WEIGHTS),
    "x.pt": (lambda path: torch.save(STATE, path), unopened.TORCH_SAVE),
    "old.pt": (
        lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
        unopened.TORCH_SAVE,
    ),
    "x.index.json": (lambda path: path.write_text("{}"), unopened.WEIGHTS),
    "x.pt2": (_program, unopened.PROGRAM),
    "old.pt2": (_old_program, unopened.PROGRAM),
    "script.pt": (_script, unopened.SCRIPT),
    "x.engine": (lambda path: path.write_bytes(b"ftrt" + bytes(60)), unopened.ENGINE),
    "rtx.engine": (lambda path: path.write_bytes(b"vtrt" + bytes(60)), unopened.ENGINE),
    "x.refitplan": (lambda path: plan_for(make_module(2)).save(path), unopened.PLAN),
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(make_module(2))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_module_is_told(tmp_path: Path, loaded: Loaded, name: str) -> None:
    write, kind = FILES[name]
    path = tmp_path / name
    write(path)
    for act in (loaded.pipeline.load, lambda path: loaded.pipeline.refit(path, loaded.compiled)):
        with pytest.raises(UnsupportedTargetError) as info:
            act(str(path))
        assert info.value.message == f"{str(path)!r} is {kind.what}."
        assert info.value.hint == kind.as_module


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        (torch.nn.Linear(2, 2), unopened.EAGER),
        (STATE, unopened.STATE),
        (torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), unopened.PROGRAM),
    ],
    ids=["eager", "state", "program"],
)
def test_an_object_that_is_no_module_is_told(loaded: Loaded, thing: object, kind: FileType) -> None:
    with pytest.raises(UnsupportedTargetError) as info:
        loaded.pipeline.refit(thing, loaded.compiled)
    assert info.value.message == f"A {type(thing).__name__} is {kind.what}."
    assert info.value.hint == kind.as_module


def test_an_open_module_is_told(loaded: Loaded) -> None:
    with pytest.raises(UnsupportedTargetError, match="is open already"):
        loaded.pipeline.load(loaded.compiled)
    with pytest.raises(SourceError, match="Modules go first"):
        loaded.pipeline.refit(loaded.compiled, loaded.compiled)


def test_a_saved_module_and_others_are_no_weights(tmp_path: Path, loaded: Loaded) -> None:
    saved = tmp_path / "x.refit"
    with saved.open("wb") as file:
        write_archive(file, {"refitkit/manifest.json": b"{}"})
    (tmp_path / "empty").touch()
    for name, hint in (("x.refit", "Modules go first"), ("empty", "is empty, not weights")):
        with pytest.raises(SourceError, match=hint):
            loaded.pipeline.open_weights(tmp_path / name)


def test_a_folder_of_weights_is_told(tmp_path: Path, loaded: Loaded) -> None:
    with pytest.raises(UnsupportedTargetError, match="No plugin can open"):
        loaded.pipeline.load(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedTargetError, match="a folder of weights"):
        loaded.pipeline.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"PK", b"PK\x03\x04" + bytes(40), bytes(64), b"{", b"\xff" * 64]
)
def test_what_nobody_knows_is_told_as_before(
    tmp_path: Path, loaded: Loaded, content: bytes
) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert unopened.file_type(path) is None
    assert unopened.file_type(3) is None
    assert unopened.file_type(tmp_path / "missing") is None
