"""Layouts in a folder: used by other processes, and never led astray by a file."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refitkit.builtin.torch_tensorrt.direct import known, route
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter
from tests.fakes import same_state
from tests.unit.builtin.torch_tensorrt.scenes import slot_values
from tests.unit.builtin.torch_tensorrt.test_direct import (
    PLAIN,
    PLAIN_B,
    A,
    B,
    C,
    Folding,
    PlacedEngine,
    engine_with,
    flat,
    memory,
    refit,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is known in this process."""
    known._of_process.clear()
    yield
    known._of_process.clear()


def stored_by(folder: Path, **more: Any) -> Path:
    """The file of a process that has found out a layout."""
    engine, _ = engine_with(Folding, A, cache=folder, **more)
    engine.adopt(slot_values(engine, A))
    refit(engine, B)
    assert engine.route == ("direct", "")
    (file,) = folder.iterdir()
    known._of_process.clear()  # as another process
    return file


def test_another_process_finds_nothing_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_by(tmp_path / "new")
    monkeypatch.setattr(route, "learn", None)
    monkeypatch.setattr(route, "prove", None)
    engine, handle = engine_with(Folding, A, cache=tmp_path / "new")
    made = engine._trt.Refitter.made
    refit(engine, C)
    assert engine.route == ("direct", "")
    assert engine._trt.Refitter.made == made + 2  # of the two engines, neither with a refit
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])


def test_a_weight_that_stays_fixed_is_known_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what the engine holds, and yet TensorRT need not refit it."""
    stored_by(tmp_path)
    writes: list[str] = []
    write = Folding.write
    monkeypatch.setattr(
        Folding, "write", lambda self, name, data: (writes.append(name), write(self, name, data))
    )
    engine, handle = engine_with(Folding, A, cache=tmp_path)
    refit(engine, C)
    assert sorted(writes) == sorted(A)  # as the other engine was opened
    other = {**C, "sizes": torch.tensor([9, 9], dtype=torch.int32)}
    refit(engine, other)
    assert engine.route[0] == "refitter"
    assert torch.equal(handle.engine.values()["sizes"], other["sizes"])


def test_bytes_of_a_refitted_engine_are_known_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, handle = engine_with(PlacedEngine, PLAIN, cache=tmp_path)
    engine.adopt(slot_values(engine, PLAIN))
    refit(engine, PLAIN_B)
    data = handle.engine_bytes()
    known._of_process.clear()
    monkeypatch.setattr(route, "learn", None)
    second, its = engine_with(PlacedEngine, PLAIN_B, cache=tmp_path)
    its.stored = data
    refit(second, PLAIN)
    assert second.route == ("direct", "")
    assert torch.equal(memory(its, "linear"), flat(A)["linear"])


@pytest.mark.parametrize("kind", [Folding, PlacedEngine])
def test_a_loaded_engine_is_warmed_without_its_weights(
    kind: type[PlacedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = A if kind is Folding else PLAIN
    first, _ = engine_with(kind, values, cache=tmp_path)
    first.adopt(slot_values(first, values))
    refit(first, {name: B[name] for name in values})
    known._of_process.clear()
    engine, handle = engine_with(kind, values, cache=tmp_path)
    told: list[str] = []
    engine.warm(told.append)
    assert "compiles nothing" in told[-1]
    assert isinstance(handle.engine, kind)
    assert same_state(handle.engine.values(), flat(values))  # as it was loaded
    engine.warm(told.append)  # again
    monkeypatch.setattr(PersistentRefitter, "refit", None)
    before = handle.engine_bytes()
    staged = refit(engine, {name: C[name] for name in values})
    assert engine.route == ("direct", "")
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])
    staged.rollback()
    assert handle.engine_bytes() == before
    assert same_state(handle.engine.values(), flat(values))
    refit(engine, {name: B[name] for name in values})
    assert torch.equal(handle.engine.values()["linear"], flat(B)["linear"])


def test_a_change_of_what_stays_fixed_after_warming(tmp_path: Path) -> None:
    stored_by(tmp_path)
    engine, handle = engine_with(Folding, A, cache=tmp_path)
    engine.warm(lambda _: None)
    other = {**C, "sizes": torch.tensor([9, 9], dtype=torch.int32)}
    refit(engine, other)
    assert engine.route[0] == "refitter"
    assert torch.equal(handle.engine.values()["sizes"], other["sizes"])
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])


def test_without_a_layout_nothing_is_opened_to_warm(tmp_path: Path) -> None:
    engine, handle = engine_with(Folding, A, cache=tmp_path)
    before, told = handle.engine, list[str]()
    engine.warm(told.append)
    assert "still compiles" in told[-1]
    assert handle.engine is before


def rewritten(file: Path, change: Callable[[Any], None]) -> None:
    """Change what a file says, and its digest with it."""
    _, _, content = file.read_bytes().partition(b"\n")
    data = json.loads(content)
    change(data)
    content = json.dumps(data).encode()
    file.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def changed_place(**more: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        start, digits, dtype = data["places"]["linear"]
        found = {"start": start, "digits": digits, "dtype": dtype, **more}
        data["places"]["linear"] = [found["start"], found["digits"], found["dtype"]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed_place(start=1 << 40),
        changed_place(start=-4),
        changed_place(start=0),  # where another weight lies, or before all of them
        changed_place(digits=[[48, 0]]),
        changed_place(digits=[[47, 1]]),
        changed_place(digits=[[2, 1]] * 9),
        changed_place(dtype="float64"),
        changed_place(dtype="nothing"),
        lambda data: data.update(piece=7),
        lambda data: data.update(nbytes=1 << 20),
        lambda data: data.update(places={}),
        lambda data: data.update(memory="0" * 32),
        lambda data: data.update(memory="z"),
        lambda data: data.update(key=["another"]),
        lambda data: data.update(format="refitkit-layout/2"),
        lambda data: data.update(more=1),
        lambda data: data.update(folds=[["a", "b", "c", "d", "e"]]),
        lambda data: data["fixed"].append("nothing"),
    ],
)
def test_a_layout_that_does_not_fit_is_found_out_again(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    file = stored_by(tmp_path)
    before = file.read_bytes()
    rewritten(file, change)
    engine, handle = engine_with(Folding, A, cache=tmp_path)
    for values in (C, B):
        refit(engine, values)
        assert engine.route == ("direct", "")
        assert torch.equal(memory(handle, "linear"), flat(values)["linear"])
        assert torch.equal(memory(handle, "half"), values["half"])
    found = json.loads(file.read_bytes().partition(b"\n")[2])
    assert found["places"] == json.loads(before.partition(b"\n")[2])["places"]


@given(at=st.integers(0, 1 << 16), byte=st.integers(0, 255), cut=st.booleans())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_file_is_never_believed(
    at: int, byte: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    file = stored_by(folder)
    content = bytearray(file.read_bytes())
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] ^= byte or 1
    file.write_bytes(content)
    engine, handle = engine_with(Folding, A, cache=folder)
    refit(engine, C)
    assert same_state({"half": memory(handle, "half")}, {"half": C["half"]})
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])
    known._of_process.clear()


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    engine, handle = engine_with(Folding, A, cache=tmp_path / "file")
    refit(engine, B)
    assert engine.route == ("direct", "")
    assert torch.equal(memory(handle, "linear"), flat(B)["linear"])
