"""Weights in folders and in several files: whole or refused, with every reason at once."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from refitkit.builtin.weights import files, folders
from refitkit.builtin.weights.distributed import METADATA
from refitkit.builtin.weights.folders import SUFFIX
from refitkit.builtin.weights.reading import Folder
from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {f"layer{n}.weight": torch.randn(3, n + 1) for n in range(5)}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def opened(path: Path) -> Any:
    return Pipeline().open_weights(path)


def home() -> dict[str, str]:
    return {name: FILES[number % 2] for number, name in enumerate(TENSORS)}


def write(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    where = home()
    for file in FILES:
        save_file({n: TENSORS[n] for n in TENSORS if where[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map or where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def assert_holds(source: Any, tensors: dict[str, torch.Tensor]) -> None:
    assert set(source.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert source.info(name).shape == tuple(tensor.shape)
        assert source.get(name).equal(tensor)
    for ask in (source.info, source.get):
        with pytest.raises(KeyError):
            ask("nothing")


@pytest.mark.parametrize("name", ["", INDEX], ids=["folder", "index"])
def test_several_files_are_one_source(tmp_path: Path, name: str) -> None:
    source = opened(write(tmp_path) / name)
    assert_holds(source, TENSORS)
    assert "(2 files)" in source.description


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "pytorch_model"])
def test_one_file_in_a_folder_is_found(tmp_path: Path, stem: str) -> None:
    save_file(TENSORS, tmp_path / f"{stem}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_holds(opened(tmp_path), TENSORS)


def test_files_of_torch_save_in_a_folder_are_found(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert_holds(opened(tmp_path), TENSORS)


def test_shards_of_torch_save_are_found(tmp_path: Path) -> None:
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:])):
        torch.save({n: TENSORS[n] for n in part}, tmp_path / f"part{number}.bin")
    where = {n: f"part{int(i >= 2)}.bin" for i, n in enumerate(names)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_holds(opened(tmp_path), TENSORS)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    """As transformers does: the same weights are often there twice."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert_holds(opened(tmp_path), TENSORS)


def test_one_file_is_preferred_to_several(tmp_path: Path) -> None:
    write(tmp_path)
    save_file({"one": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_holds(opened(tmp_path), {"one": torch.ones(1)})


def test_two_models_in_a_folder_are_not_chosen_from(tmp_path: Path) -> None:
    for stem in ("model", "diffusion_pytorch_model"):
        save_file(TENSORS, tmp_path / f"{stem}.safetensors")
    with pytest.raises(SourceError, match="more than one model") as info:
        opened(tmp_path)
    found = [problem.subject for problem in info.value.problems]
    assert found == ["model.safetensors", "diffusion_pytorch_model.safetensors"]


def test_a_folder_without_weights_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")  # and no index
    with pytest.raises(SourceError, match="No plugin can read") as info:
        opened(tmp_path)
    assert all(stem in info.value.hint for stem in folders._STEMS)
    assert all(said in info.value.hint for said in (SUFFIX, METADATA, "Or pass the file"))


@pytest.mark.parametrize("name", ["w.th", "w.pth.tar", "w"])
def test_a_file_of_an_unknown_name_is_nobodys(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    with pytest.raises(SourceError, match="No plugin can read") as info:
        opened(tmp_path / name)
    known = {*files._TORCH_SUFFIXES, ".safetensors", SUFFIX}
    assert all(ending in info.value.hint for ending in known)


# -- damaged ----------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    where = {**home(), "layer9.weight": FILES[0], "layer8.weight": "model-3.safetensors"}
    del where["layer1.weight"]
    write(tmp_path, where)
    with pytest.raises(SourceError, match="not one whole checkpoint") as info:
        opened(tmp_path)
    found = {(problem.subject, problem.kind) for problem in info.value.problems}
    assert found == {
        ("model-3.safetensors", "missing"),
        ("layer9.weight", "missing"),
        ("layer1.weight", "unexpected"),
    }


def test_a_name_in_two_files_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    save_file(TENSORS, tmp_path / FILES[0])
    with pytest.raises(SourceError) as info:
        opened(tmp_path)
    assert {problem.kind for problem in info.value.problems} == {"unexpected"}


def test_a_truncated_shard_is_told_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / FILES[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(SourceError, match=rf"{FILES[1]}: unreadable"):
        opened(tmp_path)


def test_a_shard_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("1 2 3")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "weights.txt"}}))
    with pytest.raises(SourceError, match="unknown kind of file"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ".", "", "a\0b"],
)
def test_an_index_has_no_say_over_other_folders(tmp_path: Path, file: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    (inner / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, file)}))
    with pytest.raises(SourceError, match="not beside the index"):
        opened(inner)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"other": {}}', "\xff"],
)
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match="cannot be read as an index"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{{"weight_map": {{"a": "{0}", "b": "{1}", "a": "{1}"}}}}',
        '{{"weight_map": {{"a": "{0}"}}, "weight_map": {{"a": "{1}", "b": "{1}"}}}}',
    ],
    ids=["a name", "the map"],
)
def test_an_index_that_says_two_things_is_refused(tmp_path: Path, text: str) -> None:
    """Readers of JSON take the last one, whichever was meant."""
    save_file({"a": torch.zeros(1)}, tmp_path / FILES[0])
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / FILES[1])
    (tmp_path / INDEX).write_text(text.format(*FILES))
    with pytest.raises(SourceError, match="given twice") as info:
        opened(tmp_path)
    assert len(info.value.problems) == 1


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(TENSORS, "x" * 5000))
    with pytest.raises(SourceError) as info:
        opened(tmp_path)
    assert [problem.kind for problem in info.value.problems] == ["missing"]


def test_names_of_missing_files_are_counted_once(tmp_path: Path) -> None:
    """Each with all names again would take hours for an index that is hostile."""

    class Compared(str):
        __slots__ = ()
        times = 0

        def __eq__(self, other: object) -> bool:
            Compared.times += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    home = {f"w{n}": Compared(f"s{n}.safetensors") for n in range(500)}
    shards, problems = folders._open_shards(Folder(tmp_path, "it"), home)
    assert len(problems) == 500
    assert not shards
    assert Compared.times < 500 * 100


PIPES = ["pipe.safetensors", "pipe.pt", "pipe.bin.index.json"]


@pytest.mark.parametrize("name", PIPES)
def test_pipes_are_refused_before_anybody_waits_for_them(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match="is a pipe, a device"):
        opened(tmp_path / name)


def test_a_pipe_among_shards_is_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / FILES[0]).unlink()
    os.mkfifo(tmp_path / FILES[0])
    with pytest.raises(SourceError, match="missing"):
        opened(tmp_path)
