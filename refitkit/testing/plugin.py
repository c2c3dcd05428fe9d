"""The pytest plugin: fixtures for tests of plugins. Loading it imports nothing but pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.host import Host
    from refitkit.pipeline import Pipeline
    from refitkit.testing.fakes import FakeModule, OpenEngine


@pytest.fixture
def refitkit_host() -> Callable[..., Host]:
    """Make a host of the built-ins and the given plugins: nothing installed takes part.

    ``refitkit_host(*plugins, **settings)``; settings are those of :class:`refitkit.config.Config`.
    """
    from refitkit.host import make_host
    from refitkit.testing.scenes import isolated_config

    def make(*plugins: object, **settings: object) -> Host:
        return make_host(isolated_config(**settings), plugins)

    return make


@pytest.fixture
def refitkit_pipeline() -> Callable[..., Pipeline]:
    """Make a pipeline of the built-ins and the given plugins: nothing installed takes part.

    ``refitkit_pipeline(*plugins, **settings)``.
    """
    from refitkit.pipeline import Pipeline
    from refitkit.testing.scenes import isolated_config

    def make(*plugins: object, **settings: object) -> Pipeline:
        return Pipeline(isolated_config(**settings), plugins)

    return make


@pytest.fixture
def refitkit_engine() -> OpenEngine:
    """An engine in memory that keeps every contract: a matrix ``w`` and a vector ``b``."""
    import torch

    from refitkit.testing.fakes import OpenEngine

    return OpenEngine("engine", {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)})


@pytest.fixture
def refitkit_module(refitkit_engine: OpenEngine) -> FakeModule:
    """An opened module around ``refitkit_engine``, with a plan inside it.

    A ``SceneModule``: with ``ScenePlugin`` among its plugins, a pipeline can load and refit it.
    """
    from refitkit.testing.scenes import planned_module

    return planned_module([refitkit_engine])
