"""The entry point: from arguments to an exit code, with no traceback for a user's mistake."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, TextIO

import click

from refitkit.cli import failures
from refitkit.cli import plugin as builtin_commands
from refitkit.cli.arguments import look_ahead
from refitkit.cli.group import PipeClosedError, make_group
from refitkit.cli.known import unknown_names
from refitkit.cli.session import Session, as_json, tolerant_of_encodings
from refitkit.cli.streams import claimed_stdout, forget, open_stdout
from refitkit.errors import resources
from refitkit.host import make_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from refitkit.host import BrokenPlugin

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
            return failures.PIPE_CLOSED


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
        return failures.INTERRUPTED
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
    code = failures.exit_code(exc)
    session.progress.stop()
    if session.verbose or code == failures.BUG:
        traceback.print_exception(exc)
    if session.as_json:
        try:
            stdout.write(as_json(failures.as_data(exc)))
            stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # a full disk, say: the error is on stderr, too
            forget(stdout)
    if isinstance(exc, _HELP):
        exc.show()
    else:
        session.complain("error", "red", failures.as_lines(exc))
    return code
