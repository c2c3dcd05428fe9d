"""Every error that refitkit raises on purpose, and helpers that raise them for other exceptions.

The error classes form one tree:

::

    RefitError
    ├── ConfigError              a setting or option does not exist or has an invalid value
    ├── UnsupportedTargetError   no plugin can open, compile or save this target
    ├── SourceError              the weights cannot be read (truncated, not a state_dict, ...)
    ├── NotRefittableError       the engine cannot take new weights; names the flag to set
    ├── CompileError             the compiler refused the program
    │   └── ToolchainError       a tool that compilation needs is not installed
    ├── WeightMismatchError      the weights do not fit; ``.problems`` lists every reason at once
    ├── PlanMismatchError        the plan belongs to another model, engine or version
    ├── UnmappedSlotError        no strategy has a value for some slots
    ├── InputMismatchError       a call passed inputs that the compiled module does not accept
    ├── VerificationError        the refitted module is wrong; ``.report`` has the measurements
    ├── EngineError              an engine failed: in a call, staging, or committing weights
    ├── RefitInProgressError     a refit was started from inside a refit of the same module
    ├── UpdateStateError         a receiver of live updates cannot do this in its present state
    ├── DeadlockError            threads would wait for one another's modules forever
    ├── ModuleLostError          a rollback failed: the module refuses calls
    ├── ResourceError            the system refused: no space, memory, descriptors or permission
    └── PluginError              a plugin is broken; names it

Every error has ``problems``, a tuple with one :class:`Problem` for each thing that is wrong, and
``hint``, the next step for the user. After an error of a refit the module answers bit for bit as
before, unless the error is a :class:`ModuleLostError`.

The helpers below the classes turn exceptions of libraries into these errors. ``resource_error``
decides whether an exception means that the operating system refused a resource. Start there.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Models have thousands of weights, and a message with all of them would hide the hint.
SHOWN_PROBLEMS = 40
"""Number of problems that a message lists; ``problems`` always holds all of them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        subject: Thing that is wrong: a slot, an FQN, a flag, a file, a plugin.
        kind: Short word to sort by: ``missing``, ``unexpected``, ``shape``, ``dtype``,
            ``layout``, ``non-finite``, ``tie``, ...
        found: Actual value, as text; empty if there is nothing to show.
        wanted: Expected value, as text.
        hint: Way to fix the problem.
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
        """The problem as plain data, for JSON."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "found": self.found,
            "wanted": self.wanted,
            "hint": self.hint,
        }


class RefitError(Exception):
    """The base class of all errors that refitkit raises on purpose.

    Attributes:
        message: One sentence that says what happened.
        problems: Everything that is wrong, in the order in which it was found.
        hint: Next step for the user; may be empty.
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
    """A setting or option does not exist or has an invalid value."""


class UnsupportedTargetError(RefitError):
    """No plugin can open, compile or save this target."""


class SourceError(RefitError):
    """The weights cannot be read."""


class NotRefittableError(RefitError):
    """The engine cannot take new weights as it was compiled; the message names the flag to set."""


class CompileError(RefitError):
    """The compiler refused the program."""


class ToolchainError(CompileError):
    """A tool that compilation needs is not installed."""


class WeightMismatchError(RefitError):
    """The weights do not fit the engine.

    ``problems`` holds every missing, unexpected, wrong-shape, wrong-dtype, unusable or non-finite
    entry at once.
    """


class PlanMismatchError(RefitError):
    """The plan belongs to another model, engine or version, or the file holds no plan."""


class UnmappedSlotError(RefitError):
    """No strategy has a value for some slots; ``problems`` gives the reason for each."""


class InputMismatchError(RefitError):
    """A compiled module was called with inputs that it does not accept."""


