"""Which plugins there are: in use, switched off, broken. None of them is imported here."""

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
    """One plugin as users see it.

    Attributes:
        name: The name to switch it off by.
        state: ``in use``, ``switched off`` or ``broken``.
        origin: ``built-in``, ``explicit``, or the distribution that brings it, with its version.
        distribution: Name of that distribution; empty where there is none.
        version: Its version.
        module: The module that it is, or is in.
        hooks: Kinds of the hooks that it implements, ``first`` or ``all``, by name.
        problem: Why it is broken, and what to do.
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
    """Names of all plugins, whether they are switched on or off."""
    return frozenset({COMMANDS, *(one.name for one in candidates(explicit))})


def unknown_names(session: Session) -> list[str]:
    """Names that were to be switched off, and that no plugin has."""
    return sorted(session.config().switched_off() - known_names(session.plugins))


def all_plugins(session: Session) -> list[KnownPlugin]:
    """All plugins: those in use, in the host's order, then the broken, then those switched off."""
    off = session.config().switched_off()
    there = candidates(session.registered)
    switched_off = {one.name: one for one in there if one.name in off}
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
    """The plugin of the built-in commands is explicit for the host, and built in for users."""
    return "built-in" if name == COMMANDS else origin
