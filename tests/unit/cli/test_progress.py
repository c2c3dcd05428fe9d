"""Progress goes to stderr: a spinner on a terminal, lines with ``-v``, else nothing."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest

from refitkit.cli.session import Progress
from refitkit.model import StageFinished, StageStarted, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.cli.conftest import Outcome

STAGES = """
import sys, click, refitkit
from refitkit.cli.main import main
from refitkit.cli.options import common_options
from refitkit.model import StageFinished, StageStarted

class Worker:
    name = "worker"

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli):
        @cli.command()
        @common_options
        @click.pass_obj
        def work(session):
            session.progress.refitkit_event(StageStarted("compile", "the [bold]long\\x1b[2J stage"))
            session.progress.refitkit_event(StageFinished("compile", "the long stage", 1.5))
            if session.verbose:
                raise refitkit.SourceError("It failed.")
            session.result({"done": True}, lambda console: console.print("done"))

sys.exit(main(sys.argv[1:], [Worker()]))
"""


def on_a_terminal(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what a terminal on stderr gets."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", STAGES, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        assert child.stdout is not None
        out = child.stdout.read().decode()
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    return child.returncode, out, shown.decode()


WIDE_TABLE = """
import sys, click, refitkit
from refitkit.cli.main import main
from refitkit.cli.tables import table

class Painter:
    name = "painter"

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli):
        @cli.command()
        @click.pass_obj
        def paint(session):
            made = table(("slot",), [("abc" * 40,)])
            session.result({}, lambda console: console.print(made))

sys.exit(main(["paint"], [Painter()]))
"""


@pytest.mark.parametrize(("columns", "lines"), [(80, 2), (160, 1)])
def test_tables_have_the_width_of_the_terminal(columns: int, lines: int) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES"}}
    child = subprocess.Popen(
        [sys.executable, "-c", WIDE_TABLE], stdin=theirs, stdout=theirs, env=environment
    )
    os.close(theirs)
    shown = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    assert child.wait() == 0
    assert sum("abc" in line for line in shown.splitlines()) == lines
    assert shown.count("abc") >= 39  # a fold may cut one, and loses nothing
    assert all(len(line) <= columns for line in re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1024)
    except OSError:  # Linux says so when the last writer is gone
        return b""


@pytest.mark.parametrize("args", [("work", "--json"), ("work",)])
def test_on_a_terminal_there_is_a_spinner(args: tuple[str, ...]) -> None:
    code, out, shown = on_a_terminal(*args)
    assert code == 0
    assert out.split() == (["done"] if args == ("work",) else ["{", '"done":', "true", "}"])
    assert "compile: the [bold]long\\x1b[2J stage" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


def test_an_error_ends_the_spinner() -> None:
    code, out, shown = on_a_terminal("work", "-v")
    assert (code, out) == (1, "")
    assert "took 1.5 s" in shown
    assert "It failed." in shown


def test_elsewhere_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.refitkit_event(StageStarted("refit", "load"))
    progress.refitkit_event(Step("refit", "load", "half"))
    progress.refitkit_event(StageFinished("refit", "load", 0.25))
    progress.stop()
    assert capsys.readouterr() == ("", "")
    assert progress.finished == [StageFinished("refit", "load", 0.25)]


def test_verbose_lines_on_stderr(run: Callable[..., Outcome], one_command: Any) -> None:
    def body(session: Any) -> None:
        session.pipeline().host.emit(StageFinished("refit", "load", 0.25))
        session.result({}, lambda _: None)

    assert run("-v", "hello", plugins=[one_command(body)]).err == "refit: load took 250 ms\n"
    assert run("hello", "-v", plugins=[one_command(body)]).err == "refit: load took 250 ms\n"
    assert run("hello", plugins=[one_command(body)]).err == ""
