"""Whose values a program does not depend on, although it uses the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.program.unread import unread

if TYPE_CHECKING:
    from collections.abc import Callable

Function = Any


class Model(torch.nn.Module):
    """A function of an input and one parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight)


def found(function: Function) -> dict[str, str]:
    return unread(torch.export.export(Model(function).eval(), (torch.ones(2, 3),)))


SHAPE = "the program reads its shape and dtype only"
DEAD = "nothing that the program returns depends on its values"
UNREAD: dict[str, tuple[Function, str]] = {
    "ones_like": (lambda x, w: x * torch.ones_like(w), SHAPE),
    "full_like": (lambda x, w: x * torch.full_like(w, 3.0), SHAPE),
    "new_zeros": (lambda x, w: x + w.new_zeros(3), SHAPE),
    "type_as": (lambda x, w: x.type_as(w), SHAPE),
    "zeros_like of what is computed": (lambda x, w: x + torch.zeros_like(w * 2), DEAD),
    "expand_as of what is computed": (lambda x, w: x[:, :1].expand_as(w.expand(2, 3)), DEAD),
    "a result that nobody takes": (lambda x, w: (w * 2, x)[1], DEAD),
}


@pytest.mark.parametrize("name", UNREAD)
def test_values_that_do_not_matter_are_named_with_the_reason(name: str) -> None:
    function, reason = UNREAD[name]
    assert found(function) == {"weight": reason}


READ: dict[str, Function] = {
    "a product": lambda x, w: x * w,
    "shape and values": lambda x, w: x * torch.ones_like(w) + w,
    "type_as of it": lambda x, w: w.type_as(x),
    "the result of a write": lambda x, w: torch.zeros(3).copy_(w) + x,
    "a branch": lambda x, w: torch.cond(w.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,)),
    "an output as it is": lambda x, w: (x, w.view(1, 3)),
}


@pytest.mark.parametrize("name", READ)
def test_values_that_are_read_are_not_named(name: str) -> None:
    assert found(READ[name]) == {}
