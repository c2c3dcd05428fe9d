"""Backends of all plugins, by name, and what they say of saved modules without running any code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, UnsupportedTargetError
from refitkit.pipeline.needs import described as described_need
from refitkit.pipeline.saved import PLAN_MEMBER
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.host import Host
    from refitkit.protocols import Backend
    from refitkit.recipe.plan import Opener

_HOOK = "refitkit_register_backends"


def registered(host: Host) -> dict[str, Backend]:
    """All backends by name.

    Raises:
        PluginError: A plugin failed, or two have a backend of one name; names them.
    """
    owners: dict[str, str] = {}
    backends: dict[str, Backend] = {}
    for info in host.plugins():
        given: list[Backend] = []
        if _HOOK in info.hooks:
            host.call_one(info.name, _HOOK, register=given.append)
        for backend in given:
            host.claim(owners, backend, info.name, _HOOK)
            backends[backend.name] = backend
    return backends


def named(backends: Mapping[str, Backend], name: str) -> Backend:
    """The backend of a name; see ``Pipeline.backend``."""
    if name not in backends:
        hint = f"There are: {', '.join(sorted(backends))}."
        raise ConfigError(f"There is no backend {name!r}.", hint=hint)
    return backends[name]


def described(backends: Mapping[str, Backend], path: str | Path) -> Mapping[str, Any]:
    """What the backend that saved a module says of its file; see ``Pipeline.describe``."""
    path = Path(path)
    if not path.exists():
        raise UnsupportedTargetError(f"There is no file {str(path)!r}.")
    for backend in backends.values():
        found = backend.describe(path)
        if found is not None:
            return {**found, **_of_plan(backend, path)}
    raise UnsupportedTargetError(f"{str(path)!r} is no saved module of any backend.")


def _of_plan(backend: Backend, path: Path) -> Mapping[str, Any]:
    """What the plan of a saved module needs of plugins, and says of weights without a slot."""
    attached = backend.attachments(path)
    if PLAN_MEMBER not in attached:
        return {}
    data = RefitPlan.from_bytes(attached[PLAN_MEMBER], f"the plan of {str(path)!r}").data
    needs = [f"{need.kind} {need.name} of {described_need(need)}" for need in data.needs]
    said = {"needs": needs, "without_slot": dict(data.unreached)}
    return {name: value for name, value in said.items() if value}


def plan_in(backends: Mapping[str, Backend], path: str | Path, opener: Opener) -> RefitPlan:
    """The plan in a plan file or in a saved module; see ``Pipeline.read_plan``."""
    path = Path(path)
    for backend in backends.values() if path.exists() else ():
        attached = backend.attachments(path)
        if PLAN_MEMBER in attached:
            return RefitPlan.from_bytes(attached[PLAN_MEMBER], f"the plan of {str(path)!r}", opener)
    return RefitPlan.load(path)
