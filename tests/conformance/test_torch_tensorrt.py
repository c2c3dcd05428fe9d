"""Engines of Torch-TensorRT on a fake TensorRT, and the parts that torch executes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import torch

from refitkit.builtin.torch_tensorrt.direct.arena import PlacedArena
from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from refitkit.program.ambient import WatchingMode
from refitkit.testing import EngineSuite
from refitkit.testing.fakes import Tripwire
from tests.unit.builtin.torch_tensorrt.fake_trt import Refusal
from tests.unit.builtin.torch_tensorrt.scenes import engine_of, slot_values, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Faults(Tripwire):
    """A tripwire that raises at some calls of some labels.

    Attributes:
        refused: Number of calls of a label that pass before all others raise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, int] = {}

    def __call__(self, label: str) -> None:
        super().__call__(label)
        if label in self.refused:
            self.refused[label] -= 1
            if self.refused[label] < 0:
                raise Refusal(label)

    @contextmanager
    def refusing(self, label: str, after: int = 0) -> Iterator[None]:
        self.refused[label] = after
        try:
            yield
        finally:
            self.refused.clear()


class TestPython(EngineSuite):
    """Refits in place in the Python runtime; the weights of a new engine are unknown."""

    runtime = "python"
    faults: ClassVar[tuple[str, str]] = ("refit e CONSTANT", "refit")

    def make_engine(self) -> Any:
        engine, _ = engine_of("e", values_of("e", 0), Faults(), runtime=self.runtime)
        return engine

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = engine.handle.engine.values()
        return found

    def commit_fault(self, engine: Any) -> Any:
        return engine.handle.wire.refusing(self.faults[0])

    def rollback_fault(self, engine: Any) -> Any:
        return engine.handle.wire.refusing(self.faults[1], after=1)


class TestPythonAdopted(TestPython):
    """The same with an engine that knows its weights."""

    def make_engine(self) -> Any:
        engine = super().make_engine()
        engine.adopt(slot_values(engine, values_of("e", 0)))
        return engine


class TestDirect(TestPython):
    """Refits past the refitter. The first one has been made."""

    runtime = "direct"

    def make_engine(self) -> Any:
        engine = super().make_engine()
        engine.stage(slot_values(engine, values_of("e", 0))).commit()
        assert engine.route == ("direct", "")
        return engine

    def commit_fault(self, _engine: Any) -> Any:
        return _raising(after=0)

    def rollback_fault(self, _engine: Any) -> Any:
        return _raising(after=1)


@contextmanager
def _raising(after: int) -> Iterator[None]:
    """Copies to the engine's memory fail, but for the first ones."""
    left, commit = [after], PlacedArena.commit

    def failing(arena: PlacedArena) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Refusal("commit")
        commit(arena)

    with patch.object(PlacedArena, "commit", failing):
        yield


class TestCpp(TestPython):
    """Refits through a second engine, in the C++ runtime."""

    runtime = "cpp"

    def commit_fault(self, engine: Any) -> Any:
        return engine.handle.wire.refusing("e.was_put")

    def rollback_fault(self, engine: Any) -> Any:
        return engine.handle.wire.refusing("e.put", after=1)


class Part(torch.nn.Module):
    """Parameters and buffers of several dtypes, one of them not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 2).t())
        self.small = torch.nn.Parameter(torch.randn(4).half())
        self.turn = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.register_buffer("order", torch.tensor([1, 0]))
        self.register_buffer("empty", torch.zeros(0, 2))

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.weight, self.small, self.turn, self.order, self.empty


class LiveWrites(WatchingMode):
    """Makes some writes to the live tensors of a part fail, counted from 1."""

    def __init__(self, engine: TorchPartEngine, first: int, last: int) -> None:
        super().__init__()
        self.live = {tensor.data_ptr() for tensor in engine.live.values() if tensor.numel()}
        self.first, self.last, self.count = first, last, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() in self.live:
            self.count += 1
            if self.first <= self.count <= self.last:
                raise RuntimeError("no such luck")
        return func(*args, **(kwargs or {}))


class TestTorchPart(EngineSuite):
    def make_engine(self) -> Any:
        return TorchPartEngine("part", torch.fx.symbolic_trace(Part()))

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        return dict(engine._module.state_dict())

    def commit_fault(self, engine: Any) -> Any:
        return LiveWrites(engine, 2, 2)

    def rollback_fault(self, engine: Any) -> Any:
        return LiveWrites(engine, 4, 4)
