"""Exceptions as exit codes, as text for people and as data for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from refitkit.errors import ConfigError, PluginError, Problem, RefitError, resource_error

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
