"""Room for weights, and the way into it."""

from __future__ import annotations

import pytest
import torch

from refitkit.builtin.torch_tensorrt.refitter import WeightSpec
from refitkit.builtin.torch_tensorrt.weight_buffers import Arena, Layout, Uploader
from refitkit.program.bits import same_bits
from tests.unit.builtin.torch_tensorrt.scenes import CPU


def spec(name: str, dtype: str, count: int) -> WeightSpec:
    return WeightSpec(name, dtype, count, "", count)


SPECS = [
    spec("a", "float32", 5),
    spec("b", "float16", 300),
    spec("c", "float32", 64),
    spec("none", "float32", 0),
    spec("bool", "bool", 3),
]


def test_weights_lie_apart_aligned_and_by_type() -> None:
    layout = Layout.of(SPECS)
    arena = Arena(layout, CPU)
    for number, one in enumerate(SPECS):
        view = arena.views[one.name]
        assert view.shape == (one.count,)
        assert layout.offsets[one.name] % 256 == 0
        view.fill_(number + 1)
    for number, one in enumerate(SPECS):
        assert torch.all(arena.views[one.name] == (number + 1 if one.dtype != "bool" else 1))
    floats = arena.runs["float32"]
    assert sorted(set(floats.tolist())) == [0.0, 1.0, 3.0]
    assert layout.nbytes == arena.memory.numel() == 256 + 256 + 256 + 768


@pytest.mark.parametrize("chunk", [1, 7, 16, 4096])
def test_values_go_through_chunks_of_any_size(chunk: int) -> None:
    uploader = Uploader(CPU, chunk)
    values = [
        torch.arange(12.0).reshape(3, 4).T,
        torch.tensor(3.5),
        torch.zeros(0),
        torch.tensor([True, False]),
        torch.arange(4.0).to(torch.float8_e4m3fn),
    ]
    for value in values:
        room = torch.empty(value.numel(), dtype=value.dtype)
        uploader.copy_in_chunks(room, value)
        assert same_bits(room, value.contiguous().reshape(-1))
    uploader.finish()
    assert uploader._chunks == []


VALUES = [
    torch.arange(12.0).reshape(3, 4),
    torch.arange(12.0).reshape(3, 4).T,
    torch.tensor(3.5),
    torch.zeros(0),
    torch.arange(8.0)[::2],
    torch.tensor([True, False]),
    torch.arange(6, dtype=torch.int64),
    torch.arange(7, dtype=torch.float16),
    torch.arange(4.0).to(torch.float8_e4m3fn),
    torch.view_as_complex(torch.arange(4.0).reshape(2, 2)).conj(),
    torch.view_as_complex(torch.arange(4.0).reshape(2, 2)).conj().imag,
]


def rooms_for(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.full((value.numel(),), 77).to(value.dtype) for value in values]


def right(rooms: list[torch.Tensor], values: list[torch.Tensor]) -> bool:
    pairs = zip(rooms, values, strict=True)
    return all(same_bits(room, value.contiguous().reshape(-1)) for room, value in pairs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each call copies."""
    calls: list[int] = []
    real = torch._foreach_copy_

    def counted(rooms: list[torch.Tensor], *args: object, **more: object) -> object:
        calls.append(len(rooms))
        return real(rooms, *args, **more)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    return calls


def test_many_values_are_copied_as_one(calls: list[int]) -> None:
    uploader, rooms = Uploader(CPU), rooms_for(VALUES)
    for room, value in zip(rooms, VALUES, strict=True):
        uploader.copy(room, value)
    assert calls == []
    uploader.finish()
    assert sorted(calls) == [1, 1, 4]  # int64, float16, float32
    assert right(rooms, VALUES)
    uploader.finish()
    assert sorted(calls) == [1, 1, 4]


def test_values_do_not_wait_for_ever(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refitkit.builtin.torch_tensorrt.weight_buffers._QUEUE_BYTES", 40)
    uploader, values = Uploader(CPU), [torch.arange(8.0), torch.arange(3.0), torch.arange(2.0)]
    rooms = rooms_for(values)
    for room, value in zip(rooms, values, strict=True):
        uploader.copy(room, value)
    assert right(rooms[:2], values[:2])
    assert not right(rooms[2:], values[2:])
    uploader.finish()
    assert right(rooms, values)
    assert calls == [2, 1]


@pytest.mark.parametrize("together", [64, 100, 1 << 20])
def test_small_values_of_the_host_go_together(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr("refitkit.builtin.torch_tensorrt.weight_buffers._PACK_BYTES", together)
    values = [value.resolve_conj().resolve_neg() for value in VALUES]
    uploader, rooms = Uploader(CPU), rooms_for(values)
    for _ in range(2):
        for room, value in zip(rooms, values, strict=True):
            uploader.copy_packed(room, value)
            assert uploader._pack_bytes <= max(together, value.nbytes)
        assert uploader._pack_bytes
        uploader.finish()
        assert uploader._pack_bytes == 0
        assert right(rooms, values)
        for room in rooms:
            room.zero_()


def test_a_failed_copy_leaves_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    uploader, room = Uploader(CPU), torch.zeros(4)
    uploader.copy(room[:2], torch.ones(2))
    uploader.copy_packed(room[2:], torch.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr(uploader, "_enqueue", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            uploader.finish()
    uploader.finish()
    assert not room.any()
    uploader.copy(room, torch.ones(4))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            uploader.finish()
    uploader.finish()
    assert not room.any()
