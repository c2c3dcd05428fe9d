"""With ``--json``, nothing but JSON is on stdout, whoever prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.cli.conftest import Outcome

TALKATIVE = """
import ctypes, os, subprocess, sys
import click, refitkit
from refitkit.cli.main import main
from refitkit.cli.options import common_options

class Talkative:
    name = "talkative"

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli):
        print("from python, at registration")

        @cli.command()
        @common_options
        @click.pass_obj
        def talk(session):
            print("from python")
            ctypes.CDLL(None).printf(b"from C\\n")
            subprocess.run(["echo", "from a child"], check=True)
            os.write(1, b"from a descriptor\\n")
            session.result({"answer": 42}, lambda console: console.print("42"))

code = main(sys.argv[1:], [Talkative()])
print("afterwards")
sys.exit(code)
"""


def talk(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TALKATIVE, *args]
    # C code does not buffer under PYTHONUNBUFFERED, and what is in buffers at exit is the point
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_whoever_prints_prints_to_stderr() -> None:
    done = talk("talk", "--json")
    answer, afterwards = done.stdout.split("afterwards")
    assert json.loads(answer) == {"answer": 42}
    assert afterwards == "\n"
    for voice in ("python, at registration", "python", "C", "a child", "a descriptor"):
        assert f"from {voice}\n" in done.stderr


def test_without_json_stdout_is_everyones() -> None:
    done = talk("talk")
    for line in ("from python", "from C", "from a child", "42", "afterwards"):
        assert line in done.stdout.splitlines()
    assert done.stderr == ""


@pytest.mark.parametrize("args", [("--json", "hello"), ("hello", "--json")])
def test_json_before_and_after_the_command(
    run: Callable[..., Outcome], one_command: Any, args: tuple[str, ...]
) -> None:
    def body(session: Any) -> None:
        print("a remark")  # noqa: T201
        session.result({"nan": float("nan"), "path": "\u00e4\u4e16"}, lambda _: None)

    outcome = run(*args, plugins=[one_command(body)])
    assert outcome.code == 0
    assert outcome.data == {"nan": "NaN", "path": "\u00e4\u4e16"}
    assert outcome.out.isascii()
    assert outcome.err == "a remark\n"


def test_warnings_do_not_reach_stdout(run: Callable[..., Outcome]) -> None:
    outcome = run("--no-plugin", "nobody", "plugins", "--json")
    assert outcome.data["plugins"]
    assert "nobody" in outcome.err


def test_tables_are_not_broken_where_no_terminal_is(
    run: Callable[..., Outcome], one_command: Any
) -> None:
    from refitkit.cli.tables import table

    name = "[CONVOLUTION]-[...]-[" + "c/" * 200 + "convolution] KERNEL"

    def body(session: Any) -> None:
        made = table(("slot", "bytes"), [(name, 12)])
        session.result({}, lambda console: console.print(made))

    outcome = run("hello", plugins=[one_command(body)])
    assert any(line.split("   ")[0].strip() == name for line in outcome.out.splitlines())
    assert all(line == line.rstrip() for line in outcome.out.splitlines())
