"""Who may write to stdout."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

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
