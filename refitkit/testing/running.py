"""Running suites without a test file: their checks as results."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from refitkit.errors import ToolchainError
from refitkit.model.base import Frozen
from refitkit.temporary import TemporaryFolder
from refitkit.testing.breach import Breach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

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
