"""Exceptions as exit codes, as text for people and as data for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from refitkit.errors import ConfigError, PluginError, RefitError, resource_error

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = 1
USAGE = 2
PLUGIN_FAULT = 3
BUG = 70
"""``EX_SOFTWARE`` of sysexits.h."""
INTERRUPTED = 130
PIPE_CLOSED = 141
"""As shells report a process that SIGPIPE ended."""


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
    data: dict[str, Any] = {
        "type": "OSError" if isinstance(exc, OSError) else type(exc).__name__,
        "message": error.message,
        "hint": error.hint,
        "problems": [problem.as_dict() for problem in error.problems],
    }
    notes = list(getattr(exc, "__notes__", ()))
    if notes:
        data["notes"] = notes
    report = getattr(exc, "report", None)
    if report is not None:
        data["report"] = json.loads(report.model_dump_json())
    return {"error": data}


def as_lines(exc: Exception) -> Iterator[str]:
    """An exception as lines for people: all problems, then what to do next."""
    error = as_refit_error(exc)
    yield error.message
    yield from (f"  - {problem}" for problem in error.problems)
    yield from getattr(exc, "__notes__", ())
    if error.hint:
        yield error.hint


def _usage_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"Try '{context.command_path} --help'." if context else ""
