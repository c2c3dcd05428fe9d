"""Every error that refitkit raises on purpose, as one tree.

::

    RefitError
    ├── ConfigError              a setting or option that does not exist or cannot be meant
    ├── UnsupportedTargetError   no plugin can open, compile or save this target
    ├── SourceError              the weights cannot be read (truncated, not a state_dict, ...)
    ├── NotRefittableError       the engine cannot take new weights; names the flag to set
    ├── CompileError             the compiler refused the program
    │   └── ToolchainError       a tool that compiling needs is not installed
    ├── WeightMismatchError      the weights do not fit; ``.problems`` lists every reason at once
    ├── PlanMismatchError        the plan belongs to another model, engine or version
    ├── UnmappedSlotError        slots for which no strategy has a value
    ├── InputMismatchError       a call with inputs that the compiled module was not made for
    ├── VerificationError        the refitted module is not what it should be; ``.report``
    ├── EngineError              an engine failed: in a call, staging, or committing weights
    ├── RefitInProgressError     a refit was started from inside a refit of the same module
    ├── DeadlockError            threads would wait for one another's modules for ever
    ├── ModuleLostError          a rollback failed: the module refuses calls
    ├── ResourceError            the system refused: no space, memory, descriptors or permission
    └── PluginError              a plugin is broken; names it

All of them carry ``problems``, a tuple of :class:`Problem`, one for each thing that is wrong, and
``hint``, what to do next. Unless it is a :class:`ModuleLostError`, the module that a refit was
meant for answers after the error bit for bit as before.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHOWN_PROBLEMS = 40
"""So many problems are spelled out in a message; ``problems`` always holds all of them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        subject: What it is about: a slot, an FQN, a flag, a file, a plugin.
        kind: A short word to sort by: ``missing``, ``unexpected``, ``shape``, ``dtype``,
            ``layout``, ``non-finite``, ``tie``, ...
        found: What is there, as text; empty where there is nothing to show.
        wanted: What should be there, as text.
        hint: What to do about it.
    """

    subject: str
    kind: str
    found: str = ""
    wanted: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.subject}: {self.kind}"]
        if self.found:
            parts.append(f"found {self.found}")
        if self.wanted:
            parts.append(f"wanted {self.wanted}")
        text = ", ".join(parts)
        return f"{text} ({self.hint})" if self.hint else text

    def as_dict(self) -> dict[str, str]:
        """The same as plain data, for JSON."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "found": self.found,
            "wanted": self.wanted,
            "hint": self.hint,
        }


class RefitError(Exception):
    """The root of all errors that refitkit raises on purpose.

    Attributes:
        message: What happened, in one sentence.
        problems: Everything that is wrong, in the order in which it was found.
        hint: What to do next; may be empty.
    """

    def __init__(self, message: str, *, problems: Iterable[Problem] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            hidden = len(self.problems) - SHOWN_PROBLEMS
            lines.append(f"  - and {hidden} more, all of them in .problems")
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class ConfigError(RefitError):
    """A setting or option does not exist or cannot be meant."""


class UnsupportedTargetError(RefitError):
    """No plugin can open, compile or save this target."""


class SourceError(RefitError):
    """The weights cannot be read."""


class NotRefittableError(RefitError):
    """The engine cannot take new weights as it was compiled; the message names the flag to set."""


class CompileError(RefitError):
    """The compiler refused the program."""


class ToolchainError(CompileError):
    """A tool that compiling needs is not installed."""


class WeightMismatchError(RefitError):
    """The weights do not fit the engine.

    ``problems`` holds every missing, unexpected, wrong-shape, wrong-dtype, unusable or non-finite
    entry at once.
    """


class PlanMismatchError(RefitError):
    """The plan belongs to another model, engine, version, or is not a plan at all."""


class UnmappedSlotError(RefitError):
    """No strategy has a value for some slots; ``problems`` says for each why not."""


class InputMismatchError(RefitError):
    """A compiled module was called with inputs that it was not made for."""


class VerificationError(RefitError):
    """The refitted module is not what it should be; its old weights are back.

    Attributes:
        report: The :class:`~refitkit.model.RefitReport` of the attempt, with all measurements.
    """

    def __init__(
        self,
        message: str,
        *,
        problems: Iterable[Problem] = (),
        hint: str = "",
        report: Any = None,
    ) -> None:
        super().__init__(message, problems=problems, hint=hint)
        self.report = report


class EngineError(RefitError):
    """An engine failed: in a call, or a refit; after a failed refit the old weights are live."""


class RefitInProgressError(RefitError):
    """A refit was started from inside a refit of the same module."""


class DeadlockError(RefitError):
    """Threads would wait for one another's modules for ever; this one does not wait.

    ``problems`` lists who waits for whom.
    """


class ModuleLostError(RefitError):
    """Nobody knows which weights the module holds, so it refuses calls.

    A rollback failed; or the process was forked while another thread committed.
    """


class ResourceError(RefitError):
    """The system refused a resource; neither a file, nor the weights, nor a plugin is at fault.

    There is no space, no memory, no file descriptor or no permission, a file would be too large, or
    a device fails. ``__cause__`` is the exception of the system, or one that was raised because of
    it.
    """


class PluginError(RefitError):
    """A plugin is broken; the message names it and how to switch it off."""


_SPACE = "Free space there, or use a folder on another file system: TMPDIR is for temporary files."
_RIGHTS = "Change its rights, or use a folder that is yours: TMPDIR is for temporary files."
_DEVICE = "Look at the kernel's log (dmesg) for failures of the device, and try again."
_MEMORY = "Free memory, or raise the limit: ulimit -v, or that of the container."
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"The quota is used up. {_SPACE}",
    errno.EFBIG: "Raise the limit of the size of files: ulimit -f unlimited.",
    errno.EMFILE: "Close files, or raise the limit of open files: ulimit -n.",
    errno.ENFILE: "Raise the limit of open files of the whole system: sysctl fs.file-max.",
    errno.EIO: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "Use a folder that can be written to: TMPDIR is for temporary files.",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: "Free processes and memory, or raise the limits: ulimit -u.",
    errno.ENOLCK: "Free locks, or use a file system that has them.",
    errno.ENOENT: "Set TMPDIR to a folder that is there and can be written to.",
}
"""Errors of the system that say nothing of a file's content, and what to do."""

