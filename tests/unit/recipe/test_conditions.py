"""Ops whose bits depend on memory, layout, threads or settings: the same bits in spite of those."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from refitkit.program.bits import same_bits
from refitkit.recipe import ops
from refitkit.recipe import ops as conditions
from refitkit.recipe.calls import BATCHED, Calls
from refitkit.recipe.ops import ALIGNMENT, aligned, is_aligned, moved, same_settings
from tests.unit.recipe.recorder import Tensors, agree, like, record, truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, COLUMNS = 130, 257
SHAPES = ((ROWS, COLUMNS), (17, 31), (8, 27), (300, 300))
_get, _put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


def leaves(dtype: torch.dtype = torch.float32, rows: int = ROWS, columns: int = COLUMNS) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (rows, columns), "b": (columns,), "s": (rows, rows)}
    return {fqn: torch.randn(shape, generator=generator).to(dtype) for fqn, shape in shapes.items()}


def lying(tensor: torch.Tensor, offset: int, *, transposed: bool = False) -> torch.Tensor:
    """A copy this many bytes behind a multiple of the alignment, perhaps with turned strides."""
    if transposed and tensor.dim() > 1:
        tensor = tensor.mT.contiguous().mT
    return moved(tensor, offset)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mv": lambda w, b, s: w @ b,
    "vdot": lambda w, b, s: torch.vdot(b[1:], b[1:]),
    "dot of rows": lambda w, b, s: torch.dot(w[0], w[1]),
    "product of a row": lambda w, b, s: w[1].unsqueeze(0) @ w.t(),
    "mm": lambda w, b, s: s @ w,
    "gram": lambda w, b, s: w.t() @ w,
    "addmm": lambda w, b, s: torch.addmm(b, s, w),
    "einsum": lambda w, b, s: torch.einsum("ij,kj->ik", w, w * b),
    "convolution": lambda w, b, s: functional.conv1d(w[None], s[:, :, None]),
    "product of a turned result": lambda w, b, s: (w.t() * 2) @ w,
    "product of slices": lambda w, b, s: s[:, 1:] @ w[1:],
    "product of small sums": lambda w, b, s: torch.stack(
        [torch.dot(b * n + b, b) for n in range(6)]
    ),
    "sum": lambda w, b, s: w.sum(),
    "mean": lambda w, b, s: w.mean(),
    "weight norm": lambda w, b, s: torch._weight_norm(w, w.norm(dim=0, keepdim=True), 1),
    "softmax": lambda w, b, s: w.softmax(0),
    "sigmoid": lambda w, b, s: w.sigmoid(),
    "gelu of turned": lambda w, b, s: functional.gelu(w.t()),
    "silu": lambda w, b, s: functional.silu(w),
    "softplus of a slice": lambda w, b, s: functional.softplus(w[1:]),
    "inverse": lambda w, b, s: torch.linalg.inv(s),
    "qr": lambda w, b, s: s @ torch.linalg.qr(s).Q.t(),
    "svd": lambda w, b, s: torch.linalg.svd(s).U @ s,
    "matrix exponential": lambda w, b, s: torch.matrix_exp(s - s.t()),
    "cholesky": lambda w, b, s: torch.linalg.cholesky(s @ s.t() + len(s) * torch.eye(len(s))),
    "solve": lambda w, b, s: torch.linalg.solve(s, w),
    "householder": lambda w, b, s: torch.linalg.householder_product(
        s.tril(-1), s.diagonal().sigmoid()
    ),
}


def differing(function: Callable[..., torch.Tensor], old: Tensors) -> list[object]:
    """Places in memory and numbers of threads for which a refit gives other bits.

    Others than those of one thread on tensors that the allocator has placed.
    """
    new, found = like(old), list[object]()
    with threads(1):
        wanted = truth(function, {fqn: one.clone() for fqn, one in new.items()})
    size = old["w"].element_size()
    for case in ((size, 4, 2, False), (24, 2, 4, True), (0, 1, 4, False)):
        offset, recorded, later, transposed = case
        with threads(recorded):
            plan = record(function, {n: lying(one, offset) for n, one in old.items()})
        source = {n: lying(one, 56 - offset, transposed=transposed) for n, one in new.items()}
        with threads(later):
            if plan.state != "recipe" or not agree(plan.values(source), wanted):
                found.append((tuple(old["w"].shape), case, plan.rows["y"].reason))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bits_are_those_of_one_thread_on_memory_of_the_allocator(name: str) -> None:
    assert [
        d for shape in SHAPES for d in differing(FUNCTIONS[name], leaves(torch.float32, *shape))
    ] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    names = ["mv", "gram", "sum", "softmax", "sigmoid", "gelu of turned", "addmm"]
    old = leaves(dtype)
    assert {name: differing(FUNCTIONS[name], old) for name in names} == {name: [] for name in names}


def test_parts_that_are_written_to() -> None:
    """They are copies in recipes, one element after another, and so they are in a recording."""

    def function(w: torch.Tensor) -> torch.Tensor:
        new = w * 1
        new[1:, 3:].sigmoid_()
        new[0].view(-1)[1:].softmax(0).cumsum_(0)
        return new

    old, new = leaves()["w"], like(leaves())["w"]
    plan, wanted = record(function, {"w": lying(old, 4)}), record(function, {"w": new}).outputs
    assert plan.state == "recipe"
    assert agree(plan.values({"w": lying(new, 24, transposed=True)}), wanted)
    assert torch.allclose(wanted["y"].double(), function(new.double()))


def test_leaves_with_turned_strides() -> None:
    """The recording's order of dimensions counts, not that of whatever refits."""

    def function(w: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return w.sum(), w.sum(1), (w * 2) @ b, functional.silu(w[1:]), w.norm()

    turned = {n: one.mT.contiguous().mT if one.dim() > 1 else one for n, one in leaves().items()}
    plan, new = record(function, turned), like(leaves())
    assert set(plan.states.values()) == {"recipe"}
    with threads(1):
        wanted = truth(function, {n: lying(one, 0, transposed=True) for n, one in new.items()})
    assert agree(plan.values(new), wanted)


def test_leaves_with_gaps_and_literals_of_any_layout() -> None:
    """Nothing of them can be made again: both sides have them one element after another."""
    table = torch.arange(ROWS * COLUMNS * 2.0).sin().view(COLUMNS, ROWS, 2).tolist()

    def function(w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = torch.tensor(table, dtype=w.dtype)
        turned = made[..., 0].t()
        return (w * turned).sum(), w @ b, w.t() @ turned.exp().sum(1), functional.silu(w)

    old, new = leaves(), like(leaves())
    gaps = {fqn: torch.stack([old[fqn]] * 2, -1)[..., 1] for fqn in ("w", "b")}
    plan = record(function, gaps)
    assert set(plan.states.values()) == {"recipe"}
    found = [plan.values({fqn: lying(new[fqn], at) for fqn in gaps}) for at in (0, 4)]
    assert isinstance(found[0], dict)
    assert agree(found[1], found[0])
    exact = truth(function, {fqn: new[fqn].double() for fqn in gaps})
    assert all(torch.allclose(found[0][n].double(), exact[n], rtol=1e-4, atol=1e-3) for n in exact)


# -- settings ---------------------------------------------------------------------------------


@contextmanager
def precision(backend: str, op: str, value: str) -> Iterator[None]:
    _put(backend, op, value)
    try:
        yield
    finally:
        _put(backend, op, "none")


@contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def without_onednn() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


SETTINGS = {
    "float32 products in bfloat16": lambda: precision("mkldnn", "matmul", "bf16"),
    "oneDNN in bfloat16": lambda: precision("mkldnn", "all", "bf16"),
    "no oneDNN": without_onednn,
    "no denormals": flushing,
    "threads": lambda: threads(3),
}


def set_up() -> dict[str, object]:
    keys = [("generic", "all"), *((b, o) for b in ("mkldnn", "cuda") for o in ("all", "matmul"))]
    return {
        "precisions": [_get(*key) for key in keys],
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "denormals": bool(torch.tensor(1e-41) * 1),
        "threads": torch.get_num_threads(),
    }


def wide(w: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return w @ w, h @ h, w * 1e-38, w.sum()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_of_the_caller_change_nothing_and_are_not_changed(name: str) -> None:
    old = {"w": torch.randn(300, 300), "h": torch.randn(300, 300).bfloat16()}
    new = like(old)
    with threads(1):
        wanted = truth(wide, new)
    with SETTINGS[name]():
        before = set_up()
        plan = record(wide, old)
        found = plan.values(new)
        assert set_up() == before
    assert agree(found, wanted)


@pytest.mark.parametrize("outer", ["none", "ieee", "bf16", "tf32"])
@pytest.mark.parametrize("inner", ["none", "ieee", "bf16"])
def test_precisions_go_on_inheriting(outer: str, inner: str) -> None:
    with precision("generic", "all", outer), precision("mkldnn", "matmul", inner):
        before = set_up()
        with same_settings():
            assert _get("mkldnn", "matmul") in {"none", "ieee"}
        assert set_up() == before
        _put("generic", "all", "none")
        assert _get("mkldnn", "matmul") == inner


def test_settings_come_back_after_a_fault() -> None:
    with threads(3), without_onednn():
        before = set_up()
        with pytest.raises(ZeroDivisionError), same_settings(), same_settings():
            _ = 1 // 0
        assert set_up() == before


def test_threads_that_start_meanwhile_have_their_own_number() -> None:
    seen: list[int] = []
    with threads(3):
        with same_settings():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert [*seen, torch.get_num_threads()] == [3, 3]


def test_where_torch_has_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_thread_setters", lambda: (None, None))
    with threads(3):
        with same_settings():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, 60, 64, 100])
def test_moved_tensors_are_the_same_elsewhere(offset: int) -> None:
    w = torch.randn(6, 5, 4)
    for one in (w, w.mT, w[:, 1:, ::2], w[2], w[0, 0, 0], w[:1].expand(3, 5, 4)):
        new = moved(one, offset)
        assert is_aligned(new, offset)
        assert new.stride() == one.stride()
        assert same_bits(new.contiguous(), one.contiguous())
        assert new.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()


def test_aligned_tensors_are_themselves() -> None:
    w = torch.randn(8, 8)
    assert aligned(w) is w
    for one in (w[:, 1:], w.t(), w.view(-1)[1:]):
        new = aligned(one)
        assert new.is_contiguous()
        assert new.data_ptr() % ALIGNMENT == 0
        assert same_bits(new, one.contiguous())


# -- which ops, and batches -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtypes", "alpha", "found"),
    [
        ("aten.add.Tensor", ["float32", "float32"], 1, False),
        ("aten.add.Tensor", ["bfloat16", "bfloat16"], 0.3, True),
        ("aten.mul.Tensor", ["float16", "float16"], 1, False),
        ("aten.mul.Tensor", ["complex64", "complex64"], 1, True),
        ("aten.sum.default", ["float32"], 1, True),
        ("aten.sum.default", ["int64"], 1, False),
        ("aten.exp_.default", ["float32"], 1, True),
        ("aten.permute.default", ["complex64"], 1, False),
        ("aten._to_copy.default", ["float32"], 1, False),
        ("aten.__and__.Tensor", ["bool", "bool"], 1, False),
        ("aten.gt.Scalar", ["float32"], 1, False),
        ("aten.add.Tensor", ["int64", "int64"], 2, False),
        ("aten.mm.default", ["bfloat16", "bfloat16"], 1, True),
    ],
)
def test_which_ops_are_sensitive(op: str, dtypes: list[str], alpha: float, found: bool) -> None:
    assert ops.is_sensitive(op, dtypes, alpha) is found


@pytest.mark.parametrize(
    ("dtype", "name", "options"),
    [
        ("bfloat16", "add.Tensor", {"alpha": 0.3}),
        ("float16", "sub.Tensor", {"alpha": 0.3}),
        ("complex64", "mul.Tensor", {}),
        ("complex64", "div.Tensor", {}),
    ],
)
def test_no_batch_of_what_depends_on_its_place(
    dtype: str, name: str, options: dict[str, float]
) -> None:
    assert f"aten.{name}" in BATCHED
    kind, op = getattr(torch, dtype), getattr(torch, name.partition(".")[0])
    made = torch.float32 if kind.is_floating_point else kind

    def function(**leaves: torch.Tensor) -> Tensors:
        return {f"y{n}": op(leaves[f"w{n}"], leaves[f"b{n}"], **options) for n in range(8)}

    weights = {f"{k}{n}": torch.randn(37, dtype=made).to(kind) for k in "wb" for n in range(8)}
    plan, new = record(function, weights), like(weights)
    assert Calls(plan.plan.data).batches == {}
    assert agree(plan.values(new), truth(function, new))
