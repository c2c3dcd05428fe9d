"""Read weight sources of plugins, and check their answers.

A source is handed to plugins as it is, because they may know its class. So it is not wrapped, and
refitkit's own code reads through this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from refitkit.errors import PluginError, SourceError, raised_as
from refitkit.model import TensorInfo
from refitkit.offered import received, shown
from refitkit.program.dtypes import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.protocols import WeightSource

_DOING = "The weights cannot be read"
_makers: dict[type, str] = {}
"""Name of the plugin that returned a source of this class last."""


def require_source(source: WeightSource, plugin: str = "") -> None:
    """Check the names and the description of a source, and note whose it is.

    Args:
        source: The source.
        plugin: Name of the plugin that gave it; empty if a user did.

    Raises:
        PluginError: They are no texts; names plugin and hook.
        SourceError: The source failed to give them.
    """
    if _is_own(source):
        return
    _makers[type(source)] = plugin
    who = _who(source, "description")
    with raised_as(SourceError, f"{who} failed", doing=_DOING):
        received(source.description, str, who)
    who = _who(source, "names()")
    with raised_as(SourceError, f"{who} failed", doing=_DOING):
        names: Any = received(source.names(), Iterable, who)  # type: ignore[type-abstract]
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise PluginError(f"{who} gave {shown(odd)} as a name.")


def info_of(source: WeightSource, name: str) -> TensorInfo:
    """Return the metadata of an entry.

    Args:
        source: The source.
        name: Name of the entry.

    Raises:
        PluginError: The source gave something else; names plugin and hook.
        SourceError: The source failed.
    """
    if _is_own(source):
        return source.info(name)
    known = _known_infos(source)
    if name not in known:
        who = _who(source, f"info({name!r})")
        with raised_as(SourceError, f"{who} failed", doing=_DOING):
            found: object = source.info(name)
        known[name] = received(found, TensorInfo, who)
    return known[name]


_infos: WeakKeyDictionary[Any, dict[str, TensorInfo]] = WeakKeyDictionary()


def _known_infos(source: WeightSource) -> dict[str, TensorInfo]:
    """Metadata of entries that a source has given; none if it cannot be a key."""
    try:
        return _infos.setdefault(source, {})
    except TypeError:
        return {}


def getter_of(source: WeightSource) -> Callable[[str], torch.Tensor]:
    """Return ``get`` of a source.

    It raises ``SourceError`` if the source fails, and ``PluginError`` if what the source gives is
    no tensor, or not of the dtype and shape of ``info``.
    """
    return source.get if _is_own(source) else partial(_received_tensor, source)


def _received_tensor(source: WeightSource, name: str) -> torch.Tensor:
    who = _who(source, f"get({name!r})")
    with raised_as(SourceError, f"{who} failed", doing=_DOING):
        found: object = source.get(name)
    value, info = received(found, torch.Tensor, who), info_of(source, name)
    if not info.unusable and (info.dtype, info.shape) != (dtype_name(value.dtype), value.shape):
        raise PluginError(
            f"{who} gave {dtype_name(value.dtype)} {tuple(value.shape)}, and info({name!r}) "
            f"{info.dtype} {tuple(info.shape)}.",
            hint="Both have to be of the same tensor.",
        )
    return value


def _is_own(source: WeightSource) -> bool:
    return type(source).__module__.startswith("refitkit.")


def _who(source: WeightSource, method: str) -> str:
    plugin, kind = _makers.get(type(source), ""), type(source).__name__
    of = f" of the plugin {plugin!r} (refitkit_load_weights)" if plugin else ""
    return f"The weight source {kind}{of}: {method}"
