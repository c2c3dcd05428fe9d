"""The entry point of the command line: from arguments to an exit code.

A user's mistake never shows a traceback. Read ``main`` first; then follow the sections: running a
command, the group ``refitkit`` with the commands of all plugins, reporting exceptions, and who may
write to stdout.
"""

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
from refitkit.cli.session import (
    COMMANDS,
    Session,
    as_json,
    escape_unencodable_output,
    parse_early_options,
)
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

REFUSED = 1
USAGE = 2
PLUGIN_FAULT = 3
BUG = 70
"""``EX_SOFTWARE`` of sysexits.h."""
INTERRUPTED = 130
PIPE_CLOSED = 141
"""The code that shells report for a process that SIGPIPE ended."""

HOOK = "refitkit_register_commands"

_DESPITE_BROKEN = frozenset({"plugins"})
"""Commands that run although a plugin is broken, because they find out why."""

_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""Exception of click 8.2 for a group without a subcommand; its message is the help."""


class PipeClosedError(Exception):
    """The reader of stdout has closed it."""


# -- running a command -------------------------------------------------------------------------


def main(args: Sequence[str] | None = None, plugins: Iterable[object] = ()) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None: those of the process.
        plugins: Explicit plugins, in addition to the built-in and installed ones.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if args is None else args)
    early = parse_early_options(given)
    escape_unencodable_output()
    # Before any plugin is imported, because imports may print.
    with claimed_stdout() if early.as_json else open_stdout() as stdout:
        session = Session(early, stdout, plugins)
        try:
            on_broken = session.broken.append if early.command in _DESPITE_BROKEN else None
            return _run_reporting(session, given, stdout, on_broken)
        except (BrokenPipeError, PipeClosedError):
            discard_output(stdout)
            return PIPE_CLOSED


def _run_reporting(
    session: Session,
    args: list[str],
    stdout: TextIO,
    on_broken: Callable[[BrokenPlugin], None] | None,
) -> int:
    """Run a command and report its failure, if any; returns the exit code."""
    try:
        code = _run(session, args, on_broken)
        with resources("The result cannot be written to stdout"):
            stdout.flush()
    except (click.Abort, KeyboardInterrupt) as exc:
        # click turns EOFError into Abort, as for a prompt. No command prompts: it is a failure.
        if isinstance(exc.__cause__, EOFError):
            return _report(session, exc.__cause__, stdout)
        return INTERRUPTED
    except (BrokenPipeError, PipeClosedError):
        raise
    except Exception as exc:  # noqa: BLE001 - the last place that can report it
        return _report(session, exc, stdout)
    finally:
        # also after an interrupt, which is not reported
        session.progress.stop()
    return code


def _run(
    session: Session, args: list[str], on_broken: Callable[[BrokenPlugin], None] | None
) -> int:
    session.registered = (builtin_commands, *session.plugins)
    session.host = make_host(session.config(), session.registered, on_broken=on_broken)
    for name in unknown_names(session):
        session.warn(f"There is no plugin {name!r} to switch off.")
    # made anew for each run: which commands exist depends on --no-plugin
    group = make_group(session.host, on_broken)
    # Without standalone mode, click raises errors instead of printing them and exiting.
    code = group.main(args, prog_name="refitkit", standalone_mode=False, obj=session)
    return code if isinstance(code, int) else 0


def _report(session: Session, exc: Exception, stdout: TextIO) -> int:
    """Report an exception on stderr, with ``--json`` also on stdout; returns the exit code."""
    code = exit_code(exc)
    session.progress.stop()
    # The traceback comes first, so that the message is the last thing on the screen.
    if session.verbose or code == BUG:
        traceback.print_exception(exc)
    if session.as_json:
        try:
            stdout.write(as_json(as_data(exc)))
            stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # for example a full disk; stderr still reports the error
            discard_output(stdout)
    if isinstance(exc, _HELP):
        exc.show()
    else:
        session.print_message("error", "red", as_lines(exc))
    return code


# -- the group ``refitkit`` --------------------------------------------------------------------

_NOT_A_FAULT = (RefitError, OSError, click.ClickException, click.exceptions.Exit, click.Abort)


class RootGroup(click.Group):
    """A group that records which plugin added each command.

    Attributes:
        registrar: Name of the plugin that is adding commands now.
        owners: Name of the plugin that added each command, by command.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the group; arguments are those of ``click.Group``."""
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
                hint=f"Rename it, or switch the plugin off: --no-plugin {self.registrar}.",
            )
        super().add_command(cmd, name)
        self.owners[given] = self.registrar

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click passes it
        """Commands in the order in which they were added, which is that of a workflow."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an unexpected exception of a plugin's command names the plugin.

        Raises:
            PluginError: A command that a plugin added raised an unexpected exception.
            PipeClosedError: The reader of stdout has closed it.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            # click handles EPIPE itself: it would end the process with exit code 1.
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
                hint="Report it to the plugin's authors; -v shows a traceback.",
            ) from exc


def make_group(host: Host, on_broken: Callable[[BrokenPlugin], None] | None = None) -> RootGroup:
    """Create the group with the commands of all plugins, built-in ones first.

    Args:
        host: Host with all plugins.
        on_broken: Called with each plugin that fails to add its commands.

    Raises:
        PluginError: A plugin fails, or adds a command whose name is taken, and ``on_broken`` is
            None. The message names the plugin.
    """

    @click.group("refitkit", cls=RootGroup, no_args_is_help=True)
    @common_options
    @click.version_option(__version__, prog_name="refitkit")
    def refitkit() -> None:
        """Put new weights into compiled inference engines, without compiling again.

        Exit codes: 0 success, 1 refused or mismatch, 2 usage error, 3 plugin fault.
        """

    names = [info.name for info in host.plugins() if HOOK in info.hooks]
    # Built-in commands first: of two commands of one name, the plugin's is then the wrong one.
    for name in sorted(names, key=lambda one: one != COMMANDS):
        refitkit.registrar = name
        try:
            host.call_one(name, HOOK, cli=refitkit)
        except PluginError as exc:
            if on_broken is None:
                raise
            on_broken(BrokenPlugin(host.candidate(name), exc))
    return refitkit


