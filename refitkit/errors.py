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
    └── PluginError              a plugin is broken; names it

All of them carry ``problems``, a tuple of :class:`Problem`, one for each thing that is wrong, and
``hint``, what to do next. Unless it is a :class:`ModuleLostError`, the module that a refit was
meant for answers after the error bit for bit as before.
"""

from __future__ import annotations

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


class PluginError(RefitError):
    """A plugin is broken; the message names it and how to switch it off."""


@contextmanager
def raised_as(kind: type[RefitError], what: str, *, hint: str = "") -> Iterator[None]:
    """Turn exceptions that nobody meant into a typed error.

    Args:
        kind: The error to raise.
        what: What was going on, and whose doing it is; the exception's own text follows.
        hint: What to do next.

    Raises:
        RefitError: As it was raised inside, or of this kind, caused by what was raised inside.
            What is no ``Exception`` (an interrupt) goes through as it is.
    """
    try:
        yield
    except RefitError:
        raise
    except Exception as exc:
        raise kind(f"{what}: {type(exc).__name__}: {exc}", hint=hint) from exc
