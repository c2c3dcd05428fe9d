"""The safetensors format, written and read in archives: safetensors itself is the oracle."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, save

from refitkit.errors import RefitError
from refitkit.files.safetensors_format import ArchivedTensors, streamed
from refitkit.recipe import Archive, ArchiveError, write_archive

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "half": torch.randn(5).bfloat16(),
    "byte": torch.tensor([1, 255], dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "none": torch.empty(0, 4),
    "last": torch.empty(0, dtype=torch.int8),
    "turned": torch.randn(3, 4).t(),
    "gaps": torch.randn(4, 6)[:, ::2],
    "conjugated": torch.randn(2, dtype=torch.complex64).conj(),
    "ümläut/🙂": torch.randn(2).to(torch.float8_e4m3fn),
}


def archived(tensors: dict[str, torch.Tensor]) -> io.BytesIO:
    file = io.BytesIO()
    write_archive(file, {"x": streamed(tensors), "after": b"it"})
    file.seek(0)
    return file


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    plain = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*plain)


def test_safetensors_reads_what_is_written() -> None:
    with Archive(archived(TENSORS)) as archive:
        assert archive.size("x") == streamed(TENSORS).size
        found = load(archive.read("x", 1 << 20))
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], value) for name, value in TENSORS.items())


def test_what_safetensors_writes_is_read() -> None:
    tensors = {name: t.resolve_conj().contiguous() for name, t in TENSORS.items()}
    file = io.BytesIO()
    write_archive(file, {"x": save(tensors, {"about": "it"})})
    with Archive(file) as archive:
        reader = ArchivedTensors(archive, "x")
        infos, found = reader.infos, dict(reader)
        assert dict(reader).keys() == found.keys()  # it can be read again
    assert found.keys() == infos.keys() == tensors.keys()
    for name, value in tensors.items():
        assert same(found[name], value), name
        assert infos[name].shape == tuple(value.shape)
        found[name].fill_(1)  # in memory of its own


def test_every_tensor_is_aligned() -> None:
    content = b"".join(bytes(chunk) for chunk in streamed(TENSORS).chunks)
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 8 == 0
    found = load(content)
    assert all(found[name].data_ptr() % found[name].itemsize == 0 for name in found)


def test_tensors_are_made_one_at_a_time() -> None:
    """Memory for all of them at once may not be there."""
    made = []

    class Counted(torch.Tensor):
        def detach(self) -> torch.Tensor:
            made.append(1)
            return super().detach()

    tensors = {name: torch.ones(3).as_subclass(Counted) for name in "abc"}
    chunks = iter(streamed(tensors).chunks)
    next(chunks)
    for count in (1, 2, 3):
        next(chunks)
        assert len(made) == count


def test_the_same_tensors_give_the_same_bytes() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert archived(TENSORS).getvalue() == archived(backwards).getvalue()


def test_dtypes_that_the_format_lacks_are_all_named() -> None:
    tensors = {name: torch.zeros(1, dtype=torch.complex128) for name in ("b", "a")}
    with pytest.raises(RefitError, match="does not have these dtypes") as info:
        streamed({**tensors, "c": torch.zeros(1)})
    assert [(one.subject, one.found) for one in info.value.problems] == [
        ("a", "complex128"),
        ("b", "complex128"),
    ]


def read_all(content: bytes) -> None:
    with Archive(io.BytesIO(content)) as archive:
        dict(ArchivedTensors(archive, "x"))


def test_damage_anywhere_is_found() -> None:
    """By the header, or by the checksum of the member."""
    content = archived({"a": torch.arange(40), "b": torch.zeros(0)}).getvalue()
    with Archive(io.BytesIO(content)) as archive:
        size = archive.size("x")
    start = content.index(b'{"a"') - 8
    read_all(content)
    for position in (*range(start, start + size, 7), start + size - 1):
        broken = bytearray(content)
        broken[position] ^= 0x40
        with pytest.raises(ArchiveError):
            read_all(bytes(broken))


@pytest.mark.parametrize("content", [b"", b"x" * 7, bytes(8), (99).to_bytes(8, "little") + b"{}"])
def test_members_that_are_no_such_files_are_refused(content: bytes) -> None:
    file = io.BytesIO()
    write_archive(file, {"x": content})
    with pytest.raises(ArchiveError, match="'x' is damaged"):
        read_all(file.getvalue())


def test_a_dtype_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    header = b'{"odd":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    content = len(header).to_bytes(8, "little") + header + b"abc"
    with (tmp_path / "file").open("wb") as file:
        write_archive(file, {"x": content})
    with Archive(tmp_path / "file") as archive:
        reader = ArchivedTensors(archive, "x")
        assert reader.infos["odd"].unusable
        with pytest.raises(ArchiveError, match="'odd': a tensor of the dtype F6_E2M3"):
            dict(reader)
