"""Options that act before commands exist, and how values of options are read."""

from __future__ import annotations

from typing import Any

import click
import pytest

from refitkit.cli.options import as_options
from refitkit.cli.session import EarlyOptions, parse_early_options


@pytest.mark.parametrize(
    ("args", "early"),
    [
        ([], EarlyOptions()),
        (["plugins"], EarlyOptions(command="plugins")),
        (["--json", "plugins"], EarlyOptions(as_json=True, command="plugins")),
        (["plugins", "list", "--json"], EarlyOptions(as_json=True, command="plugins")),
        (
            ["--no-plugin", "a", "--no-plugin=b", "plugins"],
            EarlyOptions(no_plugins=("a", "b"), command="plugins"),
        ),
        (["plugins", "--no-plugin", "a"], EarlyOptions(no_plugins=("a",), command="plugins")),
        (["--no-plugin", "plugins", "-v", "doctor"], EarlyOptions(False, ("plugins",), "doctor")),
        (["--no-plugin"], EarlyOptions()),
        (["--help"], EarlyOptions()),
        (["inspect", "--", "--json", "--no-plugin", "a"], EarlyOptions(command="inspect")),
    ],
)
def test_early_options(args: list[str], early: EarlyOptions) -> None:
    assert parse_early_options(args) == early


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("3", 3),
        ("0.5", 0.5),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("text", "text"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_of_options(text: str, value: Any) -> None:
    options = as_options(_context(), _parameter(), (f"some.key={text}",))
    assert options == {"some.key": value}
    assert type(options["some.key"]) is type(value)


@pytest.mark.parametrize("pairs", [("key",), ("=value",), ("",), ("a=1", "a=1")])
def test_what_is_no_option(pairs: tuple[str, ...]) -> None:
    with pytest.raises(click.BadParameter):
        as_options(_context(), _parameter(), pairs)


def _context() -> click.Context:
    return click.Context(click.Command("compile"))


def _parameter() -> click.Parameter:
    return click.Option(["--option"])
