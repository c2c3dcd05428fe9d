"""Commands of plugins: how they are added, and whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

    import click

    from tests.unit.cli.conftest import Outcome

BUILT_IN = ["compile", "inspect", "plan", "refit", "verify", "diff", "plugins", "doctor", "demo"]


def greet(session: Any) -> None:
    session.result({"hello": "world"}, lambda console: console.print("Hello world"))


def commands_in(help_text: str) -> list[str]:
    listed = help_text.split("Commands:\n")[1]
    return [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]


def test_all_commands_are_listed_in_the_order_of_a_workflow(run: Callable[..., Outcome]) -> None:
    assert commands_in(run("--help").out) == BUILT_IN


@pytest.mark.parametrize("command", [*BUILT_IN, "plan make", "plan show", "plugins list"])
def test_every_command_has_help_and_the_common_options(
    run: Callable[..., Outcome], command: str
) -> None:
    outcome = run(*command.split(), "--help")
    assert outcome.code == 0
    for option in ("--json", "--no-plugin NAME", "--verbose"):
        assert option in outcome.out


@pytest.mark.parametrize("command", ["compile", "refit", "verify", "diff", "plan make"])
def test_help_warns_where_code_is_run(run: Callable[..., Outcome], command: str) -> None:
    words = " ".join(run(*command.split(), "--help").out.split())
    assert "only files that you trust" in words


def test_version(run: Callable[..., Outcome]) -> None:
    assert run("--version").out == f"refitkit, version {refitkit.__version__}\n"


def test_a_plugin_adds_a_command(run: Callable[..., Outcome], one_command: Any) -> None:
    plugin = one_command(greet)
    assert commands_in(run("--help", plugins=[plugin]).out) == [*BUILT_IN, "hello"]
    assert run("hello", plugins=[plugin]).out == "Hello world\n"
    assert run("hello", "--json", plugins=[plugin]).data == {"hello": "world"}


@pytest.mark.parametrize("name", ["refit", "plugins"])
def test_the_name_of_a_built_in_command_is_taken(
    run: Callable[..., Outcome], one_command: Any, name: str
) -> None:
    plugin = one_command(greet, "impostor", name)
    outcome = run("--help", "--json", plugins=[plugin])
    assert outcome.code == 3
    assert outcome.error["type"] == "PluginError"
    assert "The plugin 'impostor'" in outcome.error["message"]
    assert f"{name!r}" in outcome.error["message"]
    assert "--no-plugin impostor" in outcome.error["hint"]
    assert run("--no-plugin", "impostor", "--help", plugins=[plugin]).code == 0


def test_two_plugins_with_one_command_are_both_named(
    run: Callable[..., Outcome], one_command: Any
) -> None:
    plugins = [one_command(greet, "first"), one_command(greet, "second")]
    outcome = run("hello", plugins=plugins)
    assert outcome.code == 3
    assert "The plugin 'second' adds" in outcome.err
    assert "plugin 'first' has" in outcome.err
    assert run("hello", "--no-plugin=first", plugins=plugins).code == 0


def test_a_plugin_that_fails_while_it_adds_commands_is_named(run: Callable[..., Outcome]) -> None:
    class Broken:
        name = "broken"

        @refitkit.hookimpl
        def refitkit_register_commands(self, cli: click.Group) -> None:
            raise LookupError("no such thing")

    outcome = run("--help", plugins=[Broken()])
    assert outcome.code == 3
    assert "'broken'" in outcome.err
    assert "LookupError: no such thing" in outcome.err


def test_a_plugin_that_cannot_be_registered_is_told_as_json(run: Callable[..., Outcome]) -> None:
    class Misspelt:
        name = "misspelt"

        @refitkit.hookimpl
        def refitkit_register_comands(self, cli: click.Group) -> None:
            """No hook has this name."""

    outcome = run("doctor", "--json", plugins=[Misspelt()])
    assert outcome.code == 3
    assert "misspelt" in outcome.error["message"]


def test_without_its_own_plugin_there_are_no_commands(run: Callable[..., Outcome]) -> None:
    outcome = run("--no-plugin", "cli", "plugins")
    assert outcome.code == 2
    assert "No such command 'plugins'" in outcome.err
