"""``refitkit plugins``, and switching plugins off."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.config import NO_PLUGIN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.cli.conftest import Outcome


class Listener:
    name = "listener"

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        """Hear nothing."""


def listed(outcome: Outcome) -> dict[str, dict[str, Any]]:
    assert outcome.code == 0
    return {plugin["name"]: plugin for plugin in outcome.data["plugins"]}


@pytest.mark.parametrize("command", [("plugins",), ("plugins", "list")])
def test_all_plugins_are_listed(run: Callable[..., Outcome], command: tuple[str, ...]) -> None:
    plugins = listed(run(*command, "--json", plugins=[Listener()]))
    assert plugins["aotinductor"]["origin"] == "built-in"
    assert "refitkit_load_module" in plugins["aotinductor"]["hooks"]
    assert plugins["cli"]["origin"] == "built-in"
    assert plugins["aotinductor"]["module"] == "refitkit.builtin.aotinductor"
    assert plugins["listener"] == {
        "name": "listener",
        "state": "in use",
        "origin": "explicit",
        "distribution": "",
        "version": "",
        "module": __name__,
        "hooks": {"refitkit_event": "all"},
        "problem": "",
    }


def test_the_table_has_the_same(run: Callable[..., Outcome]) -> None:
    as_data = listed(run("plugins", "--json"))
    table = run("plugins").out
    for name, plugin in as_data.items():
        assert name in table
        for hook, kind in plugin["hooks"].items():
            assert f"{hook.removeprefix('refitkit_')} ({kind})" in table


@pytest.mark.parametrize(
    "args",
    [("--no-plugin", "verify", "plugins"), ("plugins", "--no-plugin=verify")],
)
def test_plugins_are_switched_off(run: Callable[..., Outcome], args: tuple[str, ...]) -> None:
    outcome = run(*args, "--json")
    found = listed(outcome)["verify"]
    assert (found["state"], found["origin"], found["hooks"]) == ("switched off", "built-in", {})
    assert outcome.err == ""


def test_pipelines_of_commands_are_without_them(
    run: Callable[..., Outcome], one_command: Any
) -> None:
    def body(session: Any) -> None:
        names = [info.name for info in session.pipeline().host.plugins()]
        session.result({"names": names}, lambda _: None)

    plugins = [one_command(body), Listener()]
    assert "listener" in run("hello", "--json", plugins=plugins).data["names"]
    without = run("hello", "--json", "--no-plugin", "listener", plugins=plugins)
    assert "listener" not in without.data["names"]
    assert without.err == ""


def test_those_that_do_not_exist_are_warned_of(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NO_PLUGIN_VARIABLE, "noone, checks")
    outcome = run("--no-plugin", "nobody", "--no-plugin", "weights", "plugins", "--json")
    assert outcome.err.splitlines() == [
        "warning: There is no plugin 'nobody' to switch off.",
        "warning: There is no plugin 'noone' to switch off.",
    ]
    plugins = listed(outcome)
    assert {plugins[name]["state"] for name in ("weights", "checks")} == {"switched off"}


def test_an_installed_plugin_that_cannot_be_imported_can_be_switched_off(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("broken", "no_module_of_this_name", "refitkit")
    monkeypatch.setattr("refitkit.host.entry_points", lambda **_: [broken])
    outcome = run("--help")
    assert outcome.code == 3
    assert "--no-plugin broken" in outcome.err
    outcome = run("--no-plugin", "broken", "plugins", "--json")
    assert listed(outcome)["broken"]["state"] == "switched off"
    assert outcome.err == ""


# -- broken plugins are told, and stop nobody who looks for them --------------------------------


def broken_ones(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0
    return [plugin for plugin in outcome.data["plugins"] if plugin["state"] == "broken"]


@pytest.fixture
def _gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin that cannot be imported."""
    entry = EntryPoint("gone", "no_module_of_this_name.inside:plugin", "refitkit")
    monkeypatch.setattr("refitkit.host.entry_points", lambda **_: [entry])


class Misspelt:
    name = "misspelt"

    @refitkit.hookimpl
    def refitkit_evnt(self, event: object) -> None: ...


@pytest.mark.usefixtures("_gone")
def test_a_broken_plugin_is_listed_with_the_reason(run: Callable[..., Outcome]) -> None:
    outcome = run("plugins", "list", "--json", plugins=[Misspelt(), Listener()])
    gone, misspelt = broken_ones(outcome)
    assert (gone["name"], gone["module"]) == ("gone", "no_module_of_this_name.inside")
    assert "ModuleNotFoundError" in gone["problem"]
    assert "--no-plugin gone" in gone["problem"]
    assert "refitkit_evnt" in misspelt["problem"]
    assert listed(outcome)["listener"]["state"] == "in use"
    assert "warning: The plugin 'gone'" in outcome.err
    assert "warning: The plugin 'misspelt'" in outcome.err


@pytest.mark.usefixtures("_gone")
def test_the_table_tells_which_are_broken(run: Callable[..., Outcome]) -> None:
    outcome = run("plugins")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if " gone " in line]
    assert line.split()[1] == "broken"


@pytest.mark.usefixtures("_gone")
@pytest.mark.parametrize("args", [("doctor",), ("--help",), ("inspect", "plugins")])
def test_other_commands_refuse_to_go_on(run: Callable[..., Outcome], args: tuple[str, ...]) -> None:
    outcome = run(*args)
    assert outcome.code == 3
    assert "'gone'" in outcome.err


def test_a_plugin_that_cannot_add_its_commands_is_broken(
    run: Callable[..., Outcome], one_command: Any
) -> None:
    twin = one_command(print, name="twin", command="plugins")
    (broken,) = broken_ones(run("plugins", "--json", plugins=[twin]))
    assert broken["name"] == "twin"
    assert "has added already" in broken["problem"]
    names = [plugin["name"] for plugin in run("plugins", "--json", plugins=[twin]).data["plugins"]]
    assert names.count("twin") == 1


def test_the_second_plugin_of_a_name_is_broken(run: Callable[..., Outcome]) -> None:
    outcome = run("plugins", "--json", plugins=[Listener(), Listener()])
    (broken,) = broken_ones(outcome)
    assert "Two plugins are called 'listener'" in broken["problem"]
    assert [p["name"] for p in outcome.data["plugins"]].count("listener") == 2


def test_an_installed_plugin_is_listed_with_its_distribution(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SimpleNamespace(
        name="mine",
        value="my_package.hooks:plugin",
        dist=SimpleNamespace(name="my-plugin", version="1.2"),
        load=Listener,
    )
    monkeypatch.setattr("refitkit.host.entry_points", lambda **_: [entry])
    found = listed(run("plugins", "--json"))["mine"]
    assert (found["distribution"], found["version"]) == ("my-plugin", "1.2")
    assert (found["origin"], found["module"]) == ("my-plugin 1.2", "my_package.hooks")
