"""A recording changes nothing, whatever ran under it and however it ended."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
)

from refitkit.errors import CompileError
from tests.unit.recipe import test_host_reads as reads
from tests.unit.recipe import test_tape as taped
from tests.unit.recipe.recorder import Tensors, record
from tests.unit.recipe.unchanged import nothing_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

Function = Any


def everything() -> Iterator[tuple[str, Function]]:
    """All functions that the tests of recordings know, clean and nasty ones."""
    for kind, functions in (
        ("served", taped.SERVED),
        ("unmapped", taped.UNMAPPED),
        ("guarded", reads.HOST_READS),
        ("passed on", reads.PASSED_ON),
        ("literal", reads.LITERALS),
    ):
        yield from ((f"{kind}, {name}", function) for name, function in functions.items())
    for name, write in taped.LEAF_WRITES.items():
        yield f"writes, {name}", lambda w, b, i, write=write: write(w, b)
    for name, assign in reads.WRITES.items():
        yield f"array, {name}", lambda w, b, i, assign=assign: assign(b.numpy())


ALL = dict(everything())
QUIETLY = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def scattered() -> Tensors:
    """The same leaves where memory is not theirs alone."""
    plain = taped.leaves()
    whole = torch.zeros(3 + 24 + 6)
    w, b = whole[3:27].view(6, 4).t(), whole[27:]
    return {"w": w.copy_(plain["w"]), "b": b.copy_(plain["b"]), "i": plain["i"]}


@QUIETLY
@pytest.mark.parametrize("name", ALL)
def test_leaves_and_torch_are_as_before(name: str) -> None:
    for weights in (taped.leaves(), scattered()):
        with nothing_changes(weights), suppress(CompileError, ValueError, TypeError, RuntimeError):
            record(ALL[name], weights)


@QUIETLY
@pytest.mark.parametrize("name", [n for n in ALL if n.partition(",")[0] in {"served", "writes"}])
def test_parameters_stay_parameters(name: str) -> None:
    weights = {
        fqn: torch.nn.Parameter(one, requires_grad=one.is_floating_point())
        for fqn, one in taped.leaves().items()
    }
    weights["b"].grad = torch.ones(6)
    with nothing_changes(weights), suppress(CompileError, RuntimeError):
        record(ALL[name], weights)


class Beside(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A mode of the caller's that does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def deterministic() -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    return stack


def doubles() -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)
    return stack


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "doubles": doubles,
    "another device": lambda: torch.device("cpu"),
    "a mode": Beside,
}


def raises(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad(), Beside():
        raise KeyError(float((w @ b).sum()))


ENDS: dict[str, Function] = {
    "well": taped.read_around,
    "with an error": raises,
    "in a refusal": lambda w, b, i: w.view(-1)[2:].add_(1),
    "in a guard": reads.HOST_READS["numpy max"],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("around", AROUND)
def test_what_the_caller_had_switched_on_is_on_afterwards(around: str, end: str) -> None:
    weights = taped.leaves()
    with (
        AROUND[around](),
        nothing_changes(weights),
        suppress(CompileError, KeyError),
    ):
        record(ENDS[end], weights)


def test_a_change_would_be_found_out() -> None:
    """Of a bit, a flag, a place, a mode."""

    def moved(tensor: torch.Tensor) -> None:
        tensor.data = tensor.data.clone()

    mode = Beside()
    changes: list[Callable[[torch.Tensor], object]] = [
        lambda tensor: tensor.detach().neg_(),
        lambda tensor: tensor.detach().add_(0),
        lambda tensor: tensor.requires_grad_(),
        moved,
        lambda tensor: torch.set_grad_enabled(False),
        lambda tensor: torch.set_default_dtype(torch.float64),
        lambda tensor: mode.__enter__(),
    ]
    for change in changes:
        with ExitStack() as stack:
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
            with pytest.raises(AssertionError), nothing_changes(tensors := {"w": torch.zeros(2)}):
                change(tensors["w"])
            if mode in _get_current_dispatch_mode_stack():
                mode.__exit__(None, None, None)
    assert mode not in _get_current_dispatch_mode_stack()
