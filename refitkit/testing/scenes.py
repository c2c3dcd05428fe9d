"""An engine in a module, refitted by refitkit's own pipeline, with nobody's plugins in it."""

from __future__ import annotations

from importlib.metadata import entry_points
from math import prod
from typing import TYPE_CHECKING, Any

from refitkit.config import Config
from refitkit.hookspecs import hookimpl
from refitkit.host import GROUP
from refitkit.model import (
    Fingerprint,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    OpCall,
    PlanData,
    Slot,
    SlotState,
    SourceRef,
    VerificationResult,
    fingerprint_of_slots,
)
from refitkit.pipeline.pipeline import Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import index_of
from refitkit.testing.fakes import BACKEND, FakeModule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from refitkit.protocols import Engine, OpenedModule, VerifyRequest


VERDICT = "conformance-verdict"


class SceneModule(FakeModule):
    """A module around any engines. It answers with nothing: no check of an engine calls it."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer with nothing."""


def planned_module(engines: Sequence[Engine]) -> SceneModule:
    """A module around engines, with a plan that takes each slot from the parameter of its name."""
    module = SceneModule(engines)
    module.attachments = {PLAN_MEMBER: plan_for(module).to_bytes()}
    return module


class ScenePlugin:
    """Opens a ``SceneModule``, and judges refits as it was told."""

    name = "conformance-scene"

    def __init__(self) -> None:
        """Content with everything."""
        self.verdict = True

    @hookimpl
    def refitkit_load_module(self, target: object) -> OpenedModule | None:
        """Open what is open."""
        return target if isinstance(target, SceneModule) else None

    @hookimpl
    def refitkit_verifiers(self) -> list[SceneVerifier]:
        """Offer the verdict."""
        return [SceneVerifier(verdict=self.verdict)]


class SceneVerifier:
    """Says what it was told to say."""

    name = VERDICT

    def __init__(self, *, verdict: bool) -> None:
        """Take the verdict."""
        self._verdict = verdict

    def prepare(
        self,
        request: VerifyRequest,  # noqa: ARG002 - the protocol's
    ) -> Callable[[OpenedModule], VerificationResult]:
        """Judge without looking."""
        result = VerificationResult(verifier=VERDICT, ok=self._verdict, note="as told")
        return lambda _: result


class EngineScene:
    """One engine in a module of its own.

    Attributes:
        compiled: The module.
    """

    def __init__(self, engine: Engine) -> None:
        """Put it into a module whose plan takes every slot from the parameter of its name."""
        self._plugin = ScenePlugin()
        self._pipeline = Pipeline(isolated_config(), [self._plugin])
        self.compiled = self._pipeline.load(planned_module([engine]))

    def refit(self, values: Mapping[str, torch.Tensor], *, verdict: bool = True) -> None:
        """Refit it through all stages.

        Args:
            values: A value for every slot.
            verdict: What the verifier says.

        Raises:
            RefitError: As the pipeline raises it.
        """
        self._plugin.verdict = verdict
        self._pipeline.refit(self.compiled, dict(values), verify=VERDICT)


# MERGED plans: Plans for engines that nobody compiled from a program.


def make_slot(
    name: str, shape: tuple[int, ...] = (2,), dtype: str = "float32", engine: str = "model"
) -> Slot:
    """A slot without a tensor."""
    return Slot(engine=engine, name=name, dtype=dtype, shape=shape, count=prod(shape))


def recipe_row(slot: Slot, *sources: str) -> LedgerRow:
    """A row that takes its value from a source's tensor; by default of the slot's own name."""
    names = sources or (slot.name,)
    return LedgerRow(
        slot=slot, state=SlotState.RECIPE, value=SourceRef(fqn=names[0]), sources=names
    )


def leaf_for(slot: Slot, kind: LeafKind = LeafKind.PARAMETER, fqn: str | None = None) -> Leaf:
    """The leaf that a slot comes from."""
    shape = slot.shape if slot.shape is not None else (slot.count,)
    return Leaf(fqn=fqn or slot.name, kind=kind, dtype=slot.dtype, shape=shape)


def make_plan(
    rows: Sequence[LedgerRow],
    *,
    leaves: Sequence[Leaf] | None = None,
    ties: Sequence[tuple[str, ...]] = (),
    calls: Sequence[OpCall] = (),
    guards: Sequence[Guard] = (),
    pinned: Mapping[str, torch.Tensor] | None = None,
    backend: str = BACKEND,
    graph: str = "0" * 64,
) -> RefitPlan:
    """A plan around rows; by default with a parameter for each source that a row names."""
    if leaves is None:
        named = {name: leaf_for(row.slot, fqn=name) for row in rows for name in row.sources}
        leaves = tuple(named.values())
    pinned = dict(pinned or {})
    data = PlanData(
        backend=backend,
        leaves=tuple(leaves),
        ties=tuple(ties),
        ledger=tuple(rows),
        calls=tuple(calls),
        guards=tuple(guards),
        pinned=index_of(pinned),
        fingerprint=Fingerprint(graph=graph, slots=fingerprint_of_slots(row.slot for row in rows)),
    )
    return RefitPlan(data, pinned)


def plan_for(module: OpenedModule, **more: Any) -> RefitPlan:
    """A plan that takes every slot from the parameter of its name."""
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return make_plan([recipe_row(slot) for slot in slots], **more)


# MERGED isolation: Settings with which nothing that happens to be installed takes part.


def isolated_config(**settings: Any) -> Config:
    """Settings that switch all plugins off that are installed beside refitkit.

    Args:
        settings: More settings, as :class:`~refitkit.config.Config` has them.

    Raises:
        ConfigError: A setting does not exist or has a wrong type.
    """
    installed = {entry.name for entry in entry_points(group=GROUP)}
    off = frozenset(settings.pop("no_plugins", ())) | installed
    return Config.of({**settings, "no_plugins": off})
