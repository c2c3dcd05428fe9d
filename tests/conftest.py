"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

from refitkit.config import NO_PLUGIN_VARIABLE
from refitkit.testing import plugin

# The same examples everywhere and on every run; no timing assertions, no files left behind.
settings.register_profile("refitkit", deadline=None, derandomize=True, database=None)
settings.load_profile("refitkit")


@pytest.fixture(autouse=True)
def _no_plugins_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer has switched off in the shell must not change what is tested."""
    monkeypatch.delenv(NO_PLUGIN_VARIABLE, raising=False)


def pytest_configure(config: pytest.Config) -> None:
    """Load the plugin of the kit where its entry point is not installed."""
    if not config.pluginmanager.has_plugin("refitkit"):
        config.pluginmanager.register(plugin, "refitkit")
