"""Run the conformance kit against a registered plugin, without a test file.

``refitkit plugins check`` calls :func:`run`. It checks the plugin's hooks with
:class:`refitkit.testing.offers.OfferSuite`, and runs the suites that the plugin brings. A plugin
brings suites in one of two ways: an entry point of the group ``refitkit.conformance`` under the
plugin's name, or an attribute ``conformance_suites`` of the plugin. The value is a suite class,
several of them, or a callable without arguments that returns either.

The second half of the module hides how suites run: in a pytest session of its own, without
configuration, ``conftest.py`` files or installed pytest plugins, so results are the same anywhere.
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
"""Entry-point group of the plugins' suites."""

ATTRIBUTE = "conformance_suites"
"""Attribute of a plugin with its suites."""

OFFERS = "OfferSuite"
"""Suite name of the checks of a plugin's hooks."""

_HOOKS_BY_SUITE = {
    "BackendSuite": ("refitkit_register_backends",),
    "EngineSuite": ("refitkit_register_backends", "refitkit_load_module"),
    "SourceSuite": ("refitkit_load_weights",),
    "StrategySuite": ("refitkit_mapping_strategies",),
    "TransformSuite": ("refitkit_weight_transforms",),
    "VerifierSuite": ("refitkit_verifiers",),
}
"""The hooks whose implementation needs a suite, by suite."""


