"""Weights in files, whole and broken: read lazily, never run, one error."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch.serialization import LoadEndianness

from refitkit.builtin.weights import torch_files
from refitkit.builtin.weights.torch_files import TorchFile
from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from refitkit.program.bits import same_bits
from refitkit.protocols import GivesPieces, WeightSource
from refitkit.testing.oracles import bits

if TYPE_CHECKING:
    from collections.abc import Callable

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "none": torch.ones(0, 3),
}
PIPELINE = Pipeline()


def opened(path: Path | str) -> Any:
    return PIPELINE.open_weights(path)


def file_of(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def saved(state: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def assert_holds(source: Any, tensors: dict[str, torch.Tensor]) -> None:
    assert isinstance(source, WeightSource)
    assert set(source.names()) == tensors.keys()
    for name, tensor in tensors.items():
        info, got = source.info(name), source.get(name)
        assert (info.dtype, info.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert info.unusable == ""
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    for ask in (source.info, source.get):
        with pytest.raises(KeyError):
            ask("no such name")


# -- safetensors ------------------------------------------------------------------------------


def test_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    for way in (path, str(path)):
        source = opened(way)
        assert_holds(source, TENSORS)
        assert "weights.safetensors" in source.description


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.ones(4).to(dtype)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert_holds(opened(tmp_path / "w.safetensors"), tensors)


def header(entries: Any, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def test_a_safetensors_dtype_that_torch_lacks_is_told(tmp_path: Path) -> None:
    content = header(entry("F6_E2M3", [4], 3), b"\0\0\0")
    source = opened(file_of(tmp_path, "w.safetensors", content))
    assert "F6_E2M3" in source.info("w").unusable
    assert source.info("w").shape == (4,)


def test_every_dtype_that_a_header_may_name_can_be_read_or_says_why(tmp_path: Path) -> None:
    bits = {
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
        "C64": 64, "U16": 16, "U32": 32, "U64": 64, "BF16": 16,
    }  # fmt: skip
    for dtype, width in bits.items():
        size = width  # eight elements
        content = header(entry(dtype, [8], size), b"\0" * size)
        source = opened(file_of(tmp_path, f"{dtype}.safetensors", content))
        if source.info("w").unusable:
            assert {"F4": "float4_e2m1fn_x2"}.get(dtype, dtype) in source.info("w").unusable
        else:
            assert source.get("w").dtype is getattr(torch, source.info("w").dtype)


SAFE = save(TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"not safetensors at all",
        b"PK\x03\x04" + b"\0" * 60,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        header(b"{"),
        header([]),
        header(b"\xff\xff"),
        header(entry("F32", [2], 8), b"\0" * 7),
        header(entry("F32", [2], 8), b"\0" * 9),
        header(entry("F32", [3], 8), b"\0" * 8),
        header(entry("F32", [2**62, 4], 8), b"\0" * 8),
        header(entry("X9", [2], 8), b"\0" * 8),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}}, b"\0" * 8),
        header({"w": 3}),
        header(entry("F32", [0, 2**62, 4], 0)),
        header(entry("F32", [-2, -1], 8), b"\0" * 8),
        header(entry("F32", [True, 2], 8), b"\0" * 8),
        header(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":3}'),
        header({**entry("F32", [1], 4), "v": entry("F32", [1], 4)["w"]}, b"\0" * 8),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SourceError, match=r"odd\.safetensors") as info:
        opened(file_of(tmp_path, "odd.safetensors", content))
    assert "completely" in info.value.hint


@pytest.mark.parametrize("cut", [*range(0, len(SAFE), 29), len(SAFE) - 1])
def test_a_truncated_safetensors_file(tmp_path: Path, cut: int) -> None:
    with pytest.raises(SourceError):
        opened(file_of(tmp_path, "cut.safetensors", SAFE[:cut]))


def read_from(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Notes where files are read from, and how much."""
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def noted(fd: int, buffers: Any, start: int) -> int:
        read.append((start, sum(map(len, buffers))))
        return preadv(fd, buffers, start)

    monkeypatch.setattr(os, "preadv", noted)
    return read


