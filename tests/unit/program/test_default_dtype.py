"""Programs keep the default dtype of their export; the truth is the model itself, under it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from refitkit.program.ambient import keep_default_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Model(torch.nn.Module):
    """Ops whose results have the default dtype, and some whose have not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("i", torch.arange(1, 7))
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        i, mask = self.i, x > 0
        with torch.no_grad():
            inside = torch.zeros(6) + i.sqrt()
        made = (torch.ones(6) * 0.3, torch.full((2,), 0.1), torch.eye(2), torch.arange(0, 1, 0.1))
        promoted = (i / 3, i * 0.1, mask * 0.1, i**0.5, torch.atan2(i, i), i.sigmoid(), i.mul(2.5))
        chosen = (torch.where(mask, 0.0, -torch.inf), torch.where(mask, i, i + 1))
        others = (self.w * 0.1, i.to(torch.complex64) * 0.1, x.new_ones(3), i.sum() / 7, i.double())
        return (inside, *made, *promoted, *chosen, *others)


@pytest.mark.parametrize("exported", DTYPES[:2])
@pytest.mark.parametrize("run", DTYPES)
def test_a_graph_gives_what_its_export_did(exported: torch.dtype, run: torch.dtype) -> None:
    with default(exported):
        model, x = Model(), torch.linspace(-2, 2, 6)
        wanted = model(x)
        program = torch.export.export(model, (x,))
    with default(run):
        module = program.module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        keep_default_dtype(module)
        found = module(x)
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    assert all(map(torch.equal, found, wanted))


def test_a_graph_that_does_not_depend_on_it_is_left_alone() -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    before = str(module.graph)
    keep_default_dtype(module)
    assert str(module.graph) == before