_OF_LIBRARIES = {os.strerror(code): code for code in _HINTS} | {
    "can't allocate memory": errno.ENOMEM,  # c10/core/impl/alloc_cpu.cpp of torch
    "CUDA out of memory": errno.ENOMEM,
    "std::bad_alloc": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,  # Modules/_threadmodule.c of CPython
    "File size limit exceeded": errno.EFBIG,  # of a compiler that SIGXFSZ ended
}
"""How libraries in C and C++ name these errors in exceptions of their own."""


_NO_FOLDER = "No usable temporary directory"  # Lib/tempfile.py of CPython


def _code_of(exc: BaseException) -> int | None:
    """The error of the system that an exception is; None where it is something else."""
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":  # torch's
        return errno.ENOMEM
    if isinstance(exc, FileNotFoundError):  # what is missing was asked for by somebody, mostly
        return errno.ENOENT if _NO_FOLDER in str(exc) else None
    if isinstance(exc, OSError):
        return exc.errno if exc.errno in _HINTS else None
    if isinstance(exc, RuntimeError | ImportError):
        text = str(exc)
        return next((code for said, code in _OF_LIBRARIES.items() if said in text), None)
    return None


def resource_error(exc: BaseException, what: str) -> ResourceError | None:
    """The error where an exception is because the system refused a resource; else None.

    Args:
        exc: The exception. Those that it was raised from count, too.
        what: What cannot be done, and with which file; the reason follows.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ResourceError):
            return cause
        code = _code_of(cause)
        if code is not None:
            error = ResourceError(f"{what}: {_reason(cause, code)}.", hint=_HINTS[code])
            error.__cause__ = exc
            return error
        # zipfile says "not a zip file" where it cannot read the end of one
        hides = type(cause).__name__ == "BadZipFile"
        cause = cause.__cause__ or (cause.__context__ if hides else None)
    return None


def raise_if_resource(exc: BaseException, what: str) -> None:
    """Raise what ``resource_error`` gives, if anything.

    Raises:
        ResourceError: The system refused a resource.
    """
    error = resource_error(exc, what)
    if error is not None:
        raise error


def refused(exc: OSError, what: str) -> ResourceError:
    """The error where an exception can only mean that the system refused a resource.

    Args:
        exc: The exception, of any ``errno``: a file or folder of refitkit's own may be gone, too.
        what: As for ``raise_if_resource``.
    """
    code = exc.errno or 0
    return ResourceError(f"{what}: {_reason(exc, code)}.", hint=_HINTS.get(code, ""))


def _reason(exc: BaseException, code: int) -> str:
    """The reason as the system says it, and the file where it is known."""
    if isinstance(exc, OSError):
        reason = exc.strerror or str(exc) or type(exc).__name__
        names = [repr(str(name)) for name in (exc.filename, exc.filename2) if name is not None]
        return ": ".join([reason, *names])
    reason = os.strerror(code)
    text = str(exc).strip().partition("\n")[0].removesuffix(".")
    return f"{reason}: {text}" if text and reason not in text else text or reason


@contextmanager
def resources(what: str) -> Iterator[None]:
    """Raise a ``ResourceError`` where the system refuses something; other exceptions go through.

    It is a decorator, too.

    Args:
        what: As for ``raise_if_resource``.
    """
    try:
        yield
    except RefitError:
        raise
    except Exception as exc:
        raise_if_resource(exc, what)
        raise


@contextmanager
def raised_as(
    kind: type[RefitError], what: str, *, hint: str = "", doing: str = ""
) -> Iterator[None]:
    """Turn exceptions that nobody meant into a typed error.

    Args:
        kind: The error to raise.
        what: What was going on, and whose doing it is; the exception's own text follows.
        hint: What to do next.
        doing: What was going on, where the system refuses a resource and it is nobody's doing;
            ``what`` where empty.

    Raises:
        ResourceError: The system refused a resource.
        RefitError: As it was raised inside, or of this kind, caused by what was raised inside.
            What is no ``Exception`` (an interrupt) goes through as it is.
    """
    try:
        yield
    except RefitError:
        raise
    except Exception as exc:
        raise_if_resource(exc, doing or what)
        raise kind(f"{what}: {type(exc).__name__}: {exc}", hint=hint) from exc
