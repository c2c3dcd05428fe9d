"""Settings with which nothing that happens to be installed takes part."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from refitkit.config import Config
from refitkit.host import GROUP


def isolated_config(**settings: Any) -> Config:
    """Settings that switch all plugins off that are installed beside refitkit.

    Args:
        settings: More settings, as :class:`~refitkit.config.Config` has them.

    Raises:
        ConfigError: A setting does not exist or has a wrong type.
    """
    installed = {entry.name for entry in entry_points(group=GROUP)}
    off = frozenset(settings.pop("no_plugins", ())) | installed
    return Config.of({**settings, "no_plugins": off})
