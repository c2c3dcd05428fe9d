"""Runs the command line in this process, and plugins for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import pytest

import refitkit
from refitkit.cli.main import main
from refitkit.cli.options import common_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from refitkit.cli.session import Session


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """What is on stdout, as JSON and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that is on stdout."""
        assert self.data.keys() == {"error"}
        return self.data["error"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line with these arguments, and with explicit plugins."""

    def do(*args: object, plugins: Iterable[object] = ()) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in args], plugins)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return do


class OneCommand:
    """A plugin that adds one command, which does what it is told."""

    def __init__(
        self, body: Callable[[Session], object], name: str = "extra", command: str = "hello"
    ) -> None:
        self.name, self.command, self.body = name, command, body

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli: click.Group) -> None:
        @cli.command(self.command)
        @common_options
        @click.pass_obj
        def command(session: Session) -> None:
            self.body(session)


@pytest.fixture
def one_command() -> type[OneCommand]:
    """The plugin class :class:`OneCommand`."""
    return OneCommand


@pytest.fixture
def failing() -> Callable[[BaseException], OneCommand]:
    """A plugin whose command ``hello`` raises this."""

    def make(exc: BaseException) -> OneCommand:
        def body(session: Session) -> None:
            raise exc

        return OneCommand(body)

    return make