def test_tensors_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": torch.ones(4096), "v": torch.ones(4096)}
    for name, content in [("w.safetensors", save(tensors)), ("w.pt", saved(tensors))]:
        path = file_of(tmp_path, name, content)
        read = read_from(monkeypatch)
        source = opened(path)
        assert source.info("w").shape == (4096,)
        assert sum(count for _, count in read) < 4 * 4096  # less than a tensor
        read.clear()
        assert source.get("w").tolist() == [1] * 4096
        assert [count for _, count in read] == [4 * 4096]


def test_what_a_file_was_when_it_was_opened_is_what_is_read(tmp_path: Path) -> None:
    for name, content in [("w.safetensors", save(TENSORS)), ("w.pt", saved(TENSORS))]:
        path = file_of(tmp_path, name, content)
        source = opened(path)
        assert source.get("a.weight").equal(TENSORS["a.weight"])
        source.require_unchanged()
        with path.open("r+b") as file:
            file.seek(len(content) // 2)
            file.write(b"\0")
        os.utime(path, (1, 1))  # whatever the clock of this file system can tell
        for ask in (lambda s=source: s.get("a.weight"), source.require_unchanged):
            with pytest.raises(SourceError, match="changed since it was opened") as info:
                ask()
            assert [problem.subject for problem in info.value.problems] == [name]
            assert "os.replace" in info.value.hint


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_that_ends_early_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system does not tell that it was cut."""
    content = save(TENSORS) if kind == "safetensors" else saved(TENSORS)
    source = opened(file_of(tmp_path, f"w.{kind}", content))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(SourceError, match="ends before its tensors do"):
        source.get("a.weight")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_disk_that_fails_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError("stale file handle")

    path = file_of(tmp_path, f"w.{kind}", save(TENSORS) if kind == "safetensors" else NEW)
    source = opened(path)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(SourceError, match="stale file handle"):
        source.get("a.weight")
    if kind == "safetensors":  # of the others torch reads the beginning
        with pytest.raises(SourceError, match=r"w\.safetensors.* cannot be read"):
            opened(path)


def test_what_was_read_stays_what_it_is(tmp_path: Path) -> None:
    """Memory is used again, but not while somebody holds what was read into it."""
    tensors = {str(n): torch.full((1 << 16,), float(n)) for n in range(6)}
    save_file(tensors, tmp_path / "w.safetensors")
    source = opened(tmp_path / "w.safetensors")
    held = {name: source.get(name)[5:].view(-1) for name in "012"}
    places = {source.get(name).data_ptr() for name in "345"}
    assert len(places) == 1
    assert all(value.equal(tensors[name][5:]) for name, value in held.items())
    assert len({value.data_ptr() for value in held.values()} | places) == 4


def test_large_tensors_come_in_pieces(tmp_path: Path) -> None:
    large = torch.arange(3 << 20, dtype=torch.int32).reshape(3, 1 << 20)
    tensors = {"large": large, "small": torch.ones(3), "turned": large.t()}
    save_file({"large": large, "small": torch.ones(3)}, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        source = opened(tmp_path / file)
        assert isinstance(source, GivesPieces)
        pieces = [piece.clone() for piece in source.pieces("large") or ()]
        assert len(pieces) > 2
        assert torch.cat(pieces).equal(large.reshape(-1))
        assert source.pieces("small") is None
        with pytest.raises(KeyError):
            source.pieces("no such name")
    assert source.pieces("turned") is None
    assert source.get("turned").equal(large.t())


@pytest.mark.parametrize("into", [None, torch.zeros(3 << 20)], ids=["pieces", "in place"])
def test_a_piece_of_a_file_that_was_changed_is_no_piece(
    tmp_path: Path, into: torch.Tensor | None
) -> None:
    save_file({"w": torch.ones(3 << 20)}, tmp_path / "w.safetensors")
    pieces = opened(tmp_path / "w.safetensors").pieces("w", into)
    next(pieces)
    os.truncate(tmp_path / "w.safetensors", 4096)
    with pytest.raises(SourceError, match="changed since it was opened"):
        next(pieces)


def in_files(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """The tensors as a safetensors file, as one of torch, and as a checkpoint with an index."""
    save_file(tensors, folder / "w.safetensors")
    torch.save(tensors, folder / "w.pt")
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "w.safetensors")}))
    return [folder / "w.safetensors", folder / "w.pt", index]


def test_entries_of_any_size_are_read_straight_into_memory(tmp_path: Path) -> None:
    large = torch.arange((5 << 18) + 3, dtype=torch.int32)
    tensors = {**TENSORS, "large": large, "halves": torch.rand(3, 5).half()}
    for file in in_files(tmp_path, tensors):
        source = opened(file)
        for name, tensor in tensors.items():
            into = torch.zeros_like(tensor)
            start = into.data_ptr()
            for piece in source.pieces(name, into):
                assert piece.dtype == tensor.dtype
                assert piece.data_ptr() == start
                start += piece.nbytes
            assert start == into.data_ptr() + into.nbytes
            assert bits(into) == bits(tensor)


@pytest.mark.parametrize(
    "into",
    [torch.zeros(3, 2, dtype=torch.int32), torch.zeros(7), torch.zeros(5), torch.zeros(0)],
    ids=["dtype", "larger", "smaller", "empty"],
)
def test_memory_that_does_not_fit_an_entry_is_not_written_to(
    tmp_path: Path, into: torch.Tensor
) -> None:
    for file in in_files(tmp_path, {"w": TENSORS["a.weight"]}):
        pieces = [piece.clone() for piece in opened(file).pieces("w", into)]
        assert torch.cat(pieces).equal(TENSORS["a.weight"].reshape(-1))
        assert not into.any()


def test_a_file_knows_the_bits_of_what_was_read(tmp_path: Path) -> None:
    tensors = {**TENSORS, "large": torch.rand((5 << 18) + 3)}
    for file in in_files(tmp_path, tensors):
        source = opened(file)
        assert source.has_bits("large", tensors["large"]) is None
        for name, tensor in tensors.items():
            if name == "large":
                list(source.pieces(name, torch.zeros_like(tensor)))
            else:
                source.get(name)
            assert source.has_bits(name, tensor) is True
            assert source.has_bits(name, torch.zeros(1, 1, dtype=torch.complex128)) is None
            if tensor.numel():
                other = tensor.clone()
                other.view(-1).view(torch.uint8)[-1] ^= 1
                assert source.has_bits(name, other) is False
        assert source.has_bits("large", tensors["large"].view(torch.int32)) is None
        with pytest.raises(KeyError):
            source.has_bits("no such name", tensors["large"])


def test_what_only_get_can_read_is_not_read_into_memory(tmp_path: Path) -> None:
    torch.save({"turned": torch.rand(3, 2).t(), "neg": torch.rand(2).neg()}, tmp_path / "w.pt")
    source = opened(tmp_path / "w.pt")
    assert source.pieces("turned", torch.zeros(2, 3)) is None
    assert source.pieces("neg", torch.zeros(2)) is not None  # a value, not torch's lazy bit
    with pytest.raises(KeyError):
        source.pieces("no such name", torch.zeros(2))


# -- torch.save -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_torch_save(tmp_path: Path, suffix: str, zipped: bool) -> None:
    content = saved(TENSORS, _use_new_zipfile_serialization=zipped)
    assert content.startswith(b"PK") == zipped
    assert_holds(opened(file_of(tmp_path, f"weights{suffix}", content)), TENSORS)


def test_a_state_dict_as_torch_saves_it(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    path = file_of(tmp_path, "w.pt", saved(module.state_dict()))
    assert_holds(opened(path), dict(module.state_dict()))


def test_parameters_and_views_and_ties_in_a_file(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    state = {"p": torch.nn.Parameter(base[:4]), "view": base[3:7], "t": base.reshape(2, 4).t()}
    source = opened(file_of(tmp_path, "w.pt", saved({**state, "tied": state["p"]})))
    assert source.get("view").tolist() == [3, 4, 5, 6]
    assert source.get("t").tolist() == base.reshape(2, 4).t().tolist()
    assert not source.get("p").requires_grad
    one, other = source.get("p"), source.get("tied")
    assert one.data_ptr() == other.data_ptr()


def test_extra_state_in_a_file_is_no_weight(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "child._extra_state": {"any": "thing"}}
    assert list(opened(file_of(tmp_path, "w.pt", saved(state))).names()) == ["w"]


@pytest.mark.parametrize("how", ["sparse", "squeezed", "turned", "old"])
def test_what_has_no_place_in_a_file_is_read_as_a_whole(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd tensors, and records that are not the bytes of storages as this machine has them."""
    state: dict[str, Any] = {"w": torch.arange(6.0)}
    if how == "sparse":
        state["odd"] = torch.ones(2, 2).to_sparse()
    path = file_of(tmp_path, "w.pt", saved(state, _use_new_zipfile_serialization=how != "old"))
    if how == "squeezed":
        rewritten(path, zipfile.ZIP_DEFLATED)
    if how == "turned":
        rewritten(path, zipfile.ZIP_STORED, byteorder=b"big")
        state["w"] = torch.from_numpy(state["w"].numpy().byteswap())
    source = opened(path)
    read = read_from(monkeypatch)
    assert source.get("w").equal(state["w"])
    assert read == []


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_files_that_would_unpack_to_far_more_are_refused_before(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_files, "_ALWAYS_ALLOWED", 1 << 16)
    path = file_of(tmp_path, "w.pt", saved({"w": torch.zeros(1 << 18)}))
    if how == "compressed":
        rewritten(path, zipfile.ZIP_DEFLATED)
    else:
        real = zipfile.ZipFile.infolist
        monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda self: real(self) * 65)

    def unpacked(*_: object, **__: object) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(torch, "load", unpacked)
    with pytest.raises(SourceError, match=r"its records would unpack to [0-9]{7,8}") as info:
        opened(path)
    assert "torch.load" in info.value.hint


