"""Exit codes, and what is told of each kind of failure."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from refitkit import errors
from refitkit.errors import Problem
from refitkit.model import OutputMeasure, VerificationResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.cli.conftest import Outcome

REFUSALS = [
    errors.UnsupportedTargetError,
    errors.SourceError,
    errors.NotRefittableError,
    errors.ToolchainError,
    errors.WeightMismatchError,
    errors.PlanMismatchError,
    errors.UnmappedSlotError,
    errors.VerificationError,
    errors.ModuleLostError,
    errors.RefitError,
]


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_are_1(
    run: Callable[..., Outcome], failing: Callable[..., Any], kind: type[errors.RefitError]
) -> None:
    outcome = run("hello", plugins=[failing(kind("Not like this.", hint="Do that."))])
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err == "error: Not like this.\nDo that.\n"


def test_config_errors_are_2(run: Callable[..., Outcome], failing: Callable[..., Any]) -> None:
    assert run("hello", plugins=[failing(errors.ConfigError("No such setting."))]).code == 2


@pytest.mark.parametrize(
    "args",
    [
        ["nothing-of-this-name"],
        ["--nothing"],
        ["compile"],
        ["compile", "p.pt2"],
        ["compile", "p.pt2", "-o", "out", "--option", "no-value"],
        ["compile", "p.pt2", "-o", "out", "--option", "a=1", "--option", "a=2"],
        ["refit", "module"],
        ["refit", "module", "weights"],
        ["refit", "module", "weights", "-o", "out", "--in-place"],
        ["verify"],
        ["plan"],
        ["plan", "make", "p.pt2", "-o", "out"],
        ["inspect"],
        ["plugins", "nothing"],
        [],
    ],
)
def test_usage_is_2(run: Callable[..., Outcome], args: list[str]) -> None:
    outcome = run(*args)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "refitkit" in outcome.err
    assert "Traceback" not in outcome.err
    as_json = run(*args, "--json")
    assert as_json.code == 2
    assert as_json.error["message"]


def test_plugin_errors_are_3(run: Callable[..., Outcome], failing: Callable[..., Any]) -> None:
    outcome = run("hello", plugins=[failing(errors.PluginError("It is broken."))])
    assert (outcome.code, outcome.err) == (3, "error: It is broken.\n")


def test_a_plugins_command_that_fails_is_the_plugins_fault(
    run: Callable[..., Outcome], failing: Callable[..., Any]
) -> None:
    outcome = run("hello", "--json", plugins=[failing(ZeroDivisionError("by nothing"))])
    assert outcome.code == 3
    assert outcome.error["type"] == "PluginError"
    for part in ("'hello'", "'extra'", "ZeroDivisionError: by nothing"):
        assert part in outcome.error["message"]
    assert "Traceback" not in outcome.err
    with_traceback = run("-v", "hello", plugins=[failing(ZeroDivisionError("by nothing"))])
    assert "Traceback" in with_traceback.err


def test_bugs_are_70_with_a_traceback(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("refitkit.cli.plugins.all_plugins", broken)
    outcome = run("plugins", "--json")
    assert outcome.code == 70
    assert outcome.error["type"] == "ZeroDivisionError"
    assert "Traceback" in outcome.err
    assert "bug" in outcome.err


def test_a_broken_torch_is_told_in_words(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = run("inspect", __file__, "--json")
    assert outcome.code == 1
    assert "torch cannot be imported" in outcome.error["message"]
    assert "Traceback" not in outcome.err


def test_an_unexpected_end_of_file_is_no_interrupt(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise EOFError("too short")

    monkeypatch.setattr("refitkit.cli.plugins.all_plugins", broken)
    assert run("plugins", "--json").error["type"] == "EOFError"


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), click.Abort()])
def test_interrupts_are_130_and_quiet(
    run: Callable[..., Outcome], failing: Callable[..., Any], exc: BaseException
) -> None:
    outcome = run("hello", plugins=[failing(exc)])
    assert (outcome.code, outcome.out, outcome.err.strip()) == (130, "", "")


def test_a_commands_own_exit_code_is_kept(
    run: Callable[..., Outcome], failing: Callable[..., Any]
) -> None:
    assert run("hello", plugins=[failing(click.exceptions.Exit(5))]).code == 5


def test_operating_system_errors_are_told_without_a_traceback(
    run: Callable[..., Outcome], failing: Callable[..., Any]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/where")
    outcome = run("hello", "--json", plugins=[failing(full)])
    assert outcome.code == 1
    assert outcome.error["message"] == "'/some/where': No space left on device."
    assert "Traceback" not in outcome.err


def test_all_problems_are_told(run: Callable[..., Outcome], failing: Callable[..., Any]) -> None:
    problems = [Problem(f"layer.{n}.weight", "shape", "(1,)", "(2,)") for n in range(100)]
    error = errors.WeightMismatchError("They do not fit.", problems=problems, hint="Mend them.")
    outcome = run("hello", "--json", plugins=[failing(error)])
    assert outcome.error["problems"] == [problem.as_dict() for problem in problems]
    assert outcome.err.startswith("error: They do not fit.\n")
    assert outcome.err.endswith("\nMend them.\n")
    assert all(f"layer.{n}.weight: shape, found" in outcome.err for n in range(100))


def test_reports_and_notes_of_errors_are_told(
    run: Callable[..., Outcome], failing: Callable[..., Any]
) -> None:
    measure = OutputMeasure(name="y", ok=False, max_abs_error=float("nan"), note="differs")
    result = VerificationResult(verifier="outputs", ok=False, measures=(measure,))
    error = errors.VerificationError("It is not right.", report=result)
    error.add_note("It was late.")
    outcome = run("hello", "--json", plugins=[failing(error)])
    assert outcome.error["report"]["measures"][0]["max_abs_error"] == "NaN"
    assert outcome.error["notes"] == ["It was late."]
    assert "It was late." in outcome.err


def test_text_from_files_cannot_steer_the_terminal(
    run: Callable[..., Outcome], failing: Callable[..., Any]
) -> None:
    error = errors.SourceError("It has \x1b[2J and [bold]this[/bold].")
    outcome = run("hello", plugins=[failing(error)])
    assert outcome.err == "error: It has \\x1b[2J and [bold]this[/bold].\n"


CHILD = [sys.executable, "-m", "refitkit.cli"]


@pytest.mark.parametrize("args", [["plugins"], ["plugins", "--json"], ["nothing", "--json"]])
def test_a_closed_pipe_is_quiet(args: list[str]) -> None:
    child = subprocess.Popen(
        [*CHILD, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()  # long before the child writes: it has to import first
    with child.stderr as stderr:
        said = stderr.read()
    assert (child.wait(), said) == (141, "")


@pytest.mark.parametrize("args", [["plugins"], ["plugins", "--json"], ["--help"]])
def test_a_closed_stdout_is_no_error(args: list[str]) -> None:
    command = 'exec "$@" >&-'
    done = subprocess.run(
        ["sh", "-c", command, "sh", *CHILD, *args], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_json_is_an_answer_on_a_terminal_of_another_encoding() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*CHILD, "plugins"], capture_output=True, env=environment, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "aotinductor" in done.stdout
    assert json.dumps(done.stdout).isascii()
