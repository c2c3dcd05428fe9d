"""The kit without a test file: suites, results and missing suites."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import ConfigError, PluginError, ToolchainError
from refitkit.testing import Breach, CheckResult, EngineSuite, check, run
from refitkit.testing.check import run_suites
from refitkit.testing.fakes import OpenEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.host import Host

Hosts = Any


class MySuite(EngineSuite):
    def make_engine(self) -> Any:
        return OpenEngine("mine", {"w": torch.zeros(2)})

    def held(self, engine: Any) -> Any:
        return engine.live


class Some:
    """One check of each kind."""

    def test_good(self) -> None:
        pass

    def test_bad(self) -> None:
        raise Breach("Engine.stage", "it is bad.", "Be good.")

    def test_broken(self) -> None:
        raise OSError("no disk")

    def test_not_here(self) -> None:
        pytest.skip("not here")

    @pytest.mark.parametrize("number", [1, 2])
    def test_fixtures(self, tmp_path: Any, refitkit_host: Any, number: int) -> None:
        assert tmp_path.is_dir()
        assert refitkit_host().plugins()
        assert number == 1


class Plugin:
    """A plugin with a backend and the given suites."""

    name = "mine"

    def __init__(self, suites: Any = ()) -> None:
        self.conformance_suites = suites

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> list[Any]:
        return []

    @refitkit.hookimpl
    def refitkit_register_backends(self, register: Callable[[Any], None]) -> None:
        pass


def of(results: list[CheckResult], suite: str) -> dict[str, tuple[str, str]]:
    return {r.check: (r.outcome, r.message) for r in results if r.suite == suite}


def test_every_check_has_a_result_and_nothing_is_printed(capfd: Any) -> None:
    results = run_suites({"Some": Some})
    found = of(results, "Some")
    assert found["test_good"] == ("passed", "")
    assert found["test_bad"] == ("failed", "Engine.stage: it is bad. Be good.")
    assert found["test_broken"] == ("failed", "OSError: no disk")
    assert found["test_not_here"] == ("skipped", "not here")
    assert found["test_fixtures[1]"] == ("passed", "")
    assert found["test_fixtures[2]"][0] == "failed"
    assert len(results) == len(found) == 6
    assert [r.ok for r in results] == [r.outcome in {"passed", "skipped"} for r in results]
    assert capfd.readouterr() == ("", "")


def test_a_suite_that_cannot_be_made_is_a_failed_check() -> None:
    class Odd:
        @pytest.mark.parametrize("number", [1])
        def test_one(self) -> None:
            pass

    results = run_suites({"Odd": Odd, "Some": Some})
    (result,) = [result for result in results if result.suite == "Odd"]
    assert result.outcome == "failed"
    assert "number" in result.message
    assert len(of(results, "Some")) == 6


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    run_suites({"Some": Some})
    assert "PYTEST_DISABLE_PLUGIN_AUTOLOAD" not in os.environ
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "yes")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    assert len(run_suites({"Some": Some})) == 6
    assert os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "yes"
    assert os.environ["PYTEST_ADDOPTS"] == "--no-such-option"


def test_an_interrupt_is_one() -> None:
    class Long:
        def test_forever(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suites({"Long": Long})


def test_a_failure_of_pytest_itself_is_told() -> None:
    class Fatal:
        def test_one(self) -> None:
            pytest.exit("enough", returncode=3)

    assert run_suites({"Fatal": Fatal})[-1].message.startswith("pytest itself failed")


@pytest.mark.parametrize("suites", [Some, [Some], lambda: [Some, Some]])
def test_a_plugin_brings_a_class_or_several_or_makes_them(
    refitkit_host: Hosts, suites: Any
) -> None:
    assert check.suites_of("mine", refitkit_host(Plugin(suites))) == (Some,)


def test_a_plugin_is_run_with_what_it_brings(refitkit_host: Hosts) -> None:
    plugin = Plugin([MySuite])
    host: Host = refitkit_host(plugin)
    results = run("mine", host)
    assert {r.outcome for r in results if r.suite == "MySuite"} == {"passed", "skipped"}
    assert of(results, "MySuite")["test_every_slot_is_written"] == ("passed", "")
    assert of(results, "OfferSuite")["test_offers_keep_their_protocols"] == ("passed", "")
    missing = {r.suite: r for r in results if r.outcome == "missing"}
    assert list(missing) == ["BackendSuite", "StrategySuite"]
    assert not missing["StrategySuite"].ok
    assert "refitkit_mapping_strategies" in missing["StrategySuite"].message


def test_a_plugin_may_be_given_itself(refitkit_host: Hosts) -> None:
    plugin = Plugin()
    host: Host = refitkit_host(plugin)
    by_name, itself = run("mine", host), run(plugin, host)
    assert [r.check for r in itself] == [r.check for r in by_name]
    assert {r.suite for r in itself if r.outcome == "missing"} == {
        "BackendSuite",
        "EngineSuite",
        "StrategySuite",
    }


class Opener:
    name = "opener"

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> Any:
        return None


class Preparer:
    name = "preparer"

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> None:
        """Prepare the process for modules that others open."""


def test_who_opens_no_modules_needs_no_suite_for_engines(refitkit_host: Hosts) -> None:
    assert not [r for r in run("preparer", refitkit_host(Preparer())) if r.outcome == "missing"]
    (missing,) = [r for r in run("opener", refitkit_host(Opener())) if r.outcome == "missing"]
    assert missing.suite == "EngineSuite"
    assert missing.message.endswith("If the hook opens no modules, annotate it with '-> None'.")


def test_two_suites_of_one_name_are_both_run(refitkit_host: Hosts) -> None:
    other = type("Some", (Some,), {})
    results = run("mine", refitkit_host(Plugin([Some, other])))
    assert {"Some_0", "Some_1"} <= {r.suite for r in results}


def test_suites_of_an_entry_point(refitkit_host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, given: Any) -> Any:
        return SimpleNamespace(name=name, load=lambda: given)

    entries = [entry("mine", [Some]), entry("another", 5)]
    monkeypatch.setattr(check, "entry_points", lambda group: entries if "conf" in group else [])
    host = refitkit_host(Plugin())
    assert check.suites_of("mine", host) == (Some,)
    with pytest.raises(PluginError, match="'another' returned 5 as a suite"):
        check.suites_of("another", host)


def test_suites_that_fail_name_their_plugin(refitkit_host: Hosts) -> None:
    def broken() -> Any:
        raise ImportError("no torchao")

    with pytest.raises(PluginError, match=r"suites of the plugin 'mine' cannot.*no torchao"):
        run("mine", refitkit_host(Plugin(broken)))
    with pytest.raises(PluginError, match="'mine' returned 'MySuite' as a suite"):
        run("mine", refitkit_host(Plugin(["MySuite"])))


def test_an_unknown_plugin_is_refused_with_those_that_there_are(refitkit_host: Hosts) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)'yours'.*Registered plugins: .*checks, merges, mine, "
    ):
        run("yours", refitkit_host(Plugin()))


def test_without_pytest_it_says_what_to_install(
    refitkit_host: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ToolchainError, match=r"refitkit\[testing\]"):
        run("mine", refitkit_host(Plugin()))


@pytest.mark.parametrize(
    "name", ["weights", "merges", "checks", "strategies", "verify", "aotinductor"]
)
def test_what_built_ins_offer_keeps_its_contract(refitkit_host: Hosts, name: str) -> None:
    results = [r for r in run(name, refitkit_host()) if r.suite == "OfferSuite"]
    assert results
    assert [r for r in results if not r.ok] == []


def test_no_configuration_of_the_folder_takes_part(tmp_path: Any) -> None:
    """A ``conftest.py`` and a ``pytest.ini`` in the working directory have no effect."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('read')\n")
    code = (
        "from refitkit.testing.check import run_suites\n"
        "class S:\n    def test_one(self): pass\n"
        "print([r.outcome for r in run_suites({'S': S})])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("['passed']", "")
