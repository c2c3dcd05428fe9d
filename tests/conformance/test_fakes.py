"""The fakes of the kit pass its own suites."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from refitkit.testing import EngineSuite
from refitkit.testing.fakes import FakeEngine, OpenEngine, Tripwire

if TYPE_CHECKING:
    from collections.abc import Iterator

VALUES = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "half": torch.zeros(3).half(),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
    "whole": torch.zeros(2, 4, dtype=torch.int8),
    "flags": torch.zeros(3, dtype=torch.bool),
    "scalar": torch.zeros(()),
    "nothing": torch.zeros(0, 3),
    "eighth": torch.zeros(4).to(torch.float8_e4m3fn),
}


class TestOpenEngine(EngineSuite):
    kind: type[FakeEngine] = OpenEngine

    def make_engine(self) -> Any:
        return self.kind("engine", VALUES, Tripwire())

    def held(self, engine: Any) -> dict[str, torch.Tensor]:
        return dict(engine.live)

    def commit_fault(self, engine: Any) -> Any:
        return failing(engine, "commit-half")

    def rollback_fault(self, engine: Any) -> Any:
        return failing(engine, "rollback")


class TestFakeEngine(TestOpenEngine):
    kind = FakeEngine


class Wire(Tripwire):
    """A tripwire that raises at some labels."""

    def __init__(self, *labels: str) -> None:
        super().__init__()
        self.labels = set(labels)

    def __call__(self, label: str) -> None:
        super().__call__(label)
        if label in self.labels:
            raise OSError(label)


@contextmanager
def failing(engine: Any, label: str) -> Iterator[None]:
    """Make an engine's tripwire raise at one more label."""
    before = engine.wire
    engine.wire = Wire(f"{engine.name}.{label}", *getattr(before, "labels", ()))
    try:
        yield
    finally:
        engine.wire = before
