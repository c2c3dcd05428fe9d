"""The entry point: from arguments to an exit code, with no traceback for a user's mistake."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from refitkit import __version__
from refitkit.cli import plugin as builtin_commands
from refitkit.cli.known import unknown_names
from refitkit.cli.options import common_options
from refitkit.cli.session import COMMANDS, Session, as_json, look_ahead, tolerant_of_encodings
from refitkit.errors import (
    ConfigError,
    PluginError,
    Problem,
    RefitError,
    raise_if_resource,
    resource_error,
    resources,
)
from refitkit.host import BrokenPlugin, make_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.host import Host


_DESPITE_BROKEN = frozenset({"plugins"})
"""Commands that run although a plugin is broken: they are there to find out."""

_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click 8.2 raises where only the name of a group was given; its message is the help."""


def main(args: Sequence[str] | None = None, plugins: Iterable[object] = ()) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; those of the process where None.
        plugins: Explicit plugins beside the built-in and installed ones.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if args is None else args)
    early = look_ahead(given)
    tolerant_of_encodings()
    with claimed_stdout() if early.as_json else open_stdout() as stdout:
        session = Session(early, stdout, plugins)
        try:
            on_broken = session.broken.append if early.command in _DESPITE_BROKEN else None
            return _guarded(session, given, stdout, on_broken)
        except (BrokenPipeError, PipeClosedError):
            forget(stdout)
            return PIPE_CLOSED


def _guarded(
    session: Session,
    args: list[str],
    stdout: TextIO,
    on_broken: Callable[[BrokenPlugin], None] | None,
) -> int:
    try:
        code = _run(session, args, on_broken)
        with resources("The result cannot be written to stdout"):
            stdout.flush()
    except (click.Abort, KeyboardInterrupt) as exc:
        if isinstance(exc.__cause__, EOFError):  # click takes it for an interrupt
            return _told(session, exc.__cause__, stdout)
        return INTERRUPTED
    except (BrokenPipeError, PipeClosedError):
        raise
    except Exception as exc:  # noqa: BLE001 - nobody else can tell the user
        return _told(session, exc, stdout)
    finally:
        session.progress.stop()
    return code


def _run(
    session: Session, args: list[str], on_broken: Callable[[BrokenPlugin], None] | None
) -> int:
    session.registered = (builtin_commands, *session.plugins)
    session.host = make_host(session.config(), session.registered, on_broken=on_broken)
    for name in unknown_names(session):
        session.warn(f"There is no plugin {name!r} to switch off.")
    group = make_group(session.host, on_broken)
    code = group.main(args, prog_name="refitkit", standalone_mode=False, obj=session)
    return code if isinstance(code, int) else 0


def _told(session: Session, exc: Exception, stdout: TextIO) -> int:
    """Tell of an exception, on stderr and with ``--json`` on stdout, too; returns the exit code."""
    code = exit_code(exc)
    session.progress.stop()
    if session.verbose or code == BUG:
        traceback.print_exception(exc)
    if session.as_json:
        try:
            stdout.write(as_json(as_data(exc)))
            stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a full disk, say: the error is on stderr, too
            forget(stdout)
    if isinstance(exc, _HELP):
        exc.show()
    else:
        session.complain("error", "red", as_lines(exc))
    return code


# MERGED group: The group ``refitkit`` itself: global options, and whose each command is.

HOOK = "refitkit_register_commands"

_NOT_A_FAULT = (RefitError, OSError, click.ClickException, click.exceptions.Exit, click.Abort)


class PipeClosedError(Exception):
    """Nobody reads what is written any more."""


