"""The pytest plugin of the kit: fixtures for tests of plugins.

Every pytest run loads it where refitkit is installed. So it imports only pytest, and fixtures
import the rest when they are used.
"""

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
    """A function that makes a host of the built-ins and the given plugins, and no installed ones.

    ``refitkit_host(*plugins, **settings)``: settings are those of :class:`refitkit.config.Config`.
    """
    from refitkit.host import make_host
    from refitkit.testing.scenes import isolated_config

    def make(*plugins: object, **settings: object) -> Host:
        return make_host(isolated_config(**settings), plugins)

    return make


@pytest.fixture
def refitkit_pipeline() -> Callable[..., Pipeline]:
    """A function that makes a pipeline of the built-ins and given plugins, and no installed ones.

    ``refitkit_pipeline(*plugins, **settings)``: settings are those of
    :class:`refitkit.config.Config`.
    """
    from refitkit.pipeline import Pipeline
    from refitkit.testing.scenes import isolated_config

    def make(*plugins: object, **settings: object) -> Pipeline:
        return Pipeline(isolated_config(**settings), plugins)

    return make


@pytest.fixture
def refitkit_engine() -> OpenEngine:
    """An engine in memory that keeps every contract.

    Its slots are ``w``, float32 of shape (2, 3), and ``b``, float32 of shape (2,).
    """
    import torch

    from refitkit.testing.fakes import OpenEngine

    return OpenEngine("engine", {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)})


@pytest.fixture
def refitkit_module(refitkit_engine: OpenEngine) -> FakeModule:
    """An opened module around ``refitkit_engine``, with an attached plan.

    It is a ``SceneModule``: a pipeline with the plugin ``ScenePlugin`` can load and refit it.
    """
    from refitkit.testing.scenes import planned_module

    return planned_module([refitkit_engine])
