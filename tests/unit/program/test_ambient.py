"""Verbs run without the modes of their callers, which are back afterwards.

``tests/campaign/ambient.py`` runs all verbs in all modes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from refitkit.errors import InputMismatchError
from refitkit.program import ambient
from refitkit.program.ambient import WatchingMode, plain, require_data, untraced, why_not_real
from refitkit.recipe.sources import TensorMap
from refitkit.testing.oracles import NewMemory
from tests.campaign.ambient import CONTEXTS, facts
from tests.interrupting import Interrupt, Points


@plain
def make() -> torch.Tensor:
    return torch.ones(2)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:.*set_default_tensor_type")
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_tensor_of_a_verb_is_an_ordinary_one(name: str) -> None:
    with CONTEXTS[name]():
        before = facts()
        made = make()
        assert facts() == before
    assert type(made) is torch.Tensor
    assert made.device.type == "cpu"
    assert not made.is_inference()
    assert made.tolist() == [1, 1]


def test_modes_are_back_after_an_error() -> None:
    @plain
    def fail() -> None:
        torch.ones(2)
        raise ValueError

    with CONTEXTS["everything"]():
        before = facts()
        with pytest.raises(ValueError, match=r"^$"):
            fail()
        assert facts() == before


def test_modes_are_back_after_an_interrupt() -> None:
    """Wherever a signal can come in the code that takes them off and puts them back."""

    def around(file: str) -> bool:
        return file == ambient.__file__

    with CONTEXTS["everything"](), Points(None, around) as points:
        make()
    assert points.count > 40
    for place in range(points.count):
        with CONTEXTS["everything"]():
            before = facts()
            with pytest.raises(Interrupt), Points(place, around):
                make()
            assert facts() == before


def test_modes_of_a_verb_are_its_own() -> None:
    @plain
    def fake() -> torch.Tensor:
        with FakeTensorMode():
            return torch.ones(2)

    with torch.device("meta"), FakeTensorMode():
        made = fake()
    assert "fake tensor" in why_not_real(made)
    assert made.device.type == "cpu"


class Counting(TorchDispatchMode):
    """Counts ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **kwargs or {})


class CountingFunctions(TorchFunctionMode):
    """Counts functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **kwargs or {})


def test_only_modes_that_watch_see_the_ops_of_a_verb() -> None:
    with Counting() as ops, CountingFunctions() as functions, NewMemory() as memory:
        assert isinstance(memory, WatchingMode)
        made = make()
        seen = memory.kept()
    assert (ops.seen, functions.seen) == (0, 0)
    assert seen == made.nbytes


def test_torch_compile_traces_no_verb() -> None:
    seen: list[bool] = []

    @plain
    def verb() -> None:
        seen.append(torch.compiler.is_dynamo_compiling())

    @untraced
    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_dynamo_compiling())
        return x + 1

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        verb()
        return call(y) * 3

    assert function(torch.ones(2)).tolist() == [9, 9]
    assert seen == [False, False]
    ops = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert not any("add" in op for op in ops)
    assert len(graphs) == 2


def test_there_is_no_data_under_a_fake_mode() -> None:
    require_data("It")
    with FakeTensorMode(), pytest.raises(InputMismatchError, match="FakeTensorMode"):
        require_data("It")


def test_tensors_of_modes_and_transforms_are_no_weights() -> None:
    with FakeTensorMode():
        fakes = [torch.ones(2), torch.nn.Parameter(torch.ones(2))]
    assert all("FakeTensorMode" in TensorMap({"w": one}).info("w").unusable for one in fakes)
    seen: list[tuple[str, list[str]]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        source = TensorMap({"w": x})
        doubtful = list(source.doubtful(["w"], {"w": (torch.float32, (2,))}))
        seen.append((source.info("w").unusable, doubtful))
        return x.sum()

    torch.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(torch.ones(2))
    assert len(seen) == 2
    assert all("torch.func" in why and doubtful == ["w"] for why, doubtful in seen)


def test_inference_tensors_and_parameters_are_weights() -> None:
    with torch.inference_mode():
        inference = torch.ones(2)
    state = {"a": inference, "b": torch.nn.Parameter(torch.ones(2))}
    assert not any(TensorMap(state).info(name).unusable for name in state)
