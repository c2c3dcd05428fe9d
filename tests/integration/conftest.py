"""Fixtures of the integration tests. A compile takes seconds, so each model is compiled once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable


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
