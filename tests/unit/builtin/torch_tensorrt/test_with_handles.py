"""The persistent refitter behind the real handle of ``PythonTorchTensorRTModule``."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.children import PythonModuleEngine
from refitkit.builtin.torch_tensorrt.engine import create_engine
from refitkit.errors import EngineError
from tests.fakes import Tripwire, same_state
from tests.unit.builtin.torch_tensorrt.fake_trt import (
    FakeCudaEngine,
    Refusal,
    engine_from,
    fake_trt,
)
from tests.unit.builtin.torch_tensorrt.scenes import options_for, slot_values, values_of

A, B, C = (values_of("e", seed) for seed in range(3))


class Child(torch.nn.Module):
    """What the handle uses of upstream's class (2.11)."""

    settings = weight_name_map = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.serialized_engine = data
        self.runtime_states = SimpleNamespace(context_changed=False)
        self.setup_engine()

    def setup_engine(self) -> None:
        self.engine = engine_from(self.serialized_engine, Tripwire())

    def _reset_captured_graph(self) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> Child:
        return Child(self.serialized_engine)


@pytest.fixture
def child() -> Child:
    return Child(FakeCudaEngine.of(A, Tripwire()).stored())


@pytest.fixture
def engine(child: Child) -> Any:
    handle = PythonModuleEngine("e", child)
    return create_engine(handle, fake_trt(Tripwire()), options_for(A, "e"))


def holds(child: Child, values: dict[str, torch.Tensor]) -> bool:
    """Live, in a copy, and in the copy of a copy."""
    flat = {name: value.reshape(-1) for name, value in values.items()}
    copied = copy.deepcopy(child)
    return all(
        same_state(one.engine.values(), flat) for one in (child, copied, copy.deepcopy(copied))
    )


def test_refits_and_rollbacks_reach_every_copy(engine: Any, child: Child) -> None:
    for before, after in ((A, B), (A, C)):  # the first goes back by bytes, later ones by refits
        staged = engine.stage(slot_values(engine, after))
        staged.commit()
        assert holds(child, after)
        staged.rollback()
        assert holds(child, before)
    engine.stage(slot_values(engine, C)).commit()
    staged = engine.stage(slot_values(engine, B))
    staged.commit()
    staged.rollback()
    assert holds(child, C)


def test_a_first_refit_that_fails_half_way(engine: Any, child: Child) -> None:
    staged = engine.stage(slot_values(engine, B))
    child.engine.wire.arm()
    engine._refitter._refitter.wire.arm({2: Refusal()})
    with pytest.raises(EngineError):
        staged.commit()
    with pytest.raises(EngineError, match="mixture"):
        copy.deepcopy(child)
    staged.rollback()
    assert holds(child, A)
