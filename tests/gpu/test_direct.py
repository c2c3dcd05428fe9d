"""Refits past the refitter, on real engines: equal to TensorRT's own, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt.direct import route
from tests.gpu import trt_models
from tests.gpu.trt_helpers import compiled_by_us, export, needs_trt, options_for, same
from tests.gpu.trt_models import inputs_of, randomized

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_trt
KINDS: list[Callable[[], torch.nn.Module]] = [trt_models.Convolutions, trt_models.Words]
DIRECT = refitkit.Pipeline()
BY_TENSORRT = refitkit.Pipeline({"direct": False})


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest) -> Any:
    """A kind of model, and two modules of one program: written directly, and by TensorRT."""
    kind = request.param
    program = export(randomized(kind, 0), inputs_of(kind))
    return kind, *(
        one.compile(program, "torch_tensorrt", options_for("python"), prove=False)
        for one in (DIRECT, BY_TENSORRT)
    )


def test_answers_are_those_of_the_refitter(pair: Any) -> None:
    kind, direct, other = pair
    x = inputs_of(kind)
    for seed in (1, 2, 0, 1):
        state = randomized(kind, seed).state_dict()
        DIRECT.refit(direct, state)
        BY_TENSORRT.refit(other, state)
        assert same(direct(*x), other(*x))


def test_undo_and_copies_answer_as_before(pair: Any) -> None:
    kind, direct, _ = pair
    x = inputs_of(kind)
    DIRECT.refit(direct, randomized(kind, 1).state_dict())
    before = direct(*x)
    result = DIRECT.refit(direct, randomized(kind, 2).state_dict())
    after = direct(*x)
    assert not same(before, after)
    copy = DIRECT.refit(direct, randomized(kind, 3).state_dict(), copy=True).module
    assert same(direct(*x), after)
    assert not same(copy(*x), after)
    result.undo()
    assert same(direct(*x), before)


def test_a_copy_needs_no_proof(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, direct, other = pair
    x = inputs_of(kind)
    DIRECT.refit(direct, randomized(kind, 1).state_dict())
    monkeypatch.setattr(route, "learn", None)
    state = randomized(kind, 2).state_dict()
    result = DIRECT.refit(direct, state, copy=True)
    assert {(one.name, one.why) for one in result.report.routes} == {("direct", "")}
    BY_TENSORRT.refit(other, state)
    assert same(result.module(*x), other(*x))


def test_a_layout_is_found_for_a_transformer() -> None:
    compiled = compiled_by_us(trt_models.Words)
    routes = DIRECT.refit(compiled, randomized(trt_models.Words, 1).state_dict()).report.routes
    assert {(route.name, route.why) for route in routes if route.name != "torch"} == {
        ("direct", "")
    }


def test_streams_and_calls_beside_refits_are_never_torn() -> None:
    """Each answer is one of two, on two streams, while weights go to and fro."""
    kind = trt_models.Words
    compiled = compiled_by_us(kind)
    x = inputs_of(kind)
    states = [randomized(kind, seed).state_dict() for seed in (1, 2)]
    wanted = []
    for state in states:
        DIRECT.refit(compiled, state)
        wanted.append(compiled(*x).clone())
    streams: list[Any] = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    for number in range(100):
        answers = []
        for stream in streams:
            with torch.cuda.stream(stream):
                answers += [compiled(*x) for _ in range(5)]
        DIRECT.refit(compiled, states[number % 2])
        with torch.cuda.stream(streams[0]):
            answers.append(compiled(*x))
        torch.cuda.synchronize()
        assert all(any(same(one, other) for other in wanted) for one in answers)
        assert same(answers[-1], wanted[number % 2])
