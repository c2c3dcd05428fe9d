"""The backend ``aotinductor`` and its engine, compiled once."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.aotinductor import refitkit_partition
from refitkit.builtin.aotinductor.backend import AOTInductorBackend
from refitkit.testing import BackendSuite, EngineSuite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Net(torch.nn.Module):
    """Three float dtypes, integers, booleans, a scalar, and a buffer that calls change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.small = torch.nn.Parameter(torch.randn(2).half())
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("order", torch.tensor([1, 0]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("calls", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.add_(1)
        y = self.linear(x)[:, self.order] * self.scale + self.small
        return {"y": torch.where(self.mask, y, -y) + self.calls.float()}


@cache
def exported() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(4, 3),))


@cache
def planned() -> refitkit.CompiledModule:
    return refitkit.compile(exported(), prove=False)


def compiled() -> Any:
    return planned().opened


def held(engine: Any) -> dict[str, torch.Tensor]:
    """The constants of the container, which is torch's code and not the engine's."""
    found: dict[str, torch.Tensor] = engine.runner.extract_constants_map(False)
    return found


class Runner:
    """A container with failing functions; a failing swap swaps first."""

    def __init__(self, runner: Any, *failing: str) -> None:
        self.runner, self.failing = runner, failing

    def __getattr__(self, name: str) -> Any:
        return self._fail if name in self.failing else getattr(self.runner, name)

    def _fail(self, *_: Any) -> None:
        if "swap_constant_buffer" in self.failing:
            self.runner.swap_constant_buffer()
        raise RuntimeError("no such luck")


@contextmanager
def failing(engine: Any, name: str) -> Iterator[None]:
    before = engine.runner
    engine.runner = Runner(before, name, *getattr(before, "failing", ()))
    try:
        yield
    finally:
        engine.runner = before


class TestEngine(EngineSuite):
    def make_engine(self) -> Any:
        return compiled().reopen().engines["model"]

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        return held(engine)

    def commit_fault(self, engine: Any) -> Any:
        return failing(engine, "swap_constant_buffer")

    def rollback_fault(self, engine: Any) -> Any:
        return failing(engine, "extract_constants_map")


class TestBackend(BackendSuite):
    def make_backend(self) -> Any:
        return AOTInductorBackend()

    def make_program(self) -> Any:
        return copy.deepcopy(exported())

    def make_module(self) -> Any:
        return compiled().reopen()

    def inputs(self) -> Any:
        return (torch.arange(12.0).reshape(4, 3),)

    def make_parts(self, program: Any, module: Any) -> Any:
        return refitkit_partition(program, module.backend)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        return held(module.engines["model"])


def test_the_oracle_sees_what_calls_see() -> None:
    """Calls use the constants that the container returns."""
    module = compiled().reopen()
    engine = module.engines["model"]
    new = TestEngine().make_values(engine, 1)
    new["order"] = torch.tensor([0, 1])
    engine.stage([refitkit.testing.oracles.slot_value(engine.slots[n], v) for n, v in new.items()])
    held(engine)["scale"].fill_(0)
    (x,) = TestBackend().inputs()
    half, calls = held(engine)["small"].float(), held(engine)["calls"].float() + 1
    wanted = torch.where(held(engine)["mask"], half, -half) + calls
    assert module.run((x,), {})["y"] == pytest.approx(wanted.expand(4, 2))