class RootGroup(click.Group):
    """A group that knows which plugin brought each command.

    Attributes:
        registrar: Name of the plugin that is adding commands now.
        owners: Names of plugins by the commands that they added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As a ``click.Group``."""
        super().__init__(*args, **kwargs)
        self.registrar = COMMANDS
        self.owners: dict[str, str] = {}

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command.

        Raises:
            PluginError: The name is taken; names both plugins.
        """
        given = name or cmd.name or ""
        if given in self.owners:
            raise PluginError(
                f"The plugin {self.registrar!r} adds a command {given!r}, which the plugin "
                f"{self.owners[given]!r} has added already.",
                hint=f"Rename it; to go on without it: --no-plugin {self.registrar}.",
            )
        super().add_command(cmd, name)
        self.owners[given] = self.registrar

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click passes it
        """Commands in the order in which they were added: that of a workflow."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a failure of a plugin's command is the plugin's.

        Raises:
            PluginError: A command that a plugin brought failed in a way of its own.
            PipeClosedError: Nobody reads the result.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:  # click would answer by ending the process with 1
            raise PipeClosedError from exc
        except _NOT_A_FAULT:
            raise
        except Exception as exc:
            raise_if_resource(exc, f"The command {ctx.invoked_subcommand!r} cannot run")
            command = ctx.invoked_subcommand or ""
            owner = self.owners.get(command, COMMANDS)
            if owner == COMMANDS:
                raise
            raise PluginError(
                f"The command {command!r} of the plugin {owner!r} failed: "
                f"{type(exc).__name__}: {exc}",
                hint="Report it to its authors; with -v a traceback says where it happened.",
            ) from exc


def make_group(host: Host, on_broken: Callable[[BrokenPlugin], None] | None = None) -> RootGroup:
    """The group with the commands of all plugins, built-in ones first.

    Args:
        host: The plugins.
        on_broken: Told of each plugin that failed to add its commands.

    Raises:
        PluginError: A plugin failed, or adds a command whose name is taken, and ``on_broken`` is
            None; names it.
    """

    @click.group("refitkit", cls=RootGroup, no_args_is_help=True)
    @common_options
    @click.version_option(__version__, prog_name="refitkit")
    def refitkit() -> None:
        """Put new weights into compiled inference engines, without compiling again.

        Exit codes: 0 done, 1 refused or mismatch, 2 usage, 3 plugin fault.
        """

    names = [info.name for info in host.plugins() if HOOK in info.hooks]
    for name in sorted(names, key=lambda one: one != COMMANDS):
        refitkit.registrar = name
        try:
            host.call_one(name, HOOK, cli=refitkit)
        except PluginError as exc:
            if on_broken is None:
                raise
            on_broken(BrokenPlugin(host.candidate(name), exc))
    return refitkit


# MERGED failures: Exceptions as exit codes, as text for people and as data for programs.

REFUSED = 1
USAGE = 2
PLUGIN_FAULT = 3
BUG = 70
"""``EX_SOFTWARE`` of sysexits.h."""
INTERRUPTED = 130
PIPE_CLOSED = 141
"""As shells report a process that SIGPIPE ended."""
_BETWEEN = "; "
"""Between the hints of one problem."""
_NO_FLAG = "partial=True"
"""What ``refit`` has a flag for, which it puts in place of this, and no other command."""


def exit_code(exc: Exception) -> int:
    """The exit code for an exception."""
    if isinstance(exc, PluginError):
        return PLUGIN_FAULT
    if isinstance(exc, ConfigError):
        return USAGE
    if isinstance(exc, click.ClickException):
        return exc.exit_code
    known = isinstance(exc, RefitError | OSError) or resource_error(exc, "") is not None
    return REFUSED if known else BUG


def as_refit_error(exc: Exception) -> RefitError:
    """Any exception as a typed one, with something that can be done."""
    if isinstance(exc, RefitError):
        return exc
    if isinstance(exc, click.ClickException):
        return RefitError(exc.format_message(), hint=_usage_hint(exc))
    if isinstance(exc, OSError):
        why = exc.strerror or str(exc) or type(exc).__name__
        what = f"{str(exc.filename)!r}: " if exc.filename else ""
        refused = resource_error(exc, "")
        hint = "With -v a traceback says where it happened."
        return RefitError(f"{what}{why}.", hint=f"{refused.hint} {hint}" if refused else hint)
    refused = resource_error(exc, "The command cannot run")
    if refused is not None:
        return refused
    return RefitError(
        f"{type(exc).__name__}: {exc}",
        hint="This is a bug in refitkit: please report it with the traceback above.",
    )


