"""The backend ``aotinductor`` and its engines, through the C interface and torch's binding.

The model is compiled once. All other modules are copies of it, or are opened from its file.
"""

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
from refitkit.builtin.aotinductor.engine import SwappingEngine
from refitkit.builtin.aotinductor.native import SWITCH
from refitkit.builtin.aotinductor.opening import open_file
from refitkit.builtin.aotinductor.publishing import PublishingEngine
from refitkit.testing import BackendSuite, EngineSuite, oracles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


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


INPUT = torch.arange(12.0).reshape(4, 3)


@cache
def exported() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(4, 3),))


@cache
def planned() -> refitkit.CompiledModule:
    return refitkit.compile(exported(), prove=False)


def compiled() -> Any:
    return planned().opened


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("module") / "net.refit"
    compiled().save(path, {})
    return path


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on libraries are called through torch's binding."""
    monkeypatch.setenv(SWITCH, "1")


def held(engine: Any) -> dict[str, torch.Tensor]:
    """The constants of the container, which is torch's code and not the engine's."""
    runner = getattr(engine, "runner", None)
    found: dict[str, torch.Tensor]
    found = engine.held() if runner is None else runner.extract_constants_map(False)
    return found


# -- engines --------------------------------------------------------------------------------------


class EngineOfAFile(EngineSuite):
    """An engine that was opened from a file, so it shares no memory with another one."""

    @pytest.fixture(autouse=True)
    def _open(self, saved: Path) -> None:
        self.path = saved

    def make_engine(self) -> Any:
        opened: Any = open_file(self.path)
        return opened.engines["model"]

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        return held(engine)


class PublishingSuite(EngineSuite):
    """What fails in an engine that is called through the C interface."""

    @contextmanager
    def commit_fault(self, engine: Any) -> Iterator[None]:
        """New weights become live, and then the commit fails."""
        publish = engine.publish

        def fail(new: Any) -> None:
            publish(new)
            raise RuntimeError("no such luck")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "publish", fail)
            yield

    @contextmanager
    def rollback_fault(self, engine: Any) -> Iterator[None]:
        def fail(_: Any) -> None:
            raise RuntimeError("no such luck")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "go_back", fail)
            yield

    def test_the_kind_of_engine(self) -> None:
        assert type(self.make_engine()) is PublishingEngine


class TestPublishingEngine(PublishingSuite, EngineOfAFile):
    """All memory is the engine's own."""


class TestSharingEngine(PublishingSuite):
    """All memory but that of state is shared with the engine of the compiled module."""

    def make_engine(self) -> Any:
        return compiled().reopen().engines["model"]

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        return held(engine)


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


@pytest.mark.usefixtures("binding")
class TestSwappingEngine(EngineOfAFile):
    """The engine behind torch's binding."""

    def commit_fault(self, engine: Any) -> Any:
        return failing(engine, "swap_constant_buffer")

    def rollback_fault(self, engine: Any) -> Any:
        return failing(engine, "extract_constants_map")

    def test_the_kind_of_engine(self) -> None:
        assert type(self.make_engine()) is SwappingEngine


# -- backends -------------------------------------------------------------------------------------


class TestBackend(BackendSuite):
    """Modules are called through the C interface."""

    @pytest.fixture(autouse=True)
    def _open(self, saved: Path) -> None:
        self.path = saved

    def make_backend(self) -> Any:
        return AOTInductorBackend()

    def make_program(self) -> Any:
        return copy.deepcopy(exported())

    def make_module(self) -> Any:
        return open_file(self.path)

    def inputs(self) -> Any:
        return (INPUT,)

    def make_parts(self, program: Any, module: Any) -> Any:
        return refitkit_partition(program, module.backend)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        return held(module.engines["model"])


@pytest.mark.usefixtures("binding")
class TestBackendBehindTheBinding(TestBackend):
    """Modules are called through torch's binding."""


# -- the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["c interface", "binding"])
def test_the_oracle_sees_what_calls_see(
    through: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls use the constants that the container returns."""
    if through == "binding":
        monkeypatch.setenv(SWITCH, "1")
    module: Any = open_file(saved)
    engine = module.engines["model"]
    assert bool(engine.binding) is (through == "binding")
    new = oracles.random_values(engine.slots.values(), 1)
    new["order"] = torch.tensor([0, 1])
    engine.stage(oracles.slot_values(engine.slots, new))
    held(engine)["scale"].fill_(0)
    half, calls = held(engine)["small"].float(), held(engine)["calls"].float() + 1
    wanted = torch.where(held(engine)["mask"], half, -half) + calls
    assert module.run((INPUT,), {})["y"] == pytest.approx(wanted.expand(4, 2))
