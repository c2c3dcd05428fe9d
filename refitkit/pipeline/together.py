"""One refit, or several modules refitted as one: all of them hold their new weights, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from refitkit.errors import ConfigError, Problem, RefitError, VerificationError
from refitkit.pipeline.commit import Transaction
from refitkit.pipeline.gate import in_order, inside_all
from refitkit.pipeline.writing import Prepared, Writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.report import Outcome

T = TypeVar("T")


class Task(Protocol):
    """New weights for one module."""

    @property
    def compiled(self) -> CompiledModule:
        """The module."""

    def prepare(self) -> Prepared:
        """Do all that can be done before anything is staged; nothing is changed."""


def run(host: Host, config: Config, tasks: Sequence[Task]) -> tuple[Outcome, ...]:
    """Do all tasks in one transaction.

    Returns:
        How each went.

    Raises:
        ConfigError: Two tasks are for one module.
        RefitError: Refused or failed, with the problems of all tasks; unless it is a
            ``ModuleLostError``, all modules answer as before.
    """
    _require_distinct(tasks)
    gates = in_order(task.compiled.gate for task in tasks)
    return inside_all([gate.refit for gate in gates], lambda: _run(host, config, tasks))


def _run(host: Host, config: Config, tasks: Sequence[Task]) -> tuple[Outcome, ...]:
    names = [_name(number, task) for number, task in enumerate(tasks)]
    prepared = each(names, [task.prepare for task in tasks])
    writings = [
        Writing(host, config, task.compiled, one) for task, one in zip(tasks, prepared, strict=True)
    ]
    try:
        each(names, [writing.stage for writing in writings])
        Transaction(writings, names).run()
    finally:
        for writing in writings:
            writing.discard()
    return tuple(writing.outcome for writing in writings)


def _require_distinct(tasks: Sequence[Task]) -> None:
    first: dict[int, int] = {}
    twice = [
        Problem(_name(number, task), "the same module", hint=f"it is module {seen + 1}, too")
        for number, task in enumerate(tasks)
        if (seen := first.setdefault(_identity(task.compiled), number)) != number
    ]
    if twice:
        hint = "Give each module once, with all its weights."
        raise ConfigError("A module can be refitted once at a time.", problems=twice, hint=hint)


def _identity(compiled: CompiledModule) -> int:
    """Equal for handles of one module: a handle, and what another one was loaded from."""
    return id(compiled if compiled.target is None else compiled.target)


def each(names: Sequence[str], actions: Sequence[Callable[[], T]]) -> list[T]:
    """What all actions return.

    Args:
        names: What the modules are called in errors, if there are several.
        actions: One for each.

    Raises:
        RefitError: Some were refused; one error with all problems, which says which modules.
    """
    done: list[T] = []
    refused: list[tuple[str, RefitError]] = []
    for name, action in zip(names, actions, strict=True):
        try:
            done.append(action())
        except RefitError as exc:
            if len(names) == 1:
                raise
            refused.append((name, exc))
    if refused:
        raise _as_one(refused, len(names)) from refused[0][1]
    return done


def _name(number: int, task: Task) -> str:
    return f"module {number + 1} ({task.compiled.backend})"


def _as_one(refused: Sequence[tuple[str, RefitError]], of: int) -> RefitError:
    """One error of several: of their kind, if they are of one, with the report of the first."""
    errors = [error for _, error in refused]
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else RefitError
    problems = [
        replace(problem, subject=f"{name}: {problem.subject}")
        for name, error in refused
        for problem in error.problems or [Problem(type(error).__name__, "refused", error.message)]
    ]
    reasons = " ".join(f"{name[0].upper()}{name[1:]}: {error.message}" for name, error in refused)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    one = kind(
        f"{len(refused)} of {of} modules cannot be refitted, and none was. {reasons}",
        problems=problems,
        hint=" ".join(hints),
    )
    if isinstance(one, VerificationError) and isinstance(errors[0], VerificationError):
        one.report = errors[0].report
    return one