class CheckResult(Frozen):
    """The result of one check.

    Attributes:
        suite: Name of its suite.
        check: Name of the check, with the parameters of its run.
        outcome: ``passed``, ``failed``, ``skipped`` (it does not apply), or ``missing``: the plugin
            brings no suite for something that it offers.
        message: Reason and advice; empty if the check passed.
        seconds: Wall-clock time.
    """

    suite: str
    check: str
    outcome: Literal["passed", "failed", "skipped", "missing"]
    message: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the check passed or was skipped."""
        return self.outcome in {"passed", "skipped"}


def run(plugin: str | object, host: Host) -> list[CheckResult]:
    """Check one plugin: its hooks, and the suites that it brings.

    Args:
        plugin: Name of the plugin, or the registered object.
        host: Host in which it is registered.

    Returns:
        One result for each check, and one for each suite that the plugin should bring but does not.

    Raises:
        ConfigError: No plugin of this name is registered.
        PluginError: The suites cannot be imported, or are not classes.
        ToolchainError: pytest is not installed.
    """
    info = _info_of(plugin, host)
    suites = suites_of(info.name, host)
    named = {_unique_name(suite, number, suites): suite for number, suite in enumerate(suites)}
    return [
        *run_suites({OFFERS: _offer_suite(info.name, host), **named}),
        *_missing_suites(info, suites, host.plugin(info.name)),
    ]


def suites_of(name: str, host: Host) -> tuple[type, ...]:
    """The suites that a plugin brings.

    Raises:
        PluginError: They cannot be imported, or are not classes.
    """
    found: list[type] = []
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            with raised_as(PluginError, f"The suites of the plugin {name!r} cannot be imported"):
                loaded = entry.load()
            found += _classes(name, loaded)
    found += _classes(name, getattr(host.plugin(name), ATTRIBUTE, ()))
    # The entry point and the attribute may name the same suites.
    return tuple(dict.fromkeys(found))


def _classes(name: str, value: Any) -> list[type]:
    with raised_as(PluginError, f"The suites of the plugin {name!r} cannot be made"):
        suites = value() if callable(value) and not isinstance(value, type) else value
        listed = list(suites) if isinstance(suites, Iterable) else [suites]
    wrong = [suite for suite in listed if not isinstance(suite, type)]
    if wrong:
        raise PluginError(
            f"The plugin {name!r} returned {wrong[0]!r} as a suite.",
            hint="Return subclasses of the suites in refitkit.testing.",
        )
    return listed


def _info_of(plugin: str | object, host: Host) -> PluginInfo:
    for info in host.plugins():
        if plugin == info.name or plugin is host.plugin(info.name):
            return info
    registered = ", ".join(sorted(info.name for info in host.plugins()))
    raise ConfigError(
        f"No plugin {plugin!r} is registered.", hint=f"Registered plugins: {registered}."
    )


def _offer_suite(name: str, of_host: Host) -> type:
    from refitkit.testing.offers import OfferSuite  # noqa: PLC0415 - imports torch

    return type(OFFERS, (OfferSuite,), {"plugin": name, "host": of_host})


def _unique_name(suite: type, number: int, suites: tuple[type, ...]) -> str:
    """The name of a suite class, with a number if several classes have the same name."""
    same = [other for other in suites if other.__name__ == suite.__name__]
    return suite.__name__ if len(same) == 1 else f"{suite.__name__}_{number}"


def _missing_suites(
    info: PluginInfo, brought: tuple[type, ...], plugin: object
) -> list[CheckResult]:
    found: list[CheckResult] = []
    implemented = [hook for hook in info.hooks if not _returns_none(getattr(plugin, hook, None))]
    for suite in _kit_suites():
        name = suite.__name__
        hooks = [hook for hook in _HOOKS_BY_SUITE[name] if hook in implemented]
        # A subclass counts under any name: authors name suites after their classes.
        if hooks and not any(issubclass(one, suite) for one in brought):
            message = (
                f"The plugin implements {' and '.join(hooks)} but brings no {name}, so nothing "
                "checks the contracts of its offers. Write one (docs/guides/testing-plugins.md), "
                f"and name it in the entry-point group {GROUP!r} under {info.name!r}."
            )
            if hooks == ["refitkit_load_module"]:
                message += " If the hook opens no modules, annotate it with '-> None'."
            found.append(CheckResult(suite=name, check="", outcome="missing", message=message))
    return found


def _returns_none(hook: Any) -> bool:
    """Whether a hook that asks for a result is annotated to return none, so it offers nothing."""
    if getattr(hook, "__name__", "") == "refitkit_register_backends":  # it calls back instead
        return False
    return getattr(hook, "__annotations__", {}).get("return", "") in {None, "None"}


def _kit_suites() -> tuple[type, ...]:
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


# -- running suites in a pytest session of its own ------------------------------------------------

_FILE = "suites.refitkit"  # no other collector takes files with this suffix
_ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "PYTEST_PLUGINS": "",
}
"""Environment in which pytest loads no installed plugin and takes no options."""


def run_suites(suites: Mapping[str, type]) -> list[CheckResult]:
    """Run all checks of suites in a pytest session of its own; prints nothing.

    Configuration, ``conftest.py`` files and installed pytest plugins have no effect.

    Args:
        suites: Classes with test methods, by the suite name of their results.

    Raises:
        ToolchainError: pytest is not installed.
        KeyboardInterrupt: The user interrupted the run.
    """
    pytest = _pytest()
    collector = _Collector(suites)
    with TemporaryFolder() as made, _isolated_environment():
        folder = str(made.path)
        # pytest collects files only: this empty one stands for the suites. See _Collector.
        (made.path / _FILE).touch()
        # No output, no .pytest_cache folder, and no signal handlers of faulthandler.
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
        import pytest  # noqa: PLC0415 - an optional dependency
    except ImportError as exc:
        raise ToolchainError(
            "The conformance kit needs pytest, which is not installed.",
            hint="Install it: pip install 'refitkit[testing]'.",
        ) from exc
    return pytest


@contextmanager
def _isolated_environment() -> Iterator[None]:
    """Set the environment variables of ``_ENVIRONMENT``, and restore the old values."""
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
    """A pytest plugin that collects classes as if a file defined them, and stores their results."""

    def __init__(self, suites: Mapping[str, type]) -> None:
        self.results: list[CheckResult] = []
        self._suites = suites

    def pytest_configure(self, config: pytest.Config) -> None:
        """Register the fixtures of the kit."""
        # The kit's entry point for pytest is off here, like those of all installed plugins.
        from refitkit.testing import plugin  # noqa: PLC0415 - imports pytest

        config.pluginmanager.register(plugin, "refitkit")

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> Any:
        """A module with the suites for the placeholder file; None for any other."""
        if file_path.name != _FILE:
            return None
        from pytest import Module  # noqa: PLC0415, PT013 - an optional dependency

        module = Module.from_parent(parent, path=file_path)
        module.obj = ModuleType("suites")
        for name, suite in self._suites.items():
            setattr(module.obj, name, suite)
        return module

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: object) -> Any:
        """Collect suites also if their names do not start with ``Test``."""
        from pytest import Class  # noqa: PLC0415, PT013

        # Only the suites themselves: pytest also offers their attributes.
        if obj is self._suites.get(name):
            return Class.from_parent(collector, name=name, obj=obj)
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Store one result for each check: of its call, or of a setup that did not pass."""
        if report.when == "call" or not report.passed:
            self._store(report.nodeid, report.outcome, report.duration, _message_of(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Store a failed check for a suite that cannot be collected."""
        if report.failed:
            self._store(f"{report.nodeid}::", "failed", 0.0, str(report.longrepr))

    def _store(self, nodeid: str, outcome: Any, seconds: float, message: str) -> None:
        # A node id is <file>::<suite>::<check>; without a check if a suite was not collected.
        suite, _, check = nodeid.rpartition("::")
        suite = suite.rpartition("::")[2] or suite
        self.results.append(
            CheckResult(suite=suite, check=check, outcome=outcome, message=message, seconds=seconds)
        )


def _message_of(report: pytest.TestReport) -> str:
    """The message of a report, without a traceback."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped check: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    # pytest puts the qualified name of the exception first; for a Breach the contract says enough.
    return text.removeprefix(f"{Breach.__module__}.{Breach.__qualname__}: ")