# -- reporting exceptions ----------------------------------------------------------------------

_HINT_SEPARATOR = "; "
"""Text between the hints of one problem."""
_PYTHON_HINT = "partial=True"
"""End of a hint that only Python callers can follow: ``refit`` replaces it by a flag."""


def exit_code(exc: Exception) -> int:
    """The exit code for an exception."""
    # The special cases of RefitError come before RefitError itself.
    if isinstance(exc, PluginError):
        return PLUGIN_FAULT
    if isinstance(exc, ConfigError):
        return USAGE
    if isinstance(exc, click.ClickException):
        return exc.exit_code
    known = isinstance(exc, RefitError | OSError) or resource_error(exc, "") is not None
    return REFUSED if known else BUG


def as_refit_error(exc: Exception) -> RefitError:
    """An exception as a ``RefitError`` with a hint."""
    if isinstance(exc, RefitError):
        return exc
    if isinstance(exc, click.ClickException):
        return RefitError(exc.format_message(), hint=_usage_hint(exc))
    if isinstance(exc, OSError):
        why = exc.strerror or str(exc) or type(exc).__name__
        what = f"{str(exc.filename)!r}: " if exc.filename else ""
        refused = resource_error(exc, "")
        hint = "Run with -v to see a traceback."
        return RefitError(f"{what}{why}.", hint=f"{refused.hint} {hint}" if refused else hint)
    refused = resource_error(exc, "The command cannot run")
    if refused is not None:
        return refused
    return RefitError(
        f"{type(exc).__name__}: {exc}",
        hint="This is a bug in refitkit: please report it with the traceback above.",
    )


def as_data(exc: Exception) -> dict[str, Any]:
    """An exception as the object that ``--json`` prints."""
    error = as_refit_error(exc)
    problems = [replace(one, hint=_HINT_SEPARATOR.join(_hints_of(one))) for one in error.problems]
    data: dict[str, Any] = {
        # One name for all subclasses: scripts should not depend on FileNotFoundError and the like.
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
    """An exception as lines for people: all problems, then the hints.

    A hint that several problems share is printed once, after them.
    """
    error = as_refit_error(exc)
    hints = [_hints_of(problem) for problem in error.problems]
    times = Counter(hint for of_one in hints for hint in dict.fromkeys(of_one) if hint)
    shared = {hint for hint, number in times.items() if number > 1}
    yield error.message
    for problem, of_one in zip(error.problems, hints, strict=True):
        own = _HINT_SEPARATOR.join(hint for hint in of_one if hint not in shared)
        yield f"  - {replace(problem, hint=own)}"
    yield from (_sentence(hint) for hint in times if hint in shared)
    yield from getattr(exc, "__notes__", ())
    yield from getattr(getattr(exc, "report", None), "notes", ())
    if error.hint:
        yield error.hint


def _hints_of(problem: Problem) -> list[str]:
    """Hints of a problem, without those that only Python callers can follow."""
    return [h for h in problem.hint.split(_HINT_SEPARATOR) if not h.endswith(_PYTHON_HINT)]


def _sentence(hint: str) -> str:
    end = "" if hint.endswith((".", "?", "!")) else "."
    return f"{hint[:1].upper()}{hint[1:]}{end}"


def _usage_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"Try '{context.command_path} --help'." if context else ""


# -- who may write to stdout -------------------------------------------------------------------

_STDOUT, _STDERR = 1, 2


@contextmanager
def open_stdout() -> Iterator[TextIO]:
    """Yield stdout, or a null device if the caller closed it (``refitkit ... >&-``)."""
    if sys.stdout is not None:
        yield sys.stdout
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield nowhere


@contextmanager
def claimed_stdout() -> Iterator[TextIO]:
    """Yield a stdout that carries only the result, because a program parses it.

    Everything else that plugins, compiled libraries or child processes print to stdout goes to
    stderr.
    """
    with open_stdout() as stdout, _moved(stdout) as own, redirect_stdout(sys.stderr):
        yield own


@contextmanager
def _moved(stdout: TextIO) -> Iterator[TextIO]:
    """Yield stdout under another descriptor, while descriptor 1 points at stderr."""
    if not _is_real(stdout):  # a test's stream, which only Python code can reach
        yield stdout
        return
    stdout.flush()
    ours = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        # closefd: ``ours`` is still needed below, to restore descriptor 1.
        with open(ours, "w", encoding="utf-8", closefd=False) as own:
            yield own
    finally:
        # Output of C code may still be in a buffer of libc. Flush it while 1 points at stderr.
        ctypes.CDLL(None).fflush(None)
        os.dup2(ours, _STDOUT)
        os.close(ours)


def _is_real(stdout: TextIO) -> bool:
    try:
        os.fstat(_STDERR)  # raises if the caller closed stderr
        return stdout.fileno() == _STDOUT
    except OSError:
        return False


def discard_output(stdout: TextIO) -> None:
    """Redirect a stream to the null device, so that the flush at exit cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stdout.fileno())
    except OSError:  # a test's stream has no descriptor
        return
    finally:
        os.close(nowhere)