def test_a_zip_file_that_others_have_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch may compute places of records from what its own writer does; these lie elsewhere."""
    path = file_of(tmp_path, "w.pt", NEW)
    rewritten(path, zipfile.ZIP_STORED)
    assert_holds(opened(path), TENSORS)


def test_an_order_of_bytes_that_the_process_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that do not tell theirs: torch crashes if there is no data to turn round."""
    path = file_of(tmp_path, "w.pt", saved({"w": torch.arange(6.0)}))
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist() if "byteorder" not in n}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert opened(path).get("w").tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(
        torch.serialization, "get_default_load_endianness", lambda: LoadEndianness.BIG
    )
    wanted = torch.from_numpy(torch.arange(6.0).numpy().byteswap())
    assert opened(path).get("w").equal(wanted)


def rewritten(path: Path, how: int, **changed: bytes) -> None:
    """Pack a zip file again, other than torch does."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, changed.get(name.rpartition("/")[2], content))


def test_conjugates_and_negatives_in_a_file(tmp_path: Path) -> None:
    value = torch.randn(3, 2, dtype=torch.complex64)
    state = {
        "conj": value.conj(),
        "neg": value.clone().conj().imag,
        "f8": torch.ones(3).to(torch.float8_e5m2),
    }
    source = opened(file_of(tmp_path, "w.pt", saved(state)))
    for name, wanted in state.items():
        assert bits(source.get(name)) == bits(wanted)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_no_code_of_a_file_is_run(tmp_path: Path, how: str) -> None:
    proof = tmp_path / "proof"
    state = {"w": torch.ones(1), "bomb": Bomb(proof)}
    makers: dict[str, Callable[[], bytes]] = {
        "zip": lambda: saved(state),
        "legacy": lambda: saved(state, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(Bomb(proof)),
    }
    path = file_of(tmp_path, "bomb.pt", makers[how]())
    with pytest.raises(SourceError, match=r"bomb\.pt") as info:
        opened(path)
    assert not proof.exists()
    assert "safetensors" in info.value.hint


TRAINED = {
    "state_dict": {f"model.{name}": value for name, value in TENSORS.items()},
    "ema": {
        "deep": {"w": torch.ones(2).t()},
        "steps": 3,
        "child._extra_state": {"w": torch.ones(1)},
    },
    "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
    "scale": torch.ones(1),
    "losses": [torch.ones(1)],
    "epoch": 3,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_trainers_file_has_the_names_of_a_distributed_checkpoint(
    tmp_path: Path, zipped: bool
) -> None:
    content = saved(TRAINED, _use_new_zipfile_serialization=zipped)
    wanted = {f"state_dict.model.{name}": value for name, value in TENSORS.items()}
    wanted |= {"ema.deep.w": torch.ones(2), "scale": torch.ones(1)}
    source = opened(file_of(tmp_path, "trainer.ckpt", content))
    assert_holds(source, wanted)
    assert isinstance(source, TorchFile) == zipped


def test_tensors_of_a_trainers_file_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"model": {"w": torch.ones(4096)}, "optimizer": {"state": {0: torch.ones(4096)}}}
    path = file_of(tmp_path, "trainer.ckpt", saved(state))
    read = read_from(monkeypatch)
    source = opened(path)
    assert sum(count for _, count in read) < 4 * 4096  # less than a tensor
    read.clear()
    assert source.get("model.w").tolist() == [1] * 4096
    assert [count for _, count in read] == [4 * 4096]


def test_a_trainers_file_with_odd_tensors_is_read_as_a_whole(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2), "odd": torch.ones(2, 2).to_sparse()}}
    source = opened(file_of(tmp_path, "trainer.ckpt", saved(state)))
    assert source.get("model.w").tolist() == [1, 1]
    assert "sparse" in source.info("model.odd").unusable


def test_names_that_are_the_same_when_keys_are_joined(tmp_path: Path) -> None:
    one = torch.ones(1)
    state = {"a": {"b.c": one, "d": one}, "a.b": {"c": one}, "a.d": one, "e": {"f": one}}
    with pytest.raises(SourceError, match="several tensors of one name") as info:
        opened(file_of(tmp_path, "w.pt", saved(state)))
    found = {(problem.subject, problem.kind) for problem in info.value.problems}
    assert found == {("a.b.c", "given twice"), ("a.d", "given twice")}


@pytest.mark.parametrize("how", ["itself", "deep", "shared"])
def test_a_file_that_is_nested_without_end(tmp_path: Path, how: str) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    if how == "itself":
        state["more"] = state
    for _ in range(15 if how == "shared" else 17):
        state = dict.fromkeys("abcdefgh" if how == "shared" else "a", state)
    with pytest.raises(SourceError, match="nested too deeply, or has too many names"):
        opened(file_of(tmp_path, "w.pt", saved(state)))


@pytest.mark.parametrize(
    "more",
    [{"epoch": 3}, {"optimizer": {"lr": 0.1}}, {"optimizer": {0: torch.ones(1)}}, {"s": [1]}],
)
def test_a_flat_state_dict_has_nothing_but_tensors(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="more than the tensors") as info:
        opened(file_of(tmp_path, "w.pt", saved({"w": torch.ones(1), **more})))
    assert [problem.subject for problem in info.value.problems] == list(more)


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as info:
        opened(file_of(tmp_path, "w.pt", saved({"w": torch.ones(1), 3: torch.ones(1)})))
    assert [p.subject for p in info.value.problems] == ["3"]


@pytest.mark.parametrize(
    "thing", [torch.ones(1), [torch.ones(1)], "text", 3, None], ids=lambda t: type(t).__name__
)
def test_a_file_of_something_else(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(SourceError, match=type(thing).__name__):
        opened(file_of(tmp_path, "w.pt", saved(thing)))


def test_a_whole_module_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="runs no code"):
        opened(file_of(tmp_path, "w.pt", saved(torch.nn.Linear(1, 1))))


def test_unusable_tensors_in_a_file_are_told(tmp_path: Path) -> None:
    state = {"w": torch.ones(2, 2).to_sparse(), "m": torch.ones(2, device="meta")}
    source = opened(file_of(tmp_path, "w.pt", saved(state)))
    assert "sparse" in source.info("w").unusable
    assert source.info("m").unusable


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK\x03\x04", b"text", b"\x80\x02", b"\0" * 64, SAFE], ids=repr
)
def test_what_torch_did_not_save(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SourceError, match=r"odd\.pt"):
        opened(file_of(tmp_path, "odd.pt", content))


def test_what_torch_does_not_unpickle_is_named(tmp_path: Path) -> None:
    """Trainers save their arguments beside the weights."""
    torch.save({"model": TENSORS, "args": Namespace(lr=1e-3)}, tmp_path / "trainer.pt")
    with pytest.raises(SourceError, match=r"from files: it has argparse\.Namespace\.") as info:
        opened(tmp_path / "trainer.pt")
    assert "add_safe_globals([argparse.Namespace])" in info.value.hint
    with torch.serialization.safe_globals([Namespace]):
        assert {f"model.{name}" for name in TENSORS} <= set(opened(tmp_path / "trainer.pt").names())


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_file_of_torch_at_all_is_told_so(tmp_path: Path, content: bytes) -> None:
    """Torch says of it that loading with weights_only=False will likely succeed."""
    with pytest.raises(SourceError, match=r"is not a file of torch\.save\.") as info:
        opened(file_of(tmp_path, "odd.pt", content))
    assert "weights_only" not in str(info.value)
    assert "pointer" in info.value.hint


NEW, OLD = saved(TENSORS), saved(TENSORS, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("part", range(24))
def test_a_truncated_zip_file(tmp_path: Path, part: int) -> None:
    with pytest.raises(SourceError):
        opened(file_of(tmp_path, "cut.pt", NEW[: len(NEW) * part // 24]))


@pytest.mark.parametrize("part", range(24))  # pickled names make its length vary by process
def test_a_truncated_legacy_file(tmp_path: Path, part: int) -> None:
    with pytest.raises(SourceError):
        opened(file_of(tmp_path, "cut.pt", OLD[: len(OLD) * part // 24]))


@given(st.data())
@settings(max_examples=300)
def test_any_damage_is_a_source_error_or_still_readable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name, good = data.draw(
        st.sampled_from([("d.pt", NEW), ("d.ckpt", OLD), ("d.safetensors", SAFE)])
    )
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(1, 4))] = data.draw(st.binary(max_size=4))
        if not content:
            return
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        source = opened(path)
        for found in source.names():
            if not source.info(found).unusable:
                source.get(found).clone()
    except SourceError:
        return


# -- files that others have put together, and settings of the process ----------------------------


def test_a_damaged_header_of_a_record(tmp_path: Path) -> None:
    """Its record could be found, but torch.load would not take it either."""
    path = file_of(tmp_path, "w.pt", NEW)
    with zipfile.ZipFile(path) as archive:
        (place,) = (e.header_offset for e in archive.infolist() if e.filename.endswith("data/1"))
    path.write_bytes(NEW[:place] + b"X" + NEW[place + 1 :])
    with pytest.raises(SourceError, match=r"torch\.load"):
        opened(path)


@pytest.mark.parametrize("field", [20, 24, 38])
def test_a_record_of_two_sizes_or_that_is_a_folder(tmp_path: Path, field: int) -> None:
    """Of some torch.load gives what happens to be in memory, without a word."""
    at = NEW.rindex(b"PK\1\2", 0, NEW.rindex(b"archive/data/0")) + field  # in the directory
    path = file_of(tmp_path, "w.pt", NEW[:at] + bytes([NEW[at] ^ 0x10]) + NEW[at + 1 :])
    with pytest.raises(SourceError) as caught:
        opened(path)
    assert caught.value.problems[0].subject == "archive/data/0"
    assert caught.value.problems[0].kind == "damaged"


def test_a_zip_file_with_folders(tmp_path: Path) -> None:
    """As other tools pack them."""
    path = file_of(tmp_path, "w.pt", NEW)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("archive/data")
    assert_holds(opened(path), TENSORS)


def test_a_record_without_a_name(tmp_path: Path) -> None:
    file = io.BytesIO(NEW)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/@", b"x")
    content = file.getvalue().replace(b"archive/data/@", b"\0" * 14)
    with pytest.raises(SourceError, match=r"torch\.load"):
        opened(file_of(tmp_path, "w.pt", content))


def test_a_record_that_says_that_it_is_encrypted(tmp_path: Path) -> None:
    at = NEW.rindex(b"PK\1\2", 0, NEW.rindex(b"archive/data/0")) + 8
    path = file_of(tmp_path, "w.pt", NEW[:at] + bytes([NEW[at] | 1]) + NEW[at + 1 :])
    with pytest.raises(SourceError, match="encrypt"):
        opened(path)


def test_storages_in_another_order_are_where_their_names_say(tmp_path: Path) -> None:
    """Without data torch counts places up in the order of reading."""
    path = tmp_path / "swapped.pt"
    torch.save({"a": torch.ones(256), "b": torch.ones(256) * 2, "c": torch.ones(256) * 3}, path)
    raw = path.read_bytes().replace(b"/data/1", b"/data/@")
    raw = raw.replace(b"/data/2", b"/data/1").replace(b"/data/@", b"/data/2")
    path.write_bytes(raw)
    wanted = torch.load(path, weights_only=True)
    assert wanted["b"][0] == 3
    found = opened(path)
    assert all(same_bits(found.get(name), value) for name, value in wanted.items())


def test_both_bits_of_a_saved_view(tmp_path: Path) -> None:
    path = tmp_path / "bits.pt"
    value = torch._neg_view(torch.randn(5, 3, dtype=torch.complex64).conj())
    torch.save({"k": value}, path)
    found = opened(path).get("k")
    assert (found.is_conj(), found.is_neg()) == (True, True)
    assert torch.equal(found.resolve_neg().resolve_conj(), value.resolve_neg().resolve_conj())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_another_default_device(tmp_path: Path, name: str) -> None:
    state = {"k": torch.randn(70, 1000), "none": torch.zeros(0)}
    path = tmp_path / name
    torch.save(state, path) if name == "w.pt" else save_file(state, path)
    with torch.device("meta"):
        found = opened(path)
        given = {key: found.get(key) for key in state}
    assert all(same_bits(given[key], value) for key, value in state.items())
    assert {value.device.type for value in given.values()} == {"cpu"}


def test_torch_is_set_to_map_files(tmp_path: Path) -> None:
    config = pytest.importorskip("torch.utils.serialization").config
    torch.save({"k": torch.ones(3)}, tmp_path / "w.pt")
    with config.patch({"load.mmap": True}):
        assert opened(tmp_path / "w.pt").get("k").tolist() == [1, 1, 1]
    assert config.load.mmap is False


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__": NaN}',
        '{"__metadata__": [[], []]}',
        '{"__metadata__": {"a": 1}}',
        '{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "x": Infinity}}',
    ],
)
def test_headers_that_safetensors_refuses(tmp_path: Path, header: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(SourceError, match="cannot be read as safetensors"):
        opened(path)


def test_metadata_that_is_null(tmp_path: Path) -> None:
    header = b'{"__metadata__": null, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    path = file_of(tmp_path, "w.safetensors", len(header).to_bytes(8, "little") + header + b"\7")
    assert_holds(opened(path), load(path.read_bytes()))


def test_a_dimension_that_no_slot_can_have(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}'
    path = file_of(tmp_path, "w.safetensors", len(header).to_bytes(8, "little") + header)
    with pytest.raises(SourceError, match="'a' has an invalid shape or invalid offsets"):
        opened(path)
