"""Recipes give the recorded bits whatever the caller has switched on; nobody's tensors change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.unit.recipe.recorder import Tensors, agree, like, record, truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


def leaves() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(6, 6, generator=generator),
        "b": torch.randn(6, generator=generator),
        "i": torch.tensor([2, 0, 1, 0, 5, 4]),
    }


def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    changed = w * b
    changed[1:3].mul_(2)
    table = (i * 2.5)[:, None].expand(6, 6)
    return changed, w @ w.t(), w[i], table, i.view(2, 3), i + 1, torch.linalg.vector_norm(w, dim=1)


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "gradients": torch.enable_grad,
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "another default dtype": default_dtype,
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", AROUND)
def test_the_caller_changes_nothing(name: str) -> None:
    plan, weights = record(function, leaves()), like(leaves())
    wanted = truth(function, weights)
    trained = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in weights.items()}
    with AROUND[name]():
        found = plan.values(trained)
        assert isinstance(found, dict)
    assert agree(found, wanted)
    assert not any(one.requires_grad for one in found.values())


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() > 1 else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "with an offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
}


def in_order(weights: Tensors) -> Tensors:
    """Copies as the allocator lays them out."""
    return {n: one.clone(memory_format=torch.contiguous_format) for n, one in weights.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_sources_of_any_layout(name: str) -> None:
    """Products, too, whose bits depend on how operands lie in memory, and on its address.

    Small products of MKL depend on whether that is a multiple of 16.
    """
    plan, weights = record(function, leaves()), like(leaves())
    laid_out = {fqn: LAYOUTS[name](one) for fqn, one in weights.items()}
    assert agree(plan.values(laid_out), truth(function, in_order(laid_out)))


def wide() -> Tensors:
    """Large enough for BLAS to take other ways for other layouts."""
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(96, 96, generator=generator), torch.randn(96, generator=generator)
    return {"w": w, "b": b, "i": torch.arange(96)}


def products(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands that lay out of order in the recording: views of leaves and of what is computed."""
    double, tall = w * 2, torch.cat([w, w + 1])
    return (
        w.t() @ w,
        double.t() @ tall[::2].t(),
        tall[:96].t() @ b.expand(96, 96),
        w[1].unsqueeze(0) @ w.transpose(0, 1),
        torch.linalg.vector_norm(w.t(), dim=1),
        (w.view(2, 48, 96).permute(2, 0, 1) @ w[:48, :48].t()).sum((0, 2)),
        torch.stack([w, double]).transpose(0, 1).sum(1) @ b,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_of_what_lay_out_of_order(name: str) -> None:
    plan, weights = record(products, wide()), like(wide())
    laid_out = {fqn: LAYOUTS[name](one) for fqn, one in weights.items()}
    assert agree(plan.values(laid_out), truth(products, in_order(laid_out)))


def test_sources_and_kept_tensors_are_not_changed() -> None:
    plan, weights = record(function, leaves()), like(leaves())
    before = {name: one.clone() for name, one in weights.items()}
    versions = {name: one._version for name, one in weights.items()}
    first = plan.values(weights)
    assert isinstance(first, dict)
    assert agree(plan.values(weights), truth(function, weights))
    assert agree(weights, before)
    assert {name: one._version for name, one in weights.items()} == versions


def test_tables_that_change_and_change_back() -> None:
    """What is kept of one refit is not a view of that refit's weights."""
    plan, first = record(function, leaves()), like(leaves(), 1)
    wanted = truth(function, first)
    assert agree(plan.values(first), wanted)
    same = {name: one.clone() for name, one in first.items()}
    other = like(leaves(), 2)
    assert agree(plan.values(other), truth(function, other))
    assert agree(plan.values(first), wanted)
    first["i"].zero_()
    assert agree(plan.values(same), wanted)
    assert agree(plan.values(first), truth(function, first))


def test_two_threads_with_other_weights() -> None:
    plan = record(function, leaves())

    def check(seed: int) -> bool:
        weights = like(leaves(), seed)
        return agree(plan.values(weights), truth(function, weights))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(check, range(40)))


def test_calls_of_one_kind_that_follow_from_one_another() -> None:
    """They are not made as one: between them is an op of another kind."""

    def chain(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            b = b.neg().flip(0).clone()
        return b

    plan = record(chain, leaves())
    assert agree(plan.values(like(leaves())), truth(chain, like(leaves())))


def test_lists_of_one_result() -> None:
    def single(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return b[:1].unbind(0)[0] + w[0]

    plan = record(single, leaves())
    assert agree(plan.values(like(leaves())), truth(single, like(leaves())))


def test_bits_of_zeros_and_nans() -> None:
    weights = like(leaves())
    weights["b"] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 0.0, 1e-45])
    plan = record(lambda w, b, i: (b, b.view(2, 3).t(), b[i]), leaves())
    assert agree(plan.values(weights), truth(lambda w, b, i: (b, b.view(2, 3).t(), b[i]), weights))


@pytest.mark.parametrize("many", [1, 8])
@pytest.mark.parametrize("name", ["exp", "sqrt"])  # sqrt of many is made as one
def test_calls_that_are_exact_elsewhere_draw_others_after_them(name: str, many: int) -> None:
    """The device ``meta`` in the place of a GPU: what follows from its results is made there."""

    def both(**leaves: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {fqn: getattr(torch, name)(leaf) for fqn, leaf in leaves.items()}
        return {fqn: one[:, None] + leaves[fqn] for fqn, one in made.items()}

    weights = {f"w{n}": torch.arange(3.0) + n for n in range(many)}
    plan = record(both, weights).plan
    op = getattr(torch.ops.aten, name).default
    elsewhere = {"is_exact_anywhere": False, "device": "meta"}
    plan._values._calls.prepared = tuple(  # type: ignore[misc] # a cached property
        replace(call, **elsewhere) if call.op is op else call
        for call in plan._values._calls.prepared
    )
    found = plan.materialize(weights)["model"]
    assert {one.device.type for one in found.values()} == {"meta"}
