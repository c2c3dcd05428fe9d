"""Weight sources of plugins and users, whose answers are checked where they enter."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import PluginError
from refitkit.model import TensorInfo
from refitkit.offered import received, shown

if TYPE_CHECKING:
    from refitkit.protocols import WeightSource

_HOOK = "refitkit_load_weights"
_OWN = "refitkit."


class ForeignSource:
    """A source as it is, but that wrong answers raise an error which names who gave them.

    Attributes:
        original: The source.
    """

    def __init__(self, source: WeightSource, plugin: str) -> None:
        """Ask nothing yet but for the description.

        Args:
            source: The source.
            plugin: Name of its plugin; empty if a user made it.

        Raises:
            PluginError: The description is no text.
        """
        self.original = source
        self._who = f"The plugin {plugin!r} ({_HOOK})" if plugin else "The given source"
        self._names: object = self  # the last ones that were checked
        self._require(str, source.description, "description")

    def __getattr__(self, name: str) -> Any:
        """Whatever else the source can do."""
        return getattr(self.original, name)

    def names(self) -> Collection[str]:
        """See ``WeightSource``."""
        found = self.original.names()
        if found is not self._names:  # they are asked for often
            self._require(Collection, found, "names()")
            odd: list[object] = [name for name in found if not isinstance(name, str)]
            if odd:
                raise PluginError(f"{self._subject('names()')} gave {shown(odd[0])} as a name.")
            self._names = found
        return found

    def info(self, fqn: str) -> TensorInfo:
        """See ``WeightSource``."""
        found = self.original.info(fqn)
        self._require(TensorInfo, found, f"info({fqn!r})")
        return found

    def get(self, fqn: str) -> torch.Tensor:
        """See ``WeightSource``."""
        found = self.original.get(fqn)
        self._require(torch.Tensor, found, f"get({fqn!r})")
        return found

    def _require(self, kind: Any, value: object, method: str) -> None:
        received(value, kind, self._subject(method))

    def _subject(self, method: str) -> str:
        return f"{self._who}: {type(self.original).__name__}.{method}"


def watched(source: WeightSource, plugin: str = "") -> WeightSource:
    """Return a source whose answers are checked, unless it is one of refitkit's own.

    Args:
        source: The source.
        plugin: Name of its plugin; empty if a user made it.
    """
    kind = type(source)
    is_own = kind.__module__.startswith(_OWN) and not kind.__module__.startswith(f"{_OWN}testing")
    return source if is_own else ForeignSource(source, plugin)


def unwatched(source: WeightSource) -> WeightSource:
    """Return the source that was given."""
    return source.original if isinstance(source, ForeignSource) else source
