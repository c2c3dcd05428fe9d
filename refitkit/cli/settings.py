"""Settings of pipelines as the command line gives them: of a file, and over them of flags."""

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


class Settings:
    """Fields of :class:`refitkit.Config`, from ``--config`` and from flags; flags win.

    A flag takes the place of the whole field that a file has, but of ``plugin_settings``, which are
    put together key by key.

    Attributes:
        file: The file; None where none was given.
        rules: Fields of ``Config.rules`` that flags gave.
        side_rules: The same for one side of ``diff`` alone: A, B.
        plugins: Settings of plugins that flags gave.
    """

    def __init__(self) -> None:
        """Nothing was given yet."""
        self.file: Path | None = None
        self.rules: dict[str, Any] = {}
        self.side_rules: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
        self.plugins: dict[str, dict[str, Any]] = {}
        self._of_file: dict[str, Any] = {}

    def read(self, file: Path) -> None:
        """Take the settings of a file.

        Raises:
            ConfigError: It cannot be read, or holds what are no settings; names the file.
        """
        self.file, self._of_file = file, read_settings(file)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the file in errors of what is in it: settings of plugins that do not exist.

        Raises:
            ConfigError: As it was raised inside.
        """
        try:
            yield
        except ConfigError as exc:
            if self.file is None:
                raise
            message = f"The settings in {str(self.file)!r} cannot be used: {exc.message}"
            raise ConfigError(message, problems=exc.problems, hint=exc.hint) from exc

    def merged(self) -> dict[str, Any]:
        """All of them, as plain data."""
        found = dict(self._of_file)
        if self.rules:
            found["rules"] = {**found.get("rules", {}), **self.rules}
        if self.plugins:
            of_file = found.get("plugin_settings", {})
            found["plugin_settings"] = {
                **of_file,
                **{name: {**of_file.get(name, {}), **keys} for name, keys in self.plugins.items()},
            }
        return found


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, by fields of ``Config``.

    Raises:
        ConfigError: It is missing, of another kind, or does not parse; or settings do not exist or
            have wrong types. Names the file, and all of them.
    """
    name = repr(str(file))
    check_readable(file, ConfigError)
    if not file.is_file():
        raise ConfigError(f"There is no file {name}.")
    try:
        found = _parsed(file)
    except (ValueError, RecursionError) as exc:  # the errors of both parsers, and of UTF-8
        raise ConfigError(f"The settings in {name} cannot be read: {exc}.") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{name} holds a {type(found).__name__}, not settings by name.")
    try:
        Config.of(found)
    except ConfigError as exc:
        message = f"The settings in {name} cannot be used."
        raise ConfigError(message, problems=exc.problems, hint=exc.hint) from exc
    return found


def _parsed(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        return tomllib.loads(text)
    if file.suffix == ".json":
        return json.loads(text)
    raise ValueError("its name ends neither in .toml nor in .json")
