"""The report of a refit is made when somebody asks for it, and holds no weights."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.pipeline import Pipeline
from refitkit.pipeline import report as module
from tests.fakes import FakeModule, FakePlugin, OpenEngine, Tripwire, with_plan

if TYPE_CHECKING:
    import pytest

    from refitkit.pipeline.module import CompiledModule

STATE = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.zeros(2)}


def loaded(pipeline: Pipeline) -> CompiledModule:
    return pipeline.load(with_plan(FakeModule([OpenEngine("e", STATE, Tripwire())])))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Outcomes of all reports that are made from now on."""
    made: list[str] = []
    real = module.RefitReport

    def make(**fields: Any) -> Any:
        made.append(fields["outcome"])
        return real(**fields)

    monkeypatch.setattr(module, "RefitReport", make)
    return made


def test_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    pipeline = Pipeline(plugins=[_Silent()])
    compiled = loaded(pipeline)
    result = pipeline.refit(compiled, STATE)
    result.undo()
    assert made == []
    first, second = result.report, result.report
    assert made == ["committed"]
    assert first is second
    assert (first.version, first.slots_written, first.bytes_written) == (1, 2, 16)


def test_a_plugin_that_wants_it_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    plugin = _Listening()
    pipeline = Pipeline(plugins=[plugin])
    pipeline.refit(loaded(pipeline), STATE)
    assert made == ["committed"]
    assert plugin.told == ["committed"]


def test_a_result_holds_no_weights() -> None:
    """Its report tells of them all the same."""
    pipeline = Pipeline({"changes": "sampled"}, plugins=[_Silent()])
    compiled = loaded(pipeline)
    state = {name: value + 1 for name, value in STATE.items()}
    seen = [weakref.ref(value) for value in state.values()]
    result = pipeline.refit(compiled, state, verify="none")
    del state
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    rows = {row.slot: (row.strategy, row.sources) for row in result.report.ledger}
    assert rows == {"weight": ("recipe", ("weight",)), "bias": ("recipe", ("bias",))}
    assert {row.slot for row in result.report.changes} == {"weight", "bias"}


class _Silent(FakePlugin):
    """Listens to nothing."""

    refitkit_weights_changed = None  # type: ignore[assignment]


class _Listening(_Silent):
    """Wants to know."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        self.told.append(report.outcome)
