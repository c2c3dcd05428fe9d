"""Settings, held against the plugins that are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host


def require_list(plugins: object) -> None:
    """Check that plugins are given as a list, also one alone.

    Raises:
        ConfigError: They are not.
    """
    if isinstance(plugins, str) or not isinstance(plugins, Iterable):
        raise ConfigError(
            f"Plugins are given as a list, not as a {type(plugins).__name__}.",
            hint="Pipeline(plugins=[plugin]), also of a single one.",
        )


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
