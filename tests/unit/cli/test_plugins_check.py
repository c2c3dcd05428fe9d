"""``refitkit plugins check``: what is said from outside, and what the kit finds."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit import hookspecs
from refitkit.testing import check as kit
from refitkit.testing.check import CheckResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome


class Listener:
    name = "listener"

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        """Hear nothing."""


class Offering:
    """A plugin that offers these verifiers."""

    name = "offering"

    def __init__(self, *verifiers: Any) -> None:
        self.verifiers = verifiers

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> tuple[Any, ...]:
        return self.verifiers


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[CheckResult]:
    """What the kit finds, without running it."""
    results: list[CheckResult] = []
    monkeypatch.setattr(kit, "run", lambda plugin, host: results)
    return results


def checks_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in outcome.data["checks"]}


def test_a_plugin_that_keeps_its_contracts(run: Callable[..., Outcome]) -> None:
    """With the kit as it is."""
    outcome = run("plugins", "check", "listener", "--json", plugins=[Listener()])
    assert outcome.code == 0
    assert (outcome.data["plugin"], outcome.data["ok"]) == ("listener", True)
    assert {one["suite"] for one in outcome.data["checks"]} == {"registration", "OfferSuite"}
    assert {one["outcome"] for one in outcome.data["checks"]} <= {"passed", "skipped"}


def test_what_the_kit_finds_is_told(
    run: Callable[..., Outcome], found: list[CheckResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def given(plugin: str, host: Any) -> list[CheckResult]:
        asked.append((plugin, [info.name for info in host.plugins()]))
        return found

    monkeypatch.setattr(kit, "run", given)
    message = "the contract, and what to do"
    bad = CheckResult(suite="S", check="c", outcome="failed", message=message)
    found.append(bad)
    outcome = run("plugins", "check", "listener", "--json", plugins=[Listener()])
    assert outcome.code == 1
    assert not outcome.data["ok"]
    assert outcome.data["checks"][-1] == bad.model_dump()
    ((plugin, names),) = asked
    assert plugin == "listener"
    assert {"listener", "weights"} <= set(names)
    said = run("plugins", "check", "listener", plugins=[Listener()])
    assert said.code == 1
    assert message in said.out
    assert "not ok: " in said.out
    assert "1 failed" in said.out


def test_a_missing_suite_fails_where_that_is_wanted(
    run: Callable[..., Outcome], found: list[CheckResult]
) -> None:
    found.append(CheckResult(suite="S", check="", outcome="missing", message="bring one"))
    plugins = [Listener()]
    assert run("plugins", "check", "listener", plugins=plugins).code == 0
    assert run("plugins", "check", "listener", "--strict", plugins=plugins).code == 1


def test_a_broken_plugin_fails_and_says_why(run: Callable[..., Outcome]) -> None:
    class Misspelt:
        name = "misspelt"

        @refitkit.hookimpl
        def refitkit_event(self, evnt: object) -> None: ...

    outcome = run("plugins", "check", "misspelt", "--json", plugins=[Misspelt()])
    assert outcome.code == 1
    (only,) = outcome.data["checks"]
    assert (only["check"], only["outcome"]) == ("hooks_and_arguments", "failed")
    assert "evnt" in only["message"]


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("verifier", [object(), SimpleNamespace(name="outputs")])
def test_offers_without_a_name_of_their_own_fail(
    run: Callable[..., Outcome], verifier: Any
) -> None:
    outcome = run("plugins", "check", "offering", "--json", plugins=[Offering(verifier)])
    assert outcome.code == 1
    failed = checks_of(outcome)["names_of_offers"]
    assert failed["outcome"] == "failed"
    assert "refitkit_verifiers" in failed["message"]
    assert "'offering'" in failed["message"]


@pytest.mark.usefixtures("found")
def test_another_plugins_bad_offer_is_not_held_against_it(run: Callable[..., Outcome]) -> None:
    good = Offering(SimpleNamespace(name="mine", prepare=print))
    good.name = "good"
    outcome = run("plugins", "check", "good", "--json", plugins=[good, Offering(object())])
    assert checks_of(outcome)["names_of_offers"]["outcome"] == "passed"


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(
    ("transform", "outcome"),
    [
        (SimpleNamespace(name="mine", priority=1, groups=print), "passed"),
        (SimpleNamespace(name="mine", priority=1), "failed"),
        (object(), "failed"),
    ],
)
def test_names_of_transforms_are_checked(
    run: Callable[..., Outcome], transform: object, outcome: str
) -> None:
    """Their hook takes an argument, so a host does not cache what it returns."""

    class Transforming:
        name = "transforming"

        @refitkit.hookimpl
        def refitkit_weight_transforms(self, config: refitkit.Config) -> list[object]:
            return [transform]

    found = run("plugins", "check", "transforming", "--json", plugins=[Transforming()])
    assert checks_of(found)["names_of_offers"]["outcome"] == outcome


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(
    ("text", "outcome", "said"),
    [
        ("", "passed", ""),
        ("import torch", "failed", "imports torch, numpy"),
        ("from numpy import zeros", "failed", "imports numpy"),
        ("import sys\nif not hasattr(sys, 'warm'): raise OSError('cold')", "failed", "cold"),
    ],
)
def test_importing_it_has_to_be_light(
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
    outcome: str,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "warm", True, raising=False)
    (tmp_path / "checked_plugin.py").write_text(f"{text}\nname = 'checked'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "checked_plugin", raising=False)
    entry = SimpleNamespace(
        name="checked",
        value="checked_plugin",
        dist=None,
        load=lambda: importlib.import_module("checked_plugin"),
    )
    monkeypatch.setattr("refitkit.host.entry_points", lambda **_: [entry])
    light = checks_of(run("plugins", "check", "checked", "--json"))["light_import"]
    assert light["outcome"] == outcome
    assert said in light["message"]


@pytest.mark.usefixtures("found")
def test_deprecated_arguments_are_told(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    @hookspecs.hookspec(warn_on_impl_args={"event": DeprecationWarning("take 'news'")})
    def refitkit_event(event: object) -> None:
        """As it is."""

    monkeypatch.setattr(hookspecs, "refitkit_event", refitkit_event)
    with pytest.warns(DeprecationWarning, match="take 'news'"):
        outcome = run("plugins", "check", "listener", "--json", plugins=[Listener()])
    told = checks_of(outcome)["arguments_that_stay"]
    assert told["outcome"] == "deprecated"
    assert "'listener' takes the argument 'event' of refitkit_event: take 'news'" in told["message"]
    assert outcome.code == 0
    with pytest.warns(DeprecationWarning, match="take 'news'"):
        strict = run("plugins", "check", "listener", "--strict", plugins=[Listener()])
    assert strict.code == 1


def test_a_plugin_that_does_not_exist(run: Callable[..., Outcome]) -> None:
    outcome = run("plugins", "check", "nobody", "--json")
    assert outcome.code == 2
    assert "weights" in outcome.error["hint"]


def test_a_plugin_that_is_switched_off(run: Callable[..., Outcome]) -> None:
    outcome = run("plugins", "check", "verify", "--no-plugin", "verify")
    assert outcome.code == 2
    assert "switched off" in outcome.err
