"""Scenes for tests: plans without a compiled program, and engines in refitkit's own pipeline.

In reading order: slots, rows and plans made by hand (:func:`make_plan`); a module around any
engines, with the plugin that opens it and the verifier that returns a preset verdict
(:class:`ScenePlugin`, :class:`EngineScene`); and settings that disable installed plugins
(:func:`isolated_config`).
"""

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
from refitkit.protocols import OpenedModule
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.recipe.store import index_of
from refitkit.testing.fakes import BACKEND, FakeModule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from refitkit.model import SlotKey
    from refitkit.protocols import Engine, PlanDraft, SlotValue, VerifyRequest


VERDICT = "conformance-verdict"
"""Name of the verifier that returns a preset verdict."""


# -- slots, rows and plans ------------------------------------------------------------------------


def make_slot(
    name: str, shape: tuple[int, ...] = (2,), dtype: str = "float32", engine: str = "model"
) -> Slot:
    """A slot with a shape and a dtype, and no tensor."""
    return Slot(engine=engine, name=name, dtype=dtype, shape=shape, count=prod(shape))


def recipe_row(slot: Slot, *sources: str) -> LedgerRow:
    """A row whose value is the first of some source tensors.

    Args:
        slot: Slot of the row.
        sources: FQNs of source tensors; by default the slot's own name.
    """
    names = sources or (slot.name,)
    return LedgerRow(
        slot=slot, state=SlotState.RECIPE, value=SourceRef(fqn=names[0]), sources=names
    )


def leaf_for(slot: Slot, kind: LeafKind = LeafKind.PARAMETER, fqn: str | None = None) -> Leaf:
    """A leaf with the dtype and shape of a slot; by default a parameter of the slot's name."""
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
    """A plan with these rows.

    Args:
        rows: Rows of the ledger.
        leaves: Leaves of the program; by default a parameter for each source of each row.
        ties: Groups of FQNs that are one tensor.
        calls: Calls of aten ops that recipes refer to.
        guards: Values that must be the same at a refit.
        pinned: Tensors that the plan stores, by name.
        backend: Name of the backend.
        graph: Fingerprint of the graph, in hex.
    """
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
    """A plan that fills every slot of a module from the parameter with the slot's name.

    Args:
        module: Module whose slots are planned.
        more: Further arguments of ``make_plan``.
    """
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return make_plan([recipe_row(slot) for slot in slots], **more)


def drafted_values(
    draft: PlanDraft, weights: Mapping[str, torch.Tensor]
) -> dict[SlotKey, SlotValue] | str:
    """The value of each drafted row for some weights; or the reason why there are not all.

    Args:
        draft: Rows, calls and pinned tensors of a backend.
        weights: Weights by the names of the program.
    """
    plan = make_plan(
        draft.rows, leaves=(), calls=draft.calls, guards=draft.guards, pinned=draft.pinned
    )
    source = TensorMap(weights)
    values: dict[SlotKey, SlotValue] = {}
    for key, value in plan.values_of(plan.ledger, source).items():
        if isinstance(value, str):
            return f"{'/'.join(key)!r}: {value}"
        values[key] = value
    broken = plan.broken_guards(source)
    return str(broken[0]) if broken else values


# -- engines in a module, and their plugin --------------------------------------------------------


class SceneModule(FakeModule):
    """A module around any engines; calling it returns None.

    The checks of engines read weights with an oracle, so they need no outputs.
    """

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return None."""


def planned_module(engines: Sequence[Engine]) -> SceneModule:
    """A module around engines, with an attached plan that ``plan_for`` makes."""
    module = SceneModule(engines)
    module.attachments = {PLAN_MEMBER: plan_for(module).to_bytes()}
    return module


class ScenePlugin:
    """A plugin that opens ``SceneModule`` objects and offers a verifier with a preset verdict.

    Attributes:
        verdict: Verdict of its verifier; True at first.
    """

    name = "conformance-scene"

    def __init__(self) -> None:
        """Start with the verdict True."""
        self.verdict = True

    @hookimpl
    def refitkit_load_module(self, target: object) -> OpenedModule | None:
        """The target itself if it is a ``SceneModule``, else None."""
        return target if isinstance(target, SceneModule) else None

    @hookimpl
    def refitkit_verifiers(self) -> list[SceneVerifier]:
        """A ``SceneVerifier`` that returns the plugin's verdict."""
        return [SceneVerifier(self)]


class SceneVerifier:
    """A verifier that returns the verdict of its plugin."""

    name = VERDICT

    def __init__(self, plugin: ScenePlugin) -> None:
        """Remember the plugin."""
        self._plugin = plugin

    def prepare(
        self,
        request: VerifyRequest,  # noqa: ARG002 - required by the protocol
    ) -> Callable[[OpenedModule], VerificationResult]:
        """A function that returns the preset verdict for any module."""
        result = VerificationResult(verifier=VERDICT, ok=self._plugin.verdict, note="preset")
        return lambda _: result


class EngineScene:
    """One engine in a module of its own, in a pipeline without installed plugins.

    Attributes:
        compiled: The loaded module.
    """

    def __init__(self, engine: Engine) -> None:
        """Load a module around the engine, with the plan of ``planned_module``."""
        self._plugin = ScenePlugin()
        self._pipeline = Pipeline(isolated_config(), [self._plugin])
        self.compiled = self._pipeline.load(planned_module([engine]))

    def refit(self, values: Mapping[str, torch.Tensor], *, verdict: bool = True) -> None:
        """Refit the engine through all stages of the pipeline.

        Args:
            values: A value for every slot by name, with the dtype and shape of the slot.
            verdict: Verdict of the verifier.

        Raises:
            RefitError: The refit failed, or the verdict is False.
        """
        self._plugin.verdict = verdict
        self._pipeline.refit(self.compiled, dict(values), verify=VERDICT)


def open_with_plugins(path: Path) -> OpenedModule | None:
    """The module that the first able plugin, built in or installed, opens from a file; or None."""
    pipeline = Pipeline()
    arguments = {
        "target": path,
        "config": pipeline.config,
        "tools": pipeline.context.tools("load", "open"),
    }
    _, opened = pipeline.host.first("refitkit_load_module", OpenedModule, **arguments)
    found: OpenedModule | None = opened
    return found


# -- settings -----------------------------------------------------------------------------------


def isolated_config(**settings: Any) -> Config:
    """Settings that disable all plugins found through entry points.

    Results of tests then do not depend on which plugins are installed.

    Args:
        settings: Further settings of :class:`~refitkit.config.Config`.

    Raises:
        ConfigError: A setting does not exist or has a wrong type.
    """
    # Built-ins have no entry points, so they stay enabled.
    installed = {entry.name for entry in entry_points(group=GROUP)}
    disabled = frozenset(settings.pop("no_plugins", ())) | installed
    return Config.of({**settings, "no_plugins": disabled})
