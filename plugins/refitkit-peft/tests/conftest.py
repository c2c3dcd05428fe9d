"""Fixtures with the models of ``peft_models``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from peft_models import IDS, Made, Net, make_adapter, make_net

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


@pytest.fixture(scope="session")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return IDS


@pytest.fixture
def adapter(tmp_path: Path, net: Net) -> Callable[..., Made]:
    """A function that makes adapters of the small model."""
    made = 0

    def make(seed: int = 1, **config: Any) -> Made:
        nonlocal made
        made += 1
        return make_adapter(net, tmp_path / f"adapter-{made}", seed, **config)

    return make