class VerificationError(RefitError):
    """The refitted module is wrong, and was rolled back to its old weights.

    Attributes:
        report: :class:`~refitkit.model.RefitReport` of the attempt, with all measurements.
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
    """An engine failed in a call or in a refit; after a failed refit the old weights are live."""


class RefitInProgressError(RefitError):
    """A refit was started from inside a refit of the same module."""


class UpdateStateError(RefitError):
    """A receiver of live updates cannot do this in its present state. Nothing was changed."""


class DeadlockError(RefitError):
    """Threads would wait for one another's modules forever, so this thread does not wait.

    ``problems`` lists which thread waits for which.
    """


class ModuleLostError(RefitError):
    """The weights of the module are unknown, so it refuses calls.

    Either a rollback failed, or the process was forked while another thread committed.
    """


class ResourceError(RefitError):
    """The system refused a resource; the file, the weights and the plugins are not at fault.

    There is no space, memory, file descriptor or permission, a file would be too large, or a device
    fails. ``__cause__`` is the system's exception, or one that was raised because of it.
    """


class PluginError(RefitError):
    """A plugin is broken; the message names it, and the hint says how to switch it off."""


# -- exceptions of the system ------------------------------------------------------------------

_SPACE = "Free space there, or use another file system: TMPDIR sets the temporary folder."
_RIGHTS = "Change its permissions, or use a folder of your own: TMPDIR sets the temporary folder."
_DEVICE = "Look in the kernel's log (dmesg) for failures of the device, and try again."
_MEMORY = "Free memory, or raise the limit: ulimit -v, or the limit of the container."
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"The quota is used up. {_SPACE}",
    errno.EFBIG: "Raise the limit on file size: ulimit -f unlimited.",
    errno.EMFILE: "Close files, or raise the limit on open files: ulimit -n.",
    errno.ENFILE: "Raise the limit on open files of the whole system: sysctl fs.file-max.",
    errno.EIO: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "Use a writable folder: TMPDIR sets the temporary folder.",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: "End processes, free memory, or raise the limit on processes: ulimit -u.",
    errno.ENOLCK: "Release locks, or use a file system that supports them.",
    # Only for the temporary folder: ``_code_of`` ignores other missing files.
    errno.ENOENT: "Set TMPDIR to an existing, writable folder.",
}
"""Hints by error code. These codes say nothing about the content of a file."""

# Libraries in C++ raise RuntimeError, so only its text shows that the system refused.
_CODE_OF_TEXT = {os.strerror(code): code for code in _HINTS} | {
    "can't allocate memory": errno.ENOMEM,  # c10/core/impl/alloc_cpu.cpp of torch
    "CUDA out of memory": errno.ENOMEM,
    "std::bad_alloc": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,  # Modules/_threadmodule.c of CPython
    "File size limit exceeded": errno.EFBIG,  # a compiler that SIGXFSZ ended
}
"""Error codes by the texts that libraries in C and C++ use in their own exceptions."""

_NO_FOLDER = "No usable temporary directory"  # Lib/tempfile.py of CPython


def _code_of(exc: BaseException) -> int | None:
    """The system's error code for an exception; None if the system refused nothing."""
    # The name instead of the class: torch.OutOfMemoryError is not imported here.
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return errno.ENOMEM
    # Mostly the user named a missing file, and that is not a fault of the system.
    if isinstance(exc, FileNotFoundError):
        return errno.ENOENT if _NO_FOLDER in str(exc) else None
    if isinstance(exc, OSError):
        return exc.errno if exc.errno in _HINTS else None
    if isinstance(exc, RuntimeError | ImportError):
        text = str(exc)
        return next((code for known, code in _CODE_OF_TEXT.items() if known in text), None)
    return None


def resource_error(exc: BaseException, what: str) -> ResourceError | None:
    """A ``ResourceError`` if an exception means that the system refused a resource; else None.

    Args:
        exc: Exception to examine, with the exceptions that it was raised from.
        what: Text that says what cannot be done, and with which file; the reason is appended.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ResourceError):
            return cause
        code = _code_of(cause)
        if code is not None:
            error = ResourceError(f"{what}: {_reason(cause, code)}.", hint=_HINTS[code])
            # the given exception, not ``cause``: its chain contains that, and the way to it
            error.__cause__ = exc
            return error
        # Lib/zipfile of CPython raises BadZipFile, not "from" the OSError, if a read at the end
        # of the file fails. Elsewhere a context is unrelated to the exception.
        hides_cause = type(cause).__name__ == "BadZipFile"
        cause = cause.__cause__ or (cause.__context__ if hides_cause else None)
    return None


def raise_if_resource(exc: BaseException, what: str) -> None:
    """Raise a ``ResourceError`` if ``resource_error`` returns one.

    Args:
        exc: As for ``resource_error``.
        what: As for ``resource_error``.

    Raises:
        ResourceError: The system refused a resource.
    """
    error = resource_error(exc, what)
    if error is not None:
        raise error


def refused(exc: OSError, what: str) -> ResourceError:
    """A ``ResourceError`` for an exception that can only come from the system.

    Args:
        exc: Exception with any ``errno``, ``ENOENT`` included: the file was not named by the user.
        what: As for ``resource_error``.
    """
    code = exc.errno or 0
    return ResourceError(f"{what}: {_reason(exc, code)}.", hint=_HINTS.get(code, ""))


def _reason(exc: BaseException, code: int) -> str:
    """The system's text for an error code, and the files that the exception names."""
    if isinstance(exc, OSError):
        reason = exc.strerror or str(exc) or type(exc).__name__
        names = [repr(str(name)) for name in (exc.filename, exc.filename2) if name is not None]
        return ": ".join([reason, *names])
    reason = os.strerror(code)
    # Only the first line: torch appends stack traces of C++ to its messages.
    text = str(exc).strip().partition("\n")[0].removesuffix(".")
    return f"{reason}: {text}" if text and reason not in text else text or reason


@contextmanager
def resources(what: str) -> Iterator[None]:
    """Raise a ``ResourceError`` if the system refuses a resource; other exceptions pass.

    It works as a context manager and as a decorator.

    Args:
        what: As for ``resource_error``.
    """
    try:
        yield
    except RefitError:  # an inner place has described the failure more exactly
        raise
    except Exception as exc:
        raise_if_resource(exc, what)
        raise


def _made(text: str | Callable[[], str]) -> str:
    return text if isinstance(text, str) else text()


@contextmanager
def raised_as(
    kind: type[RefitError], what: str | Callable[[], str], *, hint: str = "", doing: str = ""
) -> Iterator[None]:
    """Raise a typed error for any unexpected exception of the body.

    A ``RefitError`` of the body passes unchanged, and so do interrupts.

    Args:
        kind: Class of the error.
        what: Text that says what failed, and who is responsible; the exception's text is appended.
            A function returns the text, if making it takes time.
        hint: Next step for the user.
        doing: Text for a ``ResourceError``, which is no code's fault; empty: ``what``.

    Raises:
        ResourceError: The system refused a resource.
        RefitError: The body raised another exception; an error of this kind is raised from it.
    """
    try:
        yield
    except RefitError:
        raise
    except Exception as exc:
        raise_if_resource(exc, doing or _made(what))
        raise kind(f"{_made(what)}: {type(exc).__name__}: {exc}", hint=hint) from exc
