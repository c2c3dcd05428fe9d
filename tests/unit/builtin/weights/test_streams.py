"""Weights that come one after another: all of them or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from tests.fakes import FakePlugin, make_module, same_state, weights_for

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_a_stream_is_a_source_once_it_has_ended() -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3, 3).t()}
    source = Pipeline().open_weights(iter(tensors.items()))
    assert list(source.names()) == ["a", "b"]
    assert source.description == "a stream of 2 tensors"
    assert source.get("b").equal(tensors["b"])


def test_the_sender_may_use_its_buffer_again() -> None:
    def send() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(2)
        for number in range(3):
            yield f"w{number}", buffer.fill_(number)

    source = Pipeline().open_weights(send())
    assert [source.get(f"w{number}").tolist() for number in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_modes_of_the_sender_do_not_reach_what_is_kept() -> None:
    def send() -> Iterator[tuple[str, torch.Tensor]]:
        with torch.inference_mode():
            yield "a", torch.ones(2)
        with torch.device("meta"), FakeTensorMode():
            yield "b", real

    real = torch.zeros(2)
    source = Pipeline().open_weights(send())
    kept = [source.get(name) for name in ("a", "b")]
    assert [type(one) for one in kept] == [torch.Tensor] * 2
    assert not any(one.is_inference() for one in kept)
    assert [one.tolist() for one in kept] == [[1, 1], [0, 0]]


def test_tensors_without_data_are_named() -> None:
    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(SourceError, match=r"(?s)b: unusable.*FakeTensorMode"):
        Pipeline().open_weights(iter([("a", torch.ones(2)), ("b", fake)]))


def test_a_refit_from_a_stream() -> None:
    module = make_module(2)
    pipeline = Pipeline(plugins=[FakePlugin()])
    weights = weights_for(module, 3.0)
    report = pipeline.refit(module, iter(weights.items())).report
    assert report.source == "a stream of 4 tensors"
    held = module.by_slot()
    assert same_state(held, weights)


def test_a_stream_that_breaks_off_changes_nothing() -> None:
    module = make_module(1)
    before = {name: value.clone() for name, value in module.holds().items()}

    def send() -> Iterator[tuple[str, torch.Tensor]]:
        yield "e0.weight", torch.ones(2, 3)
        raise ConnectionResetError("the trainer is gone")

    with pytest.raises(SourceError, match="broke off: ConnectionResetError: the trainer is gone"):
        Pipeline(plugins=[FakePlugin()]).refit(module, send())
    assert same_state(module.holds(), before)


def test_everything_that_is_no_weight_is_told_at_once() -> None:
    pairs: list[Any] = [("a", torch.ones(1)), ("a", torch.ones(1)), ("b", 3), 7, (1, torch.ones(1))]
    with pytest.raises(SourceError) as info:
        Pipeline().open_weights(iter(pairs))
    found = [(problem.subject, problem.kind) for problem in info.value.problems]
    assert found == [
        ("a", "given twice"),
        ("b", "not a tensor"),
        ("item 3", "not a pair"),
        ("item 4", "not a pair"),
    ]
