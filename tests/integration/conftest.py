"""Fixtures of the integration tests. A compile takes seconds, so each model is compiled once."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parts import Inside

    from refitkit.builtin.aotinductor.native import Container, Library
    from refitkit.builtin.aotinductor.publishing import PublishingEngine
    from refitkit.testing.oracles import Storage


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a saved module by the name of its model, with the weights of seed 0."""
    from aoti_models import CASES

    folder = tmp_path_factory.mktemp("modules")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.refit"
        if not path.exists():
            case = CASES[name]
            refitkit.compile(case.program(0)).save(path)
        return path

    return path_of


@pytest.fixture
def fresh(saved: Callable[[str], Path]) -> Callable[[str], refitkit.CompiledModule]:
    """A module of its own by the name of its model, with the weights of seed 0."""

    def load(name: str) -> refitkit.CompiledModule:
        return refitkit.load(saved(name))

    return load


@pytest.fixture(scope="session")
def torch_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A package of ``Small`` that torch itself wrote: with all constants kept, or without."""
    import torch
    from aoti_models import CASES

    folder = tmp_path_factory.mktemp("packages")

    def path_of(kept: bool) -> Path:
        path = folder / f"kept-{kept}.pt2"
        if not path.exists():
            torch._inductor.aoti_compile_and_package(
                CASES["small"].program(0),
                package_path=str(path),
                inductor_configs={"always_keep_tensor_constants": kept},
            )
        return path

    return path_of


# -- engines that publish weights; see ``parts.py`` -----------------------------------------------


@pytest.fixture(scope="session")
def parts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ``Parts``, all 0."""
    from parts import AT, Parts, save

    return save(Parts(), AT, tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def tally_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ``Tally``, all 0."""
    import torch
    from parts import Tally, save

    return save(Tally(), torch.ones(4), tmp_path_factory.mktemp("tally"))


@pytest.fixture
def parts(parts_path: Path) -> refitkit.CompiledModule:
    return refitkit.load(parts_path)


@pytest.fixture
def tally(tally_path: Path) -> refitkit.CompiledModule:
    return refitkit.load(tally_path)


@pytest.fixture
def module(parts: refitkit.CompiledModule) -> Any:
    """``Parts`` without the pipeline, whose commits may wait for calls."""
    return parts.opened


@pytest.fixture
def engine(module: Any) -> PublishingEngine:
    """The engine of ``module``."""
    found: PublishingEngine = module.engines["model"]
    assert not found.binding
    return found


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Everything goes with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> type[Inside]:
    """Starts calls that stop in their turn."""
    from parts import SECONDS, Inside

    from refitkit.builtin.aotinductor.native import Library

    run = Library.run

    def stopping(self: Library, *args: Any) -> Any:
        thread = threading.current_thread()
        if isinstance(thread, Inside):
            thread.entered.set()
            assert thread.go_on.wait(SECONDS)
        return run(self, *args)

    monkeypatch.setattr(Library, "run", stopping)
    return Inside


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[list[Storage]]:
    """The storages of each set of weights that a container was given from now on."""
    from refitkit.builtin.aotinductor.native import Library
    from refitkit.testing.oracles import Storage

    found: list[list[Storage]] = []
    filled = Library.filled

    def recorded(self: Library, owner: Container) -> int:
        found.append([Storage(tensor) for tensor in owner.tensors.values()])
        return filled(self, owner)

    monkeypatch.setattr(Library, "filled", recorded)
    return found


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of a library is called from now on, but for ``Run``."""
    from refitkit.builtin.aotinductor import native

    found: Counter[str] = Counter()
    call = native._Code.call

    def counted(self: Any, name: str, *args: Any) -> None:
        found[name] += 1
        call(self, name, *args)

    monkeypatch.setattr(native._Code, "call", counted)
    return found
