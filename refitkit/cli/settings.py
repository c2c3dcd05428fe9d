"""Settings of pipelines from the command line: those of a file, overridden by those of flags."""

from __future__ import annotations

import json
import tomllib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refitkit.cli.files import check_readable
from refitkit.config import Config
from refitkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class CommandSettings:
    """Fields of :class:`refitkit.Config`, from ``--config`` and from flags; flags win.

    A flag replaces the whole field of the file. Only ``plugin_settings`` are merged key by key.

    Attributes:
        file: File of ``--config``; None if it was not given.
        rules: Fields of ``Config.rules`` from flags.
        side_rules: Fields of ``Config.rules`` from flags for one side of ``diff``, by ``a`` and
            ``b``.
        plugins: Settings of plugins from flags, by the plugin's name.
    """

    def __init__(self) -> None:
        """Start without any settings."""
        self.file: Path | None = None
        self.rules: dict[str, Any] = {}
        self.side_rules: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
        self.plugins: dict[str, dict[str, Any]] = {}
        self._of_file: dict[str, Any] = {}

    def read(self, file: Path) -> None:
        """Read the settings of a file.

        Raises:
            ConfigError: The file cannot be read, or its settings are invalid; names the file.
        """
        self.file, self._of_file = file, read_settings(file)

    @contextmanager
    def naming_file(self) -> Iterator[None]:
        """Name the file in a ``ConfigError`` of the body, such as settings of an unknown plugin.

        Raises:
            ConfigError: The body raised it; its message now names the file.
        """
        try:
            yield
        except ConfigError as exc:
            if self.file is None:
                raise
            message = f"The settings in {str(self.file)!r} cannot be used: {exc.message}"
            raise ConfigError(message, problems=exc.problems, hint=exc.hint) from exc

    def merged(self) -> dict[str, Any]:
        """All settings of the file and of flags, as plain data."""
        merged = dict(self._of_file)
        if self.rules:
            merged["rules"] = {**merged.get("rules", {}), **self.rules}
        if self.plugins:
            # a flag for one key must not drop the other keys of the file
            of_file = merged.get("plugin_settings", {})
            merged["plugin_settings"] = {
                **of_file,
                **{name: {**of_file.get(name, {}), **keys} for name, keys in self.plugins.items()},
            }
        return merged


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, by fields of ``Config``.

    Raises:
        ConfigError: The file is missing, has another suffix or does not parse; or settings do not
            exist or have wrong types. Names the file, and lists all these settings.
    """
    name = repr(str(file))
    check_readable(file, ConfigError)
    if not file.is_file():
        raise ConfigError(f"There is no file {name}.")
    try:
        settings = _parsed(file)
    # Both parsers and the UTF-8 decoder raise ValueErrors; deep JSON raises RecursionError.
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"The settings in {name} cannot be read: {exc}.") from exc
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} holds a {type(settings).__name__}, not settings by name.")
    try:
        Config.of(settings)
    except ConfigError as exc:
        message = f"The settings in {name} cannot be used."
        raise ConfigError(message, problems=exc.problems, hint=exc.hint) from exc
    # The plain data, not the Config: a Config also holds defaults, which would override others.
    return settings


def _parsed(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        return tomllib.loads(text)
    if file.suffix == ".json":
        return json.loads(text)
    raise ValueError("its name does not end in .toml or .json")
