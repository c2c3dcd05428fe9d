"""The kit run against a plugin without a test file: what ``refitkit plugins check`` stands on.

A plugin brings its suites in one of two ways: an entry point of the group
``refitkit.conformance`` whose name is the plugin's, or an attribute ``conformance_suites`` of the
plugin. Both are suite classes, or a callable without arguments that gives them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, PluginError, raised_as
from refitkit.testing import running
from refitkit.testing.running import CheckResult, run_suites

if TYPE_CHECKING:
    from refitkit.host import Host, PluginInfo

GROUP = "refitkit.conformance"
"""The entry-point group in which suites of plugins are found."""

ATTRIBUTE = "conformance_suites"
"""The attribute of a plugin that gives its suites."""

WANTED = {
    "BackendSuite": ("refitkit_register_backends",),
    "EngineSuite": ("refitkit_register_backends", "refitkit_load_module"),
    "SourceSuite": ("refitkit_load_weights",),
    "StrategySuite": ("refitkit_mapping_strategies",),
    "TransformSuite": ("refitkit_weight_transforms",),
    "VerifierSuite": ("refitkit_verifiers",),
}
"""Hooks for whose offers a plugin should bring a suite of the kit, by suite."""


def run(plugin: str | object, host: Host) -> list[CheckResult]:
    """Check one plugin: what it offers by its hooks, and the suites that it brings.

    Args:
        plugin: Its name, or the registered object itself.
        host: Where it is registered.

    Returns:
        One result for each check, and one for each suite that it should bring and does not.

    Raises:
        ConfigError: No such plugin is registered.
        PluginError: Its suites cannot be imported, or are none.
        ToolchainError: pytest is not installed.
    """
    info = _info_of(plugin, host)
    brought = suites_of(info.name, host)
    named = {_free_name(suite, number, brought): suite for number, suite in enumerate(brought)}
    return [
        *run_suites({running.OFFERS: _offers_of(info.name, host), **named}),
        *_missing(info, brought),
    ]


def suites_of(name: str, host: Host) -> tuple[type, ...]:
    """The suites that a plugin brings.

    Raises:
        PluginError: They cannot be imported, or are none.
    """
    found: list[type] = []
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            with raised_as(PluginError, f"The suites of the plugin {name!r} cannot be imported"):
                given = entry.load()
            found += _classes(name, given)
    found += _classes(name, getattr(host.plugin(name), ATTRIBUTE, ()))
    return tuple(dict.fromkeys(found))


def _classes(name: str, given: Any) -> list[type]:
    with raised_as(PluginError, f"The suites of the plugin {name!r} cannot be made"):
        suites = given() if callable(given) and not isinstance(given, type) else given
        listed = list(suites) if isinstance(suites, Iterable) else [suites]
    odd = [suite for suite in listed if not isinstance(suite, type)]
    if odd:
        raise PluginError(
            f"The plugin {name!r} gives {odd[0]!r} as a suite.",
            hint="Give classes: subclasses of those in refitkit.testing.",
        )
    return listed


def _info_of(plugin: str | object, host: Host) -> PluginInfo:
    for info in host.plugins():
        if plugin == info.name or plugin is host.plugin(info.name):
            return info
    there = ", ".join(sorted(info.name for info in host.plugins()))
    raise ConfigError(f"No plugin {plugin!r} is registered.", hint=f"There are: {there}.")


def _offers_of(name: str, of_host: Host) -> type:
    from refitkit.testing.offers import OfferSuite  # noqa: PLC0415 - imports torch

    return type(running.OFFERS, (OfferSuite,), {"plugin": name, "host": of_host})


def _free_name(suite: type, number: int, suites: tuple[type, ...]) -> str:
    """A name to show: the class's own, with a number where two have it."""
    same = [other for other in suites if other.__name__ == suite.__name__]
    return suite.__name__ if len(same) == 1 else f"{suite.__name__}_{number}"


def _suites() -> tuple[type, ...]:
    """The suites that are wanted, by whatever plugin offers something."""
    from refitkit.testing.backend import BackendSuite  # noqa: PLC0415 - these import torch
    from refitkit.testing.engine import EngineSuite  # noqa: PLC0415
    from refitkit.testing.source import SourceSuite  # noqa: PLC0415
    from refitkit.testing.strategy import StrategySuite  # noqa: PLC0415
    from refitkit.testing.transform import TransformSuite  # noqa: PLC0415
    from refitkit.testing.verifier import VerifierSuite  # noqa: PLC0415

    return (
        BackendSuite,
        EngineSuite,
        SourceSuite,
        StrategySuite,
        TransformSuite,
        VerifierSuite,
    )


def _missing(info: PluginInfo, brought: tuple[type, ...]) -> list[CheckResult]:
    found: list[CheckResult] = []
    for suite in _suites():
        name = suite.__name__
        hooks = WANTED[name]
        here = [hook for hook in hooks if hook in info.hooks]
        if here and not any(issubclass(one, suite) for one in brought):
            message = (
                f"The plugin implements {' and '.join(here)} and brings no {name}: nothing says "
                "that what it offers keeps its contract. Write one "
                "(docs/guides/testing-plugins.md), and name it in the entry-point group "
                f"{GROUP!r}, under {info.name!r}."
            )
            found.append(CheckResult(suite=name, check="", outcome="missing", message=message))
    return found
