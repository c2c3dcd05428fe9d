"""Interrupts at a place that is chosen beforehand.

A run without an interrupt counts the places; then each of them can be interrupted in turn.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PACKAGE = Path(refitkit.__file__).parent
_HELPERS = {contextlib.__file__, threading.__file__}
SECONDS = 60
"""Longer than anything takes: only what waits for ever fails."""


class Interrupt(BaseException):
    """Like KeyboardInterrupt: no ``except Exception`` catches it."""


class Points:
    """Counts places in some files, and raises at one of them.

    By default those are the places where CPython looks for signals: behind every call, at the
    start of every function, and where a loop jumps back (``CHECK_EVAL_BREAKER`` in
    ``Python/ceval.c``). Only there Ctrl-C can raise. With ``lines``, they are the starts of all
    lines. A debugger or a profiler can raise there.

    Attributes:
        at: Number of the place to raise at; None: none.
        count: How many places were passed.
        where: The frames at the place that was interrupted, innermost first.
    """

    def __init__(self, at: int | None, within: Callable[[str], bool], *, lines: bool = False):
        self.at, self.count, self.where = at, 0, ""
        self._within, self._lines = within, lines
        self._last: dict[Any, str] = {}
        self._is_collecting = False

    def __enter__(self) -> Self:
        # finalizers that a collection runs may belong to earlier runs, and Python ignores what they
        # raise; after it, CPython 3.11 may call the wrong object at the end of a with statement
        gc.callbacks.append(self._note_collection)
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        gc.callbacks.remove(self._note_collection)
        self._last.clear()

    def _note_collection(self, phase: str, _info: object) -> None:
        self._is_collecting = phase == "start"

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        if not self._is_traced(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = not self._lines, self._lines
        return self._step

    def _step(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self._point(frame)
        elif event == "opcode":
            last, here = self._last.get(frame, ""), dis.opname[frame.f_code.co_code[frame.f_lasti]]
            self._last[frame] = here
            raised = here in {"PUSH_EXC_INFO", "CLEANUP_THROW"}  # the call did not come back
            if last.startswith(("CALL", "RESUME", "JUMP_BACKWARD")) and not raised:
                self._point(frame)
        elif event == "return":
            self._last.pop(frame, None)
        return self._step

    def _point(self, frame: Any) -> None:
        if self._is_collecting:
            return
        self.count += 1
        if self.count - 1 == self.at:
            self.where = self._stack(frame)
            raise Interrupt(self.where)

    def _is_traced(self, frame: Any) -> bool:
        """Whether it is code of these files, or the standard library's on their behalf."""
        while frame is not None and frame.f_code.co_filename in _HELPERS:
            frame = frame.f_back
        return frame is not None and self._within(frame.f_code.co_filename)

    def _stack(self, frame: Any) -> str:
        places = []
        while frame is not None:
            if self._is_traced(frame):
                code, line = frame.f_code, frame.f_lineno
                places.append(f"{Path(code.co_filename).name}:{line} in {code.co_name}")
            frame = frame.f_back
        return " < ".join(places)


def in_refitkit(file: str) -> bool:
    """Whether a file is one of refitkit's."""
    return file.startswith(str(PACKAGE))


def in_new_thread(function: Callable[[], T]) -> T:
    """The result of a function that is interrupted at a chosen place.

    CPython 3.11 may go on handling an exception in the thread in which a trace function raises: all
    later exceptions of that thread would have it as their context.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def in_a_thread(function: Callable[[], Any]) -> Any:
    """The result of a function, None if it fails or takes for ever."""
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return results[0] if results else None
