"""Events: each operation has one beginning and one end, an id, and says whose it is."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.model import (
    Aborted,
    Event,
    Failed,
    Finished,
    RefitReport,
    StageFailed,
    StageFinished,
    StageStarted,
    Started,
    Step,
)
from refitkit.pipeline.context import Context
from tests.fakes import FakePlugin, make_module, with_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENDS = (Finished, Failed, Aborted)


class Listener:
    """Keeps all events, and the reports of ``refitkit_weights_changed``."""

    name = "listener"

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.reports: list[RefitReport] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        self.events.append(event)

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: RefitReport) -> None:
        self.reports.append(report)

    def require_whole(self) -> None:
        """Each operation and each stage has one beginning, and one end after it."""
        open_stages: dict[str, list[str]] = {}
        ended = Counter[str]()
        for event in self.events:
            assert event.id
            if isinstance(event, Started):
                assert event.id not in open_stages
                assert not event.parent or event.parent in open_stages
                open_stages[event.id] = []
            elif isinstance(event, ENDS):
                assert open_stages[event.id] == []
                ended[event.id] += 1
            else:
                assert not ended[event.id]
                if isinstance(event, StageStarted):
                    open_stages[event.id].append(event.stage)
                elif isinstance(event, StageFinished | StageFailed):
                    assert open_stages[event.id].pop() == event.stage
        assert ended == Counter(open_stages.keys())

    def of(self, verb: str) -> list[Any]:
        return [event for event in self.events if event.verb == verb]


def world(*more: object) -> tuple[refitkit.Pipeline, Listener, Any]:
    listener = Listener()
    pipeline = refitkit.Pipeline(plugins=[FakePlugin(), listener, *more])
    return pipeline, listener, pipeline.load(make_module(2))


def weights(compiled: Any, fill: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        source: torch.full(row.slot.shape, fill)
        for row in compiled.plan.ledger
        for source in row.sources
    }


def test_a_refit_begins_and_ends_once() -> None:
    pipeline, listener, compiled = world()
    compiled.name = "policy"
    result = pipeline.refit(compiled, weights(compiled))
    listener.require_whole()
    found = listener.of("refit")
    assert len({event.id for event in found}) == 1
    assert {event.module for event in found} == {"policy"}
    assert not any(event.trial or event.parent for event in found)
    assert found[0] == Started("refit")
    assert found[-1].result is result
    assert found[-1].result.report.version == 1
    assert [e.stage for e in found if isinstance(e, StageStarted)] == [
        e.stage for e in found if isinstance(e, StageFinished)
    ]
    assert [report.trial for report in listener.reports] == [False]


def test_operations_have_ids_of_their_own() -> None:
    pipeline, listener, compiled = world()
    for fill in range(3):
        pipeline.refit(compiled, weights(compiled, float(fill)))
    assert len({event.id for event in listener.events if isinstance(event, Started)}) == 4


def test_a_refused_refit_fails_with_the_error_that_is_raised() -> None:
    pipeline, listener, compiled = world()
    with pytest.raises(refitkit.WeightMismatchError) as raised:
        pipeline.refit(compiled, {"no.such.weight": torch.ones(1)})
    listener.require_whole()
    found = listener.of("refit")
    assert found[-1].error is raised.value
    assert [type(event) for event in found[-2:]] == [StageFailed, Failed]


class Interrupting:
    name = "interrupting"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @refitkit.hookimpl
    def refitkit_check(self) -> list[Any]:
        raise self.error


def test_an_interrupted_refit_is_aborted() -> None:
    pipeline, listener, compiled = world(Interrupting(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pipeline.refit(compiled, weights(compiled))
    listener.require_whole()
    assert [type(event) for event in listener.of("refit")[-2:]] == [StageFailed, Aborted]


def test_a_refused_resource_fails_with_the_typed_error() -> None:
    pipeline, listener, compiled = world(Interrupting(MemoryError("no memory")))
    with pytest.raises(refitkit.ResourceError) as raised:
        pipeline.refit(compiled, weights(compiled))
    assert listener.events[-1] == Failed("refit", raised.value)


VERBS: dict[str, Callable[[refitkit.Pipeline, Any, Path], object]] = {
    "restore": lambda pipeline, compiled, _: pipeline.restore(compiled, 0),
    "copy": lambda pipeline, compiled, _: pipeline.copy(compiled),
    "verify": lambda pipeline, compiled, _: pipeline.verify(compiled, weights(compiled, 2.0)),
    "diff": lambda pipeline, compiled, _: pipeline.diff(weights(compiled), weights(compiled, 3.0)),
    "open_weights": lambda pipeline, compiled, _: pipeline.open_weights(weights(compiled)),
    "save": lambda pipeline, compiled, folder: pipeline.save(compiled, folder / "m.fake"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_begins_and_ends_once(verb: str, tmp_path: Path) -> None:
    pipeline, listener, compiled = world()
    pipeline.refit(compiled, weights(compiled))
    del listener.events[:]
    try:
        result, error = VERBS[verb](pipeline, compiled, tmp_path), None
    except refitkit.RefitError as exc:
        result, error = None, exc
    listener.require_whole()
    assert listener.events[0] == Started(verb)
    end = listener.events[-1]
    assert end.verb == verb
    assert end.result is result if error is None else end.error is error


def test_an_operation_names_the_one_that_runs_it() -> None:
    pipeline, listener, _ = world()
    target = with_plan(make_module(2))
    del listener.events[:]
    with pytest.raises(refitkit.RefitError):
        pipeline.refit(target, {"no.such.weight": torch.ones(1)})
    listener.require_whole()
    outer, inner = (event for event in listener.events if isinstance(event, Started))
    assert (outer.verb, inner.verb) == ("refit", "load")
    assert inner.parent == outer.id
    assert not outer.parent


def test_what_a_plugin_keeps_keeps_no_result_alive() -> None:
    listener = Listener()
    context = Context.of(None, [listener])

    class Result:
        pass

    with context.operating("compile") as operation:
        tools = context.tools("compile", "compile")
        operation.result = Result()
        kept = weakref.ref(operation.result)
    del operation
    listener.require_whole()
    listener.events.clear()
    assert kept() is None
    tools.progress("late")
    assert listener.events == []
    with context.operating("copy"):
        tools.progress("in another operation")
    assert [type(event) for event in listener.events] == [Started, Step, Finished]
    listener.require_whole()


def test_each_listener_gets_the_end() -> None:
    for plugins in ([Listener(), EndingListener()], [EndingListener(), Listener()]):
        pipeline = refitkit.Pipeline(plugins=[FakePlugin(), *plugins])
        compiled = pipeline.load(make_module(2))
        with pytest.raises(KeyboardInterrupt):
            pipeline.refit(target=compiled, weights=weights(compiled))
        (listener,) = (one for one in plugins if isinstance(one, Listener))
        listener.require_whole()
        assert listener.of("refit")[0].module == "fake"


class EndingListener:
    name = "ending"

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        if isinstance(event, Finished) and event.verb == "refit":
            raise KeyboardInterrupt


def test_an_interrupt_at_the_end_leaves_no_operation_open() -> None:
    pipeline, listener, compiled = world(EndingListener())
    with pytest.raises(KeyboardInterrupt) as raised:
        pipeline.refit(compiled, weights(compiled))
    assert raised.value.__notes__ == ["The refit was complete when it was interrupted."]
    assert compiled.version == 1
    del listener.events[:]
    pipeline.open_weights(weights(compiled))
    assert not listener.events[0].parent


def test_trials_are_marked() -> None:
    listener = Listener()
    context = Context.of(None, [listener])
    with (
        context.operating("compile"),
        context.operating("refit", "m", trial=True),
        context.clock("refit").stage("load"),
        context.operating("load"),
    ):
        context.tools("load", "open").progress("half")
    listener.require_whole()
    assert {(event.verb, event.trial) for event in listener.events} == {
        ("compile", False),
        ("refit", True),
        ("load", True),
    }
    assert any(isinstance(event, Step) and event.trial for event in listener.events)


def test_a_module_is_named_after_its_file(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    program = torch.export.export(model, (torch.ones(3, 2),))
    listener = Listener()
    pipeline = refitkit.Pipeline(plugins=[listener])
    compiled = pipeline.compile(program)
    listener.require_whole()
    assert compiled.name == "aotinductor"
    trials = [event for event in listener.events if event.trial]
    assert {event.verb for event in trials} == {"refit", "verify"}
    assert {event.verb for event in listener.events if not event.trial} == {"compile"}
    assert all(report.trial for report in listener.reports)
    assert listener.reports
    pipeline.save(compiled, tmp_path / "m.refitkit")
    loaded = pipeline.load(tmp_path / "m.refitkit")
    assert loaded.name == pipeline.copy(loaded).name == "m.refitkit"
    assert {event.module for event in listener.of("load")} == {"m.refitkit", ""}
    listener.require_whole()
