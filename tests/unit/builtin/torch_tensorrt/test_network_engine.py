"""The engines of the network backend, without TensorRT: parts that torch runs, and their files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.network.engine import NetworkEngine, ScratchFolder
from refitkit.builtin.torch_tensorrt.parts import Structure
from refitkit.testing.scenes import make_slot
from tests.unit.builtin.torch_tensorrt.scenes import slot_values


@pytest.fixture
def engine() -> NetworkEngine:
    structure = Structure(
        name="part", accelerated=False, graph="0" * 64, ops=(), inputs=(), outputs=1
    )
    builder: Any = None  # a part that torch runs is never built
    engine = NetworkEngine(structure, [make_slot("w", engine="part")], builder, ScratchFolder())
    engine.adopt({"w": torch.ones(2)}, None)
    return engine


def test_an_interrupt_right_after_the_new_values_are_live(
    engine: NetworkEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = engine.stage(slot_values(engine, {"w": torch.zeros(2)}))
    replace = engine.replace

    def interrupted(built: Any) -> Any:
        replace(built)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        staged.commit()
    monkeypatch.undo()
    staged.rollback()
    assert engine.read("w").tolist() == [1.0, 1.0]
    assert engine.live.region.path.exists()
    assert not engine.previous()


def test_a_rollback_before_the_commit(engine: NetworkEngine) -> None:
    engine.stage(slot_values(engine, {"w": torch.zeros(2)})).rollback()
    assert engine.read("w").tolist() == [1.0, 1.0]
    assert engine.live.region.path.exists()
