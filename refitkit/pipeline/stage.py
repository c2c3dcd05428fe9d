"""The stage ``stage``: new values beside the live ones, in every engine.

Values are computed when an engine asks for them. So a strategy that fails shows up here, as an
engine that cannot stage; ``_attribute_failure`` finds out which of the two is at fault.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from refitkit.errors import EngineError, PluginError, RefitError, raise_if_resource, raised_as
from refitkit.model import EngineMemory
from refitkit.offered import received, shown
from refitkit.protocols import (
    OpensStaged,
    RemembersWeights,
    StagedRefit,
    SupportsOverwrite,
    SupportsPartial,
    SupportsReadback,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from refitkit.protocols import Engine, OpenedModule, SlotValue


_BOOLEANS = (bool, int, np.bool_, torch.Tensor)
"""Types that engines compare with: Python's, NumPy's and torch's."""


class Staged:
    """The engines of one module that have something staged.

    ``take`` hands each of them out, to be committed; ``discard`` drops those that are left.
    """

    def __init__(self, module: OpenedModule, who: Callable[[], str]) -> None:
        """Start with nothing staged.

        Args:
            module: The module.
            who: Returns the subject of messages about its engines; see ``Context.whose``.
        """
        self._module, self._who = module, who
        self._waiting: list[tuple[str, StagedRefit]] = []
        self._overwritten: set[str] = set()  # engines that cannot go back

    def fill(
        self, name: str, values: Sequence[SlotValue], *, partial: bool, overwrite: bool = False
    ) -> None:
        """Stage values in one engine.

        Args:
            name: Name of the engine.
            values: New values of its slots.
            partial: Whether slots without a value keep theirs.
            overwrite: Whether engines that can do so write over the live values at the commit,
                and cannot go back.

        Raises:
            EngineError: An engine failed; names it.
            PluginError: A strategy's value failed, or the engine staged nothing; names strategy and
                slot, or the plugin.
        """
        with raised_as(EngineError, f"The engine {name!r} failed to stage"):
            try:
                staged = self._stage(name, values, partial=partial, overwrite=overwrite)
            except Exception as exc:
                # this raises if a strategy is at fault; otherwise the engine's error is raised
                _attribute_failure(values, exc)
                raise
        # checked now: something else could be neither committed nor rolled back
        what: StagedRefit = received(staged, StagedRefit, lambda: self._of(name, "stage()"))  # type: ignore[type-abstract]
        self._waiting.append((name, what))

    def adopt(self, name: str, staged: StagedRefit) -> None:
        """Take over values that were staged as they arrived.

        Args:
            name: Name of the engine.
            staged: What it staged.
        """
        self._waiting.append((name, staged))

    def _of(self, engine: str, member: str) -> str:
        return f"{self._who()}: engines[{engine!r}].{member}"

    def _stage(
        self, name: str, values: Sequence[SlotValue], *, partial: bool, overwrite: bool
    ) -> StagedRefit:
        engine = self._module.engines[name]
        if overwrite and isinstance(engine, SupportsOverwrite):
            self._overwritten.add(name)
            return engine.stage_over(values)
        if partial and isinstance(engine, SupportsPartial):
            return engine.stage_partial(values)
        return engine.stage(values)

    @property
    def overwrites(self) -> bool:
        """Whether a commit writes over live values, so that no call may run."""
        return bool(self._overwritten)

    def changed(self) -> bool | None:
        """Whether any engine would change. None if one cannot compare and no other would."""
        answers: list[bool | None] = []
        for name, staged in self._waiting:
            with raised_as(EngineError, f"The engine {name!r} failed to compare"):
                answer: object = staged.changed()
            if answer is not None and not isinstance(answer, _BOOLEANS):
                what = f"{shown(answer)}, not a bool"
                raise PluginError(f"{self._of(name, 'changed()')} gave {what}.")
            answers.append(None if answer is None else bool(answer))
            # one change is enough: comparing the other engines would read all of their weights
            if answers[-1]:
                return True
        return None if None in answers else False

    def waiting(self) -> tuple[tuple[str, StagedRefit], ...]:
        """Names of engines, and the values staged in each."""
        return tuple(self._waiting)

    def memory(self) -> tuple[EngineMemory, ...]:
        """The memory that each engine of the module needs for a rollback."""
        with raised_as(EngineError, "An engine failed to report its memory"):
            return tuple(
                EngineMemory(engine=name, kind="none", bytes=0)
                if name in self._overwritten
                else received(engine.memory, EngineMemory, partial(self._of, name, "memory"))
                for name, engine in self._module.engines.items()
            )

    def take(self) -> Iterator[tuple[str, StagedRefit]]:
        """Hand out one engine after another; ``discard`` leaves alone what was handed out."""
        while self._waiting:
            # removed before it is used: ``discard`` must not drop values that may be live
            yield self._waiting.pop(0)

    def discard(self) -> None:
        """Discard staged values that were not taken. Failures do not matter: no weights changed."""
        interrupt: BaseException | None = None
        for _, staged in self.take():
            try:
                staged.discard()
            except Exception:  # noqa: BLE001, S112 - the others must be tried
                continue
            except BaseException as exc:  # noqa: BLE001 - raised below
                interrupt = exc
        if interrupt is not None:
            raise interrupt


def publishes(module: OpenedModule) -> bool:
    """Whether calls of a module can go on while it gets new weights; see ``OpensStaged``."""
    return isinstance(module, OpensStaged) and module.publishes


def live_reader(engine: Engine) -> Callable[[str], torch.Tensor | None] | None:
    """The function that gives the live value of a slot, as an alias of the engine's memory.

    It returns None for a slot that the engine does not remember. There is no function for an
    engine that can neither be read nor remembers its weights.
    """
    if isinstance(engine, SupportsReadback):
        return engine.read
    return engine.remembered if isinstance(engine, RemembersWeights) else None


def _attribute_failure(values: Iterable[SlotValue], failure: Exception) -> None:
    """Raise PluginError if a value, and not the engine, made staging fail.

    The values are computed again, one after another, until one fails as staging did. Nothing is
    computed if the failure was raised on purpose, or if the system refused a resource: the next
    value would meet the same refusal.

    Raises:
        PluginError: A value fails as staging did, or is not a tensor; names its strategy and slot.
        ResourceError: The system refused a resource.
    """
    if isinstance(failure, RefitError):
        return
    raise_if_resource(failure, "New values cannot be staged")
    for value in values:
        fault = _fault_of(value, failure)
        if fault:
            slot = f"{value.slot.engine}/{value.slot.name}"
            message = f"The strategy {value.strategy!r} {fault} for the slot {slot}."
            hint = "Report it to its authors, or leave it out of Config.strategies."
            raise PluginError(message, hint=hint) from failure


def _fault_of(value: SlotValue, failure: Exception) -> str:
    """The fault of a value, to follow the strategy's name; empty if it has none."""
    try:
        found: object = value.load()
    except Exception as exc:  # noqa: BLE001 - it is compared with the other
        if (type(exc), str(exc)) == (type(failure), str(failure)):
            return f"failed with {type(exc).__name__}: {exc},"
        return ""
    if isinstance(found, torch.Tensor):
        return ""
    return f"gave a {type(found).__name__}, not a tensor,"
