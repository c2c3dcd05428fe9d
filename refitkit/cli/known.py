"""List all plugins: those in use, those switched off and those that are broken.

Nothing here imports a plugin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from refitkit.cli.session import COMMANDS
from refitkit.host import candidates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from refitkit.cli.session import Session
    from refitkit.host import Candidate, PluginInfo

IN_USE, SWITCHED_OFF, BROKEN = "in use", "switched off", "broken"


@dataclass(frozen=True)
class KnownPlugin:
    """One plugin as commands print it.

    Attributes:
        name: Name that switches the plugin off.
        state: ``in use``, ``switched off`` or ``broken``.
        origin: ``built-in``, ``explicit``, or the plugin's distribution and its version.
        distribution: Name of the plugin's distribution; empty if it has none.
        version: Version of that distribution.
        module: Module that is the plugin or contains it.
        hooks: Kinds of the hooks that the plugin implements, ``first`` or ``all``, by hook.
        problem: Reason why the plugin is broken, with a hint; of a plugin in use, the version of
            refitkit that it needs, if this is another one; else empty.
    """

    name: str
    state: str
    origin: str
    distribution: str
    version: str
    module: str
    hooks: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def known_names(explicit: Iterable[object] = ()) -> frozenset[str]:
    """Names of all plugins, in use or not."""
    # ``candidates`` does not know the plugin of the built-in commands: ``main`` passes it.
    return frozenset({COMMANDS, *(one.name for one in candidates(explicit))})


def unknown_names(session: Session) -> list[str]:
    """Names that are switched off although no plugin has them, sorted."""
    return sorted(session.config().switched_off() - known_names(session.plugins))


def all_plugins(session: Session) -> list[KnownPlugin]:
    """All plugins: those in use in the host's order, then broken ones, then switched-off ones."""
    off = session.config().switched_off()
    existing = candidates(session.registered)
    # two distributions may have a plugin of one name
    switched_off = {(one.name, one.distribution): one for one in existing if one.name in off}
    # A plugin that fails while it adds commands is registered, and broken all the same.
    broken = [one.candidate for one in session.broken]
    in_use = [i for i in session.host.plugins() if session.host.candidate(i.name) not in broken]
    return [
        *(_in_use(session, info) for info in in_use),
        *(_left_out(one.candidate, BROKEN, str(one.error)) for one in session.broken),
        *(_left_out(one, SWITCHED_OFF) for _, one in sorted(switched_off.items())),
    ]


def _in_use(session: Session, info: PluginInfo) -> KnownPlugin:
    return KnownPlugin(
        info.name,
        IN_USE,
        _origin(info.name, info.origin),
        info.distribution,
        info.version,
        info.module,
        {hook: session.host.kind_of(hook) for hook in info.hooks},
        info.misfit,
    )


def _left_out(one: Candidate, state: str, problem: str = "") -> KnownPlugin:
    return KnownPlugin(
        one.name,
        state,
        _origin(one.name, one.origin),
        one.distribution,
        one.version,
        one.module,
        problem=problem,
    )


def _origin(name: str, origin: str) -> str:
    # The host got the plugin of the built-in commands as an explicit one.
    return "built-in" if name == COMMANDS else origin
