"""Who is blamed where an engine cannot stage what it was given."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import EngineError, PluginError, ResourceError, SourceError
from refitkit.hookspecs import hookimpl
from refitkit.protocols import Mapped, SlotValue
from tests.fakes import Loaded, make_module, same_state, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.protocols import MapRequest


class Spoiling:
    """Serves like ``recipe``, but for one slot."""

    name = "spoiling"
    priority = 1

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def map(self, request: MapRequest) -> Mapped:
        plan: Any = request.plan
        found = {row.slot.key: plan.value_of(row, request.source) for row in request.wanted}
        last = list(found)[-1]
        found[last] = SlotValue(found[last].slot, self.name, ("x",), self._load)
        return Mapped(found)


class Plugin:
    name = "spoiling-plugin"

    def __init__(self, load: Callable[[], Any]) -> None:
        self._strategy = Spoiling(load)

    @hookimpl
    def refitkit_mapping_strategies(self) -> list[Spoiling]:
        return [self._strategy]


def _fails(error: Exception) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


def _refit(load: Callable[[], Any]) -> Loaded:
    scene = Loaded(make_module(1), Plugin(load))
    held = scene.module.holds()
    try:
        scene.pipeline.refit(scene.compiled, weights_for(scene.module, 10.0))
    finally:
        assert same_state(scene.module.holds(), held)
    return scene


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (_fails(KeyError("nope")), r"failed for the slot \S+/{}: KeyError: 'nope'"),
        (lambda: [1.0], r"for the slot \S+/{} gave a list, not a Tensor\."),
        (lambda: None, r"for the slot \S+/{} gave None, not a Tensor\."),
    ],
    ids=["raises", "list", "none"],
)
def test_a_value_that_fails_is_its_strategys_fault(load: Callable[[], Any], said: str) -> None:
    slot = list(list(make_module(1).engines.values())[-1].slots)[-1]
    who = (
        r"The strategy 'spoiling' of the plugin 'spoiling-plugin' \(refitkit_mapping_strategies\) "
    )
    with pytest.raises(PluginError, match=who + said.format(re.escape(slot))):
        _refit(load)


def test_what_was_meant_stays_what_it_is() -> None:
    with pytest.raises(SourceError, match="gone"):
        _refit(_fails(SourceError("gone")))


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")])
def test_a_machine_without_memory_is_nobodys_fault(error: Exception) -> None:
    with pytest.raises(ResourceError, match=r"cannot be staged: Cannot allocate memory: full"):
        _refit(_fails(error))


def test_an_engine_that_fails_by_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Loaded(make_module(1))
    (engine,) = scene.module.engines.values()

    def broken(*_: Any) -> Any:
        raise ValueError("broken")

    for method in ("stage", "_stage"):
        monkeypatch.setattr(engine, method, broken)
    with pytest.raises(EngineError, match=r"failed to stage: ValueError: broken"):
        scene.pipeline.refit(scene.compiled, weights_for(scene.module, 10.0))
