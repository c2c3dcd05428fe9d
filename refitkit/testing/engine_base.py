"""What the author of an engine writes, and what all checks of engines do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.protocols import SlotValue, SupportsPartial
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from refitkit.protocols import Engine, StagedRefit

A, B, C = 1, 2, 3
"""Seeds of three sets of weights."""


class EngineBase:
    """Factory, oracle, and ways to make the engine fail; only the first two have to be written."""

    def make_engine(self) -> Engine:
        """A new engine that nobody has refitted yet, with the same slots each time."""
        raise NotImplementedError("Write make_engine: it returns a new engine.")

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        """What the engine serves from now, by slot, found *without the engine's own code*.

        Look where the weights really are: ask the runtime, look into the memory, run it on an
        input that shows them. Dtypes and the order of elements count, shapes do not.
        """
        raise NotImplementedError("Write held: what the engine holds, without asking the engine.")

    def make_values(self, engine: Any, seed: int) -> dict[str, torch.Tensor]:
        """A new value for every slot, another one for each seed; any that fit by default."""
        return oracles.random_values(engine.slots.values(), seed)

    def commit_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """Have the next commit of the engine fail, if possible half-way; None: no way to do it."""
        return None

    def rollback_fault(self, engine: Any) -> AbstractContextManager[object] | None:  # noqa: ARG002
        """Have the next rollback of the engine fail; None: no way to do it."""
        return None

    # -- what checks do ---------------------------------------------------------------------

    def ready(self) -> Any:
        """A new engine that holds the weights of seed A."""
        engine = self.make_engine()
        self.commit(engine, self.make_values(engine, A))
        return engine

    def snapshot(self, engine: Any) -> dict[str, oracles.Bits]:
        """The bits that the oracle finds.

        Raises:
            SuiteError: It does not tell of all slots.
        """
        found = oracles.snapshot(self.held(engine))
        lacking = sorted(engine.slots.keys() - found.keys())
        if lacking:
            raise SuiteError(f"held() tells nothing of the slots {oracles.shown(lacking)}.")
        return {name: found[name] for name in engine.slots}

    def stage(self, engine: Any, values: Mapping[str, torch.Tensor]) -> StagedRefit:
        """Stage values for all slots."""
        staged: StagedRefit = engine.stage(oracles.slot_values(engine.slots, values))
        return staged

    def commit(self, engine: Any, values: Mapping[str, torch.Tensor]) -> StagedRefit:
        """Stage values for all slots and make them live."""
        staged = self.stage(engine, values)
        staged.commit()
        return staged

    def partly(self, engine: Any, values: Sequence[SlotValue]) -> StagedRefit:
        """Stage some slots, in an engine that can."""
        if not isinstance(engine, SupportsPartial):
            raise SuiteError("The engine is not refitted in part.")
        return engine.stage_partial(values)

    def require_held(
        self,
        engine: Any,
        wanted: Mapping[str, oracles.Bits],
        contract: str,
        when: str,
        advice: str,
    ) -> None:
        """Compare what the engine holds with what it should.

        Raises:
            Breach: Slots differ; names them.
        """
        wrong = oracles.differing(self.snapshot(engine), wanted)
        if wrong:
            slots = f"{len(wanted)} slots" if len(wanted) > 1 else "1 slot"
            found = f"{when}, {len(wrong)} of {slots} are wrong: {oracles.shown(wrong)}."
            raise Breach(contract, found, advice)
