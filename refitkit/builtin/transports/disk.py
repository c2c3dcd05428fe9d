"""The transport ``disk``: checkpoints that trainer and server can both read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.transports.fields import require_fields
from refitkit.errors import ConfigError, SourceError
from refitkit.protocols import MayChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from refitkit.config import Config
    from refitkit.protocols import WeightSource

_PLUGIN = "transports"
_MAX_FILES = 100_000
_BUCKET = 1 << 26  # bytes that are read before they are staged


def roots_in(config: Config) -> tuple[Path, ...] | None:
    """Folders that ``disk`` may read from, links resolved; None: all.

    Raises:
        ConfigError: ``plugin_settings.transports.roots`` is no list of folders.
    """
    settings = config.plugin_settings.get(_PLUGIN, {})
    require_fields(f"plugin_settings.{_PLUGIN}", {**settings}, {"roots": list} if settings else {})
    roots = settings.get("roots")
    if roots is None:
        return None
    if not all(isinstance(root, str | Path) for root in roots):
        raise ConfigError(f"plugin_settings.{_PLUGIN}.roots must be a list of folders.")
    return tuple(Path(root).resolve() for root in roots)


class DiskTransport:
    """Reads a file or folder: ``{"update_info": {"path": "/checkpoints/step-42"}}``."""

    name = "disk"

    def __init__(self, roots: tuple[Path, ...] | None) -> None:
        """Set the folders.

        Args:
            roots: Folders that may be read, links resolved; None: all.
        """
        self._roots = roots

    def open(
        self, init_info: Mapping[str, Any], open_weights: Callable[[object], WeightSource]
    ) -> DiskConnection:
        """Return a connection; nothing is read yet."""
        require_fields("init_info of 'disk'", init_info, {})
        return DiskConnection(self._roots, open_weights)


class DiskConnection:
    """Reads checkpoints, each from one file or folder."""

    def __init__(
        self, roots: tuple[Path, ...] | None, open_weights: Callable[[object], WeightSource]
    ) -> None:
        """Read nothing yet; see ``DiskTransport``."""
        self._roots, self._open_weights = roots, open_weights

    def receive(self, update_info: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """Return the tensors of one file or folder, some at a time.

        Args:
            update_info: ``path``: the path, absolute.

        Raises:
            ConfigError: The path is not absolute, or lies outside of the allowed folders.
            SourceError: It cannot be read, or was written to meanwhile.
        """
        require_fields("update_info of 'disk'", update_info, {"path": str})
        source = self._open_weights(self._allowed(Path(update_info["path"])))
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name in source.names():
            bucket[name] = source.get(name)
            size += bucket[name].nbytes
            if size >= _BUCKET:
                yield bucket
                bucket, size = {}, 0
        if bucket:
            yield bucket
        # before the update can be finished: all that was read must be one version
        if isinstance(source, MayChange):
            source.require_unchanged()

    def _allowed(self, path: Path) -> Path:
        if not path.is_absolute():
            raise ConfigError(f"The path {str(path)!r} is not absolute.")
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as exc:  # ValueError: a null character
            raise SourceError(f"There is no file or folder {str(path)!r}.") from exc
        if self._roots is not None:
            # files in a folder may be links, too
            for file in [resolved, *islice(resolved.rglob("*"), _MAX_FILES)]:
                self._require_allowed(file)
        return resolved

    def _require_allowed(self, path: Path) -> None:
        resolved = path.resolve()
        if self._roots is not None and not any(map(resolved.is_relative_to, self._roots)):
            hint = f"Add its folder to plugin_settings.{_PLUGIN}.roots."
            raise ConfigError(f"{str(path)!r} lies outside of the allowed folders.", hint=hint)
        if not resolved.is_file() and not resolved.is_dir():
            raise ConfigError(f"{str(path)!r} is neither a file nor a folder.")

    def close(self) -> None:
        """Do nothing: no file stays open."""