def as_data(exc: Exception) -> dict[str, Any]:
    """An exception as the object that ``--json`` gives."""
    error = as_refit_error(exc)
    problems = [replace(one, hint=_BETWEEN.join(_hints_of(one))) for one in error.problems]
    data: dict[str, Any] = {
        "type": "OSError" if isinstance(exc, OSError) else type(exc).__name__,
        "message": error.message,
        "hint": error.hint,
        "problems": [problem.as_dict() for problem in problems],
    }
    notes = list(getattr(exc, "__notes__", ()))
    if notes:
        data["notes"] = notes
    report = getattr(exc, "report", None)
    if report is not None:
        data["report"] = json.loads(report.model_dump_json())
    return {"error": data}


def as_lines(exc: Exception) -> Iterator[str]:
    """An exception as lines for people: all problems, then what to do next, each hint once."""
    error = as_refit_error(exc)
    hints = [_hints_of(problem) for problem in error.problems]
    times = Counter(hint for of_one in hints for hint in dict.fromkeys(of_one) if hint)
    shared = {hint for hint, number in times.items() if number > 1}
    yield error.message
    for problem, of_one in zip(error.problems, hints, strict=True):
        own = _BETWEEN.join(hint for hint in of_one if hint not in shared)
        yield f"  - {replace(problem, hint=own)}"
    yield from (_sentence(hint) for hint in times if hint in shared)
    yield from getattr(exc, "__notes__", ())
    yield from getattr(getattr(exc, "report", None), "notes", ())
    if error.hint:
        yield error.hint


def _hints_of(problem: Problem) -> list[str]:
    """Hints of a problem, without those for Python that the command has no flag for."""
    return [hint for hint in problem.hint.split(_BETWEEN) if not hint.endswith(_NO_FLAG)]


def _sentence(hint: str) -> str:
    end = "" if hint.endswith((".", "?", "!")) else "."
    return f"{hint[:1].upper()}{hint[1:]}{end}"


def _usage_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"Try '{context.command_path} --help'." if context else ""


# MERGED streams: Who may write to stdout.

_STDOUT, _STDERR = 1, 2


@contextmanager
def open_stdout() -> Iterator[TextIO]:
    """Give stdout, or nowhere if the caller closed it (``refitkit ... >&-``)."""
    if sys.stdout is not None:
        yield sys.stdout
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield nowhere


@contextmanager
def claimed_stdout() -> Iterator[TextIO]:
    """Keep stdout for the result alone.

    Whatever else is printed meanwhile, by plugins, compiled libraries or child processes, goes to
    stderr: someone parses what is on stdout.
    """
    with open_stdout() as stdout, _claimed(stdout) as own, redirect_stdout(sys.stderr):
        yield own


@contextmanager
def _claimed(stdout: TextIO) -> Iterator[TextIO]:
    """The same stream under another descriptor, while 1 is that of stderr."""
    if not _is_real(stdout):  # a test's stream, which only Python code can reach
        yield stdout
        return
    stdout.flush()
    ours = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with open(ours, "w", encoding="utf-8", closefd=False) as own:
            yield own
    finally:
        ctypes.CDLL(None).fflush(None)  # what C code printed is still in a buffer of its own
        os.dup2(ours, _STDOUT)
        os.close(ours)


def _is_real(stdout: TextIO) -> bool:
    try:
        os.fstat(_STDERR)
        return stdout.fileno() == _STDOUT
    except OSError:
        return False


def forget(stdout: TextIO) -> None:
    """Nobody reads it any more: send what is buffered, and the flush at exit, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stdout.fileno())
    except OSError:  # a test's
        return
    finally:
        os.close(nowhere)
