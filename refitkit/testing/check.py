"""The kit run against a plugin without a test file: what ``refitkit plugins check`` stands on.

A plugin brings its suites in one of two ways: an entry point of the group
``refitkit.conformance`` whose name is the plugin's, or an attribute ``conformance_suites`` of the
plugin. Both are suite classes, or a callable without arguments that gives them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from refitkit.errors import ConfigError, PluginError, ToolchainError, raised_as
from refitkit.files.temporary import TemporaryFolder
from refitkit.model.base import Frozen
from refitkit.testing.breach import Breach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

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
        *run_suites({OFFERS: _offers_of(info.name, host), **named}),
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

    return type(OFFERS, (OfferSuite,), {"plugin": name, "host": of_host})


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


# MERGED running: Running suites without a test file: their checks as results.

OFFERS = "OfferSuite"
"""Name under which checks of what a plugin offers are shown."""

_FILE = "suites.refitkit"  # of a suffix that no other collector takes
_ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "PYTEST_PLUGINS": "",
}
"""With these set, pytest takes nothing from where it happens to run."""


class CheckResult(Frozen):
    """What became of one check.

    Attributes:
        suite: Name of its suite.
        check: Its name, with the parameters that it ran with.
        outcome: ``passed``, ``failed``, ``skipped`` (it does not apply), or ``missing``: the plugin
            brings no suite for something that it offers.
        message: Why, and what to do; empty where it passed.
        seconds: Wall-clock time.
    """

    suite: str
    check: str
    outcome: Literal["passed", "failed", "skipped", "missing"]
    message: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong or missing."""
        return self.outcome in {"passed", "skipped"}


def run_suites(suites: Mapping[str, type]) -> list[CheckResult]:
    """Run all checks of suites, in a pytest session of its own; nothing is printed.

    No configuration, no ``conftest.py`` and no installed plugin of pytest takes part, so the
    results are the same wherever it is run.

    Args:
        suites: Classes with test methods, by the name to show.

    Raises:
        ToolchainError: pytest is not installed.
        KeyboardInterrupt: The user has had enough.
    """
    pytest = _pytest()
    collector = _Collector(suites)
    with TemporaryFolder() as made, _nothing_installed():
        folder = str(made.path)
        (made.path / _FILE).touch()
        arguments = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        arguments += ["--continue-on-collection-errors", "--noconftest", "-c", os.devnull]
        code = pytest.main([*arguments, "--rootdir", folder, folder], plugins=[collector])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    codes = pytest.ExitCode
    if code not in {codes.OK, codes.TESTS_FAILED, codes.NO_TESTS_COLLECTED}:
        message = f"pytest itself failed: {code!r}."
        broken = CheckResult(suite="", check="", outcome="failed", message=message)
        return [*collector.results, broken]
    return collector.results


def _pytest() -> Any:
    try:
        import pytest  # noqa: PLC0415 - comes with an extra
    except ImportError as exc:
        raise ToolchainError(
            "The conformance kit runs on pytest, which is not installed.",
            hint="Install it: pip install 'refitkit[testing]'.",
        ) from exc
    return pytest


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """Have pytest load nothing that is installed beside it."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Collector:
    """A plugin of pytest: collects classes as if they stood in a file, and keeps their results."""

    def __init__(self, suites: Mapping[str, type]) -> None:
        self.results: list[CheckResult] = []
        self._suites = suites

    def pytest_configure(self, config: pytest.Config) -> None:
        """Have the fixtures of the kit at hand, which are not installed here."""
        from refitkit.testing import plugin  # noqa: PLC0415 - imports pytest

        config.pluginmanager.register(plugin, "refitkit")

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> Any:
        """Give the classes for the one file."""
        if file_path.name != _FILE:
            return None
        from pytest import Module  # noqa: PLC0415, PT013 - comes with an extra

        module = Module.from_parent(parent, path=file_path)
        module.obj = ModuleType("suites")
        for name, suite in self._suites.items():
            setattr(module.obj, name, suite)
        return module

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: object) -> Any:
        """Take suites whatever their names."""
        from pytest import Class  # noqa: PLC0415, PT013

        if obj is self._suites.get(name):
            return Class.from_parent(collector, name=name, obj=obj)
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep one result for each check: of its call, or of what kept it from being called."""
        if report.when == "call" or not report.passed:
            self._keep(report.nodeid, report.outcome, report.duration, _told(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A suite that cannot be collected is a failed check."""
        if report.failed:
            self._keep(f"{report.nodeid}::", "failed", 0.0, str(report.longrepr))

    def _keep(self, nodeid: str, outcome: Any, seconds: float, message: str) -> None:
        suite, _, check = nodeid.rpartition("::")
        suite = suite.rpartition("::")[2] or suite
        self.results.append(
            CheckResult(suite=suite, check=check, outcome=outcome, message=message, seconds=seconds)
        )


def _told(report: pytest.TestReport) -> str:
    """What a report says, without the code that said it."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped one: file, line, text
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    return text.removeprefix(f"{Breach.__module__}.{Breach.__qualname__}: ")
