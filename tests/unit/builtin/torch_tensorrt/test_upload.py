"""Room for weights, and the way into it."""

from __future__ import annotations

import pytest
import torch

from refitkit.builtin.torch_tensorrt.arena import Arena, Layout
from refitkit.builtin.torch_tensorrt.upload import Uploader
from refitkit.builtin.torch_tensorrt.weighttypes import WeightFact
from refitkit.program.bits import same_bits
from tests.unit.builtin.torch_tensorrt.scenes import CPU


def fact(name: str, dtype: str, count: int) -> WeightFact:
    return WeightFact(name, dtype, count, "", count)


FACTS = [
    fact("a", "float32", 5),
    fact("b", "float16", 300),
    fact("c", "float32", 64),
    fact("none", "float32", 0),
    fact("bool", "bool", 3),
]


def test_weights_lie_apart_aligned_and_by_type() -> None:
    layout = Layout.of(FACTS)
    arena = Arena(layout, CPU)
    for number, one in enumerate(FACTS):
        view = arena.views[one.name]
        assert view.shape == (one.count,)
        assert layout.offsets[one.name] % 256 == 0
        view.fill_(number + 1)
    for number, one in enumerate(FACTS):
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
