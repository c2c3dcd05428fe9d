"""Settings, held against the plugins that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host


def require_plugins(config: Config, host: Host) -> None:
    """Check that all plugins are there that have settings.

    Raises:
        ConfigError: Some are not; lists them, and those that there are.
    """
    names = {info.name for info in host.plugins()}
    strange = [name for name in config.plugin_settings if name not in names]
    if strange:
        problems = [Problem(f"plugin_settings.{name}", "no such plugin") for name in strange]
        hint = f"There are: {', '.join(sorted(names))}."
        raise ConfigError(
            "There are settings of plugins that do not exist.", problems=problems, hint=hint
        )
