"""A module that asks for tensors when it needs them; see ``test_keep`` for whole programs."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from refitkit.program.keep import OnDemandModule

WRAP = torch.ops.higher_order.wrap_with_set_grad_enabled


def twice(names: tuple[str, str]) -> torch.fx.GraphModule:
    """A region that multiplies is run on ``x`` and one tensor, and on that and another one."""
    body = torch.fx.Graph()
    a, b = body.placeholder("a"), body.placeholder("b")
    body.output((body.call_function(torch.mul, (a, b)),))
    root = nn.Module()
    root.body = torch.fx.GraphModule(nn.Module(), body)
    root.one, root.two = (nn.Parameter(torch.empty(2, device="meta")) for _ in range(2))
    graph = torch.fx.Graph()
    tensors = {name: graph.get_attr(name) for name in ("one", "two")}
    value = graph.placeholder("x")
    for name in names:
        call = graph.call_function(WRAP, (False, graph.get_attr("body"), value, tensors[name]))
        value = graph.call_function(operator.getitem, (call, 0))
    graph.output(value)
    return torch.fx.GraphModule(root, graph)


@pytest.mark.parametrize("names", [("one", "two"), ("two", "two")])
def test_a_region_that_is_run_twice(names: tuple[str, str]) -> None:
    """On other tensors each time, so it cannot ask for them itself."""
    tensors = {"one": torch.tensor([2.0, 3.0]), "two": torch.tensor([5.0, 7.0])}
    asked: list[str] = []

    def give(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    found = OnDemandModule(twice(names), ["one", "two"]).run(give, (torch.ones(2),), {})
    assert torch.equal(found, tensors[names[0]] * tensors[names[1]])
    assert asked == list(dict.fromkeys(names))


def test_what_is_not_named_stays_the_modules() -> None:
    module = twice(("one", "two"))
    module.one = nn.Parameter(torch.tensor([2.0, 3.0]))
    found = OnDemandModule(module, ["two"]).run(lambda _: torch.ones(2), (torch.ones(2),), {})
    assert found.tolist() == [2, 3]
