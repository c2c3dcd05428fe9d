"""Which plugins there are, those that are switched off included. None of them is imported."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from refitkit.cli import plugin as builtin_commands
from refitkit.host import BUILTINS, GROUP, PluginInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.cli.session import Session


def known_names(explicit: Iterable[object] = ()) -> frozenset[str]:
    """Names of all plugins, whether they are switched on or off."""
    names = {*BUILTINS, builtin_commands.name, *(e.name for e in entry_points(group=GROUP))}
    given = (getattr(one, "name", getattr(one, "__name__", "")) for one in explicit)
    return frozenset(names | {name for name in given if isinstance(name, str)})


def unknown_names(session: Session) -> list[str]:
    """Names that were to be switched off, and that no plugin has."""
    return sorted(session.config().switched_off() - known_names(session.plugins))


def all_plugins(session: Session) -> list[PluginInfo]:
    """All plugins: those in use as the host knows them, then those that are switched off."""
    off = session.config().switched_off() & known_names(session.plugins)
    return [
        *(_as_users_see_it(info) for info in session.host.plugins()),
        *(PluginInfo(name, "switched off", ()) for name in sorted(off)),
    ]


def _as_users_see_it(info: PluginInfo) -> PluginInfo:
    """The plugin of the built-in commands is explicit for the host, and built in for users."""
    if info.name != builtin_commands.name:
        return info
    return PluginInfo(info.name, "built-in", info.hooks)
