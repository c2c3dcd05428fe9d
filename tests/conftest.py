"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

from refitkit.config import NO_PLUGIN_VARIABLE

# The same examples everywhere and on every run; no timing assertions, no files left behind.
settings.register_profile("refitkit", deadline=None, derandomize=True, database=None)
settings.load_profile("refitkit")


@pytest.fixture(autouse=True)
def _no_plugins_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer has switched off in the shell must not change what is tested."""
    monkeypatch.delenv(NO_PLUGIN_VARIABLE, raising=False)
