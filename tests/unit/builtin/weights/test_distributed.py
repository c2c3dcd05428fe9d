"""Distributed checkpoints: whole tensors whoever saved which piece; nothing in them is run."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from tests.unit.builtin.weights.children.save_distributed import whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

CHILD = Path(__file__).parent / "children" / "save_distributed.py"
PREFIX = "model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed") / "checkpoint"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run([sys.executable, str(CHILD), str(folder), str(port)], check=True)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def opened(folder: Path) -> Any:
    return Pipeline().open_weights(folder)


def test_every_tensor_is_whole(saved: Path) -> None:
    source = opened(saved)
    tensors = whole()
    assert set(source.names()) == {PREFIX + name for name in tensors}
    for name, tensor in tensors.items():
        info, found = source.info(PREFIX + name), source.get(PREFIX + name)
        assert (info.dtype, info.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.equal(tensor), name


def test_several_processes_did_save_pieces(saved: Path) -> None:
    """Otherwise the test above says nothing."""
    pieces = FileSystemReader(saved).read_metadata().state_dict_metadata
    assert len(pieces["model.rows.weight"].chunks) == 4  # type: ignore[union-attr]
    assert len(pieces["model.grid.weight"].chunks) == 4  # type: ignore[union-attr]
    assert len(list(saved.glob("*.distcp"))) == 4


def test_unknown_names_are_key_errors(saved: Path) -> None:
    source = opened(saved)
    for ask in (source.info, source.get):
        with pytest.raises(KeyError):
            ask("step")


def test_only_what_is_asked_for_is_read(copied: Path) -> None:
    for file in copied.glob("*.distcp"):
        file.write_bytes(b"\0" * file.stat().st_size)
    source = opened(copied)
    assert source.info("model.rows.weight").shape == (10, 6)
    with pytest.raises(SourceError, match=r"'model\.rows\.weight' in '__0_0\.distcp'"):
        source.get("model.rows.weight")


# -- damaged ----------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def chunks_of(metadata: Metadata, name: str) -> list[ChunkStorageMetadata]:
    found: Any = metadata.state_dict_metadata[PREFIX + name]
    chunks: list[ChunkStorageMetadata] = found.chunks
    return chunks


def place(metadata: Metadata, **change: Any) -> None:
    for key, info in metadata.storage_data.items():
        metadata.storage_data[key] = dataclasses.replace(info, **change)


def test_a_missing_file_is_told_with_all_that_it_held(copied: Path) -> None:
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(SourceError, match="not whole") as info:
        opened(copied)
    problems = {(p.subject, p.kind) for p in info.value.problems}
    assert ("model.rows.weight", "missing") in problems
    assert ("model.columns.weight", "missing") in problems


def test_a_file_that_is_cut_off_is_told(copied: Path) -> None:
    file = copied / "__2_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match="cut off"):
        opened(copied)


def test_rewriting_alone_changes_nothing(copied: Path) -> None:
    """The cases below are refused for what they change, not for being written anew."""
    rewrite(copied, lambda metadata: None)
    assert opened(copied).get("model.scalar").item() == 3.0


WRONG: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a folder above": (lambda m: place(m, relative_path="../secret"), "a piece is nowhere"),
    "an absolute path": (lambda m: place(m, relative_path="/etc/passwd"), "a piece is nowhere"),
    "no path": (lambda m: place(m, relative_path=""), "a piece is nowhere"),
    "the folder above itself": (lambda m: place(m, relative_path=".."), "a piece is nowhere"),
    "a name that no file can have": (lambda m: place(m, relative_path="x" * 5000), "missing"),
    "too long": (lambda m: place(m, length=1 << 40), "cut off"),
    "too short": (lambda m: place(m, length=1), "cut off"),
    "before the start": (lambda m: place(m, offset=-1), "ValueError: a piece of"),
    "a piece too few": (lambda m: chunks_of(m, "rows.weight").pop(), "pieces do not make it up"),
    "a piece twice": (
        lambda m: chunks_of(m, "rows.weight").__setitem__(
            1, dataclasses.replace(chunks_of(m, "rows.weight")[0])
        ),
        "pieces do not make it up",
    ),
    "a piece outside": (
        lambda m: setattr(chunks_of(m, "same.bias")[0], "offsets", torch.Size([3])),
        "a piece outside of it",
    ),
    "a negative size": (
        lambda m: setattr(chunks_of(m, "same.bias")[0], "sizes", (-7,)),
        "ValueError: .* is not a shape",
    ),
    "a vast tensor": (
        lambda m: setattr(m.state_dict_metadata["model.same.bias"], "size", torch.Size([1 << 50])),
        "pieces do not make it up",
    ),
    "no tables": (
        lambda m: setattr(m, "state_dict_metadata", None),
        "not a distributed checkpoint",
    ),
    "no places": (lambda m: setattr(m, "storage_data", {}), "a piece is nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused(copied: Path, case: str) -> None:
    change, said = WRONG[case]
    rewrite(copied, change)
    with pytest.raises(SourceError, match=said):
        opened(copied)


def test_pieces_that_overlap_while_the_count_is_right_are_refused(copied: Path) -> None:
    """As many elements as the tensor has, but some twice and some never."""

    def shift(metadata: Metadata) -> None:
        chunks = chunks_of(metadata, "grid.weight")
        chunks[1].offsets, chunks[1].sizes = chunks[0].offsets, chunks[1].sizes

    rewrite(copied, shift)
    with pytest.raises(SourceError, match="pieces do not make it up"):
        opened(copied)


def test_another_tensor_than_announced_is_told_when_it_is_read(copied: Path) -> None:
    def swap(metadata: Metadata) -> None:
        chunks_of(metadata, "plain.steps")[0].sizes = torch.Size([1])
        metadata.state_dict_metadata["model.plain.steps"].size = torch.Size([1])  # type: ignore[union-attr]

    rewrite(copied, swap)
    source = opened(copied)
    with pytest.raises(SourceError, match=r"found int64 \(3,\), wanted int64 \(1,\)"):
        source.get("model.plain.steps")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    "content", [pickle.dumps(Evil()), pickle.dumps({"a": Evil()}), b"", b"\x80\x04", b"no pickle"]
)
def test_nothing_of_the_metadata_is_run(
    copied: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    (copied / ".metadata").write_bytes(content)
    with pytest.raises(SourceError, match="is refused"):
        opened(copied)
    assert not (copied / "touched").exists()


def test_metadata_that_is_data_but_no_table_is_refused(copied: Path) -> None:
    (copied / ".metadata").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(SourceError, match="not a distributed checkpoint that refitkit can read"):
        opened(copied)


def test_pieces_that_were_changed_on_their_way_are_unusable(copied: Path) -> None:
    rewrite(copied, lambda m: place(m, transform_descriptors=["zstd"]))
    assert "compressed" in opened(copied).info("model.scalar").unusable
