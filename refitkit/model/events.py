"""Events, which go to plugins through the hook ``refitkit_event``.

An operation is one call of a verb: of ``Pipeline.refit``, for example. Its events are, in order:

1. :class:`Started`;
2. for each stage :class:`StageStarted`, any number of :class:`Step`, and then either
   :class:`StageFinished` or :class:`StageFailed`;
3. exactly one of :class:`Finished`, :class:`Failed` and :class:`Aborted`.

An operation may run others in between: ``refit`` of a path also loads the module, and ``compile``
refits it on trial. Events of those have ids of their own, and name the outer operation as their
``parent``. An inner operation starts after its outer one and ends before it. Operations of several
threads are interleaved: tell them apart by ``id``.

``trial`` is set in all events of an operation that refitkit runs to prove a plan, and of the
operations inside it. Their weights are made up.

An error ends the stage with :class:`StageFailed` and the operation with :class:`Failed`. Ctrl-C and
other interrupts end the stage with :class:`StageFailed` and the operation with :class:`Aborted`.
A refit whose verifier rejects the weights finishes ``verify``, and then fails; its
rollback is no stage.

Stages of each verb, in order; those in brackets occur only in some cases:

* ``compile``: compile, plan, [prove]
* ``load``: open, [warm]
* ``plan``: plan, [prove], [adopt]
* ``refit``: load, [compare], map, check, prepare, stage, commit, verify
* ``restore``: load, map, check, prepare, stage, commit, verify
* ``diff``: open, compare
* ``save``: save
* ``copy``, ``verify``, ``open_weights``, ``describe``, ``read_plan``: none

A refit of a module that publishes (:class:`~refitkit.protocols.OpensStaged`) has ``verify`` before
``commit``. Without a verifier there is no ``verify``.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """The base class of events.

    Two events are equal if verb and contents are, whichever operations they belong to.

    Attributes:
        verb: Name of the operation: ``compile``, ``load``, ``plan``, ``refit``, ``restore``,
            ``copy``, ``verify``, ``diff``, ``open_weights``, ``describe``, ``read_plan`` or
            ``save``.
        id: Identifies the operation: unique, and the same in all of its events.
        parent: ``id`` of the operation that runs this one; empty for an operation of the user.
        module: ``CompiledModule.name`` of the module; empty if there is none or there are several.
        trial: Whether refitkit runs the operation to prove a plan, on weights that are not the
            user's.
    """

    verb: str
    id: str = field(default="", compare=False, kw_only=True)
    parent: str = field(default="", compare=False, kw_only=True)
    module: str = field(default="", compare=False, kw_only=True)
    trial: bool = field(default=False, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Started(Event):
    """An operation has started."""


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """An operation has succeeded.

    Attributes:
        result: The result of the verb: a ``RefitResult`` with its ``report``, which is made when it
            is first asked for, or a list of them; a ``CompiledModule``, ``RefitPlan``,
            ``DiffReport``, ... A trial refit has a ``RefitReport``. Keep no reference to a module.
    """

    result: object


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """An operation has failed.

    Attributes:
        error: The exception that the caller gets.
    """

    error: Exception


@dataclass(frozen=True, slots=True)
class Aborted(Event):
    """An operation was interrupted, as by Ctrl-C."""


@dataclass(frozen=True, slots=True)
class StageStarted(Event):
    """A stage has started.

    Attributes:
        stage: Name of the stage.
        total: Number of steps to come; None if unknown.
    """

    stage: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Step(Event):
    """A step of a stage has ended. Emitted for long steps, never for each tensor.

    Attributes:
        stage: Name of the stage.
        text: Description of the step.
    """

    stage: str
    text: str


@dataclass(frozen=True, slots=True)
class StageFinished(Event):
    """A stage has ended without an error.

    Attributes:
        stage: Name of the stage.
        seconds: Wall-clock time in seconds.
    """

    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StageFailed(Event):
    """A stage has ended with an error, or was interrupted.

    Attributes:
        stage: Name of the stage.
        seconds: Wall-clock time in seconds.
    """

    stage: str
    seconds: float
