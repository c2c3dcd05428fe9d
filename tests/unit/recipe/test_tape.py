"""Tape: aliases and writes, memory that is reused, and dispatch modes that are disabled."""

from __future__ import annotations

import copy
import gc
import os
import random
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from refitkit.errors import CompileError
from refitkit.recipe import Tape
from refitkit.recipe.memories import address_of
from tests.unit.recipe.recorder import agree, like, named, planned, record, truth

Function = Any


def leaves() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(4, 6, generator=generator),
        "b": torch.randn(6, generator=generator),
        "i": torch.tensor([2, 0, 1, 0]),
    }


def after(tensor: torch.Tensor, *writes: Any) -> torch.Tensor:
    """Return a tensor after writes to it."""
    for write in writes:
        write(tensor)
    return tensor


def read_around(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    c = w * 2
    view = c[1]
    before = c[1] * 1
    c[0:2].mul_(3)
    between = view * 1
    c.view(-1)[3:9].sub_(1)
    c[1:3][:, 2:4][0].add_(5)
    return before, between, view.clone(), c, c.t()


def copies_within(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    c = w * 1
    c[0].copy_(c[1])
    c[1].copy_(c[0] + 1)
    c.unbind(0)[2].mul_(c[1])
    return c


def exchanged(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    c, d = w * 1, b * 1
    c.data, d.data = d.data, c.data
    return c * 1, d * 1


def filled(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    c = torch.empty_like(w.t())
    c[0:3] = 1
    c[3:] = w[:, 3:].t()
    return c * 1


SERVED: dict[str, Function] = {
    "reads before, between and after": read_around,
    "copies within": copies_within,
    "exchanged": exchanged,
    "filled by parts": filled,
    "through a transposed view": lambda w, b, i: after(w * 2, lambda c: c.t().mul_(b[0])),
    "a part of what is transposed": lambda w, b, i: after(w.t() * 2, lambda c: c[0:2].zero_()),
    "number": lambda w, b, i: after(w * 1, lambda c: c.__setitem__(slice(1, 3), -0.0)),
    "strided": lambda w, b, i: after(
        w * 1, lambda c: c.__setitem__((slice(None, None, 2), slice(None, None, 3)), 7)
    ),
    "copy, cast, broadcast": lambda w, b, i: after(
        torch.zeros(4, 6, dtype=torch.float16), lambda c: c[1:3].copy_(b)
    ),
    "copy": lambda w, b, i: after(torch.empty(4, 6, dtype=torch.float64), lambda c: c.copy_(b)),
    "fill": lambda w, b, i: after(w * 1, lambda c: c.fill_(b[0])),
    "index_put": lambda w, b, i: after(w * 1, lambda c: c.__setitem__(i, 0)),
    "detach_": lambda w, b, i: after(w * 1, torch.Tensor.detach_),
    "t_": lambda w, b, i: after(w * 1, torch.Tensor.t_) + 1,
    "unsqueeze_": lambda w, b, i: after(w * 1, lambda c: c.unsqueeze_(0), lambda c: c.add_(1)),
    "resize_": lambda w, b, i: after(w * 1, lambda c: c.resize_(2, 6)) + 1,
    "set_": lambda w, b, i: after(w * 1, lambda c: c.set_(b * 2)) + 1,
    "set_ to a part": lambda w, b, i: (
        torch.empty(0).set_((w * 2).untyped_storage(), 3, (2, 2), (2, 1)) + 1
    ),
    "expanded": lambda w, b, i: after(b * 1, lambda c: c.add_(1)).expand(4, 6) * w,
    "overlapping": lambda w, b, i: (b * 1).as_strided((3, 4), (1, 1), 0) * 1,
    "strides of what was transposed": lambda w, b, i: (w.t() * 2).as_strided((24,), (1,)) * 1,
    "channels_last": lambda w, b, i: (
        w.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last).as_strided((24,), (1,)) + 1
    ),
    "conj": lambda w, b, i: torch.view_as_real(torch.complex(w, w * 2).conj().resolve_conj()),
    "neg": lambda w, b, i: torch.complex(w, w * 2).conj().imag,
    "view_as_complex": lambda w, b, i: torch.view_as_real(
        torch.view_as_complex((w * 1).view(4, 3, 2)) * 1j
    ),
    "bits": lambda w, b, i: (w * 1).view(torch.int32) & 0x7FFFFF,
    "of no elements": lambda w, b, i: torch.cat([w[:0], w]),
    "of no dimension": lambda w, b, i: b[1] * w[0, 0],
    "wrapped anew": lambda w, b, i: torch.nn.Parameter(w.t(), requires_grad=False),
    "a copied module": lambda w, b, i: copy.deepcopy(torch.nn.ParameterList([w]))[0] * 2,
    "a copied view": lambda w, b, i: copy.deepcopy((w * 1)[1:3]) * 2,
    "a copied storage": lambda w, b, i: (
        torch.empty(0).set_((w * 1).untyped_storage().clone(), 0, (4, 6), (6, 1)) * 1
    ),
    "a sum of what lay apart": lambda w, b, i: w[:, ::2].clone().sum(),
    "a sum of a copy": lambda w, b, i: torch.empty(4, 6).copy_(b).sum(),
    "whole numbers": lambda w, b, i: i * 2.5 + (i / 3) + i.sqrt(),
    "1, 1.0 and True": lambda w, b, i: (i + 1, i + 1.0, i + True, i.pow(2), i.pow(2.0)),
    "0 and -0": lambda w, b, i: (
        functional.pad(b, (1, 1), value=0.0),
        functional.pad(b, (1, 1), value=-0.0),
    ),
    "autocast": lambda w, b, i: autocast(w, b),
    "a simple subclass": lambda w, b, i: w.as_subclass(Simple) * 2 + b,
}


class Simple(torch.Tensor):
    """A tensor subclass without behaviour of its own."""


def autocast(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return w @ b


def plainly(function: Function) -> Function:
    def run(**weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {n: one.as_subclass(torch.Tensor) for n, one in named(function(**weights)).items()}

    return run


@pytest.mark.parametrize("name", SERVED)
def test_values_follow_from_what_was_written(name: str) -> None:
    function = plainly(SERVED[name])
    recording = record(function, leaves())
    assert set(recording.states.values()) == {"recipe"}
    assert not recording.guards
    for weights in (leaves(), like(leaves())):
        assert agree(recording.values(weights), truth(function, weights))


UNMAPPED: dict[str, Function] = {
    "written through bits": lambda w, b, i: after(
        w * 1, lambda c: c.view(torch.int32).bitwise_and_(3)
    ),
    "written through a conjugate": lambda w, b, i: torch.view_as_real(
        after(torch.complex(w, w), lambda c: c.conj().mul_(2j))
    ),
    "copied from what is quantized": lambda w, b, i: after(
        w * 1, lambda c: c.copy_(torch.quantize_per_tensor(w, 0.1, 0, torch.qint8).dequantize())
    ),
    "a storage that was filled": lambda w, b, i: after(
        w * 1, lambda c: c.untyped_storage().fill_(0)
    ),
    "bytes of a storage, as a number": lambda w, b, i: w * b.untyped_storage()[3],
    "several at once": lambda w, b, i: after(w * 1, lambda c: torch._foreach_add_([c], 1.0)),
    "dropped at random": lambda w, b, i: functional.dropout(w, 0.5, training=True),
    "sparse": lambda w, b, i: after(w * 1, lambda c: c.add_(torch.eye(4, 6).to_sparse())),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", UNMAPPED)
def test_what_is_not_followed_is_unmapped(name: str) -> None:
    recording = record(UNMAPPED[name], leaves())
    assert recording.state == "unmapped"
    assert recording.rows["y"].reason


def test_random_values_are_what_they_were() -> None:
    recording = record(lambda w, b, i: torch.empty_like(w).normal_() * b, leaves())
    assert agree(recording.values(leaves()), recording.outputs)


LEAF_WRITES: dict[str, Function] = {
    "in place": lambda w, b: w.add_(1),
    "through a view": lambda w, b: w.view(-1)[3:5].zero_(),
    "out": lambda w, b: torch.mul(w, w, out=w),
    "item": lambda w, b: w.__setitem__((0, 0), 0),
    "detached": lambda w, b: w.detach().add_(1),
    "a list": lambda w, b: torch._foreach_add_([w, b], 1.0),
    "storage": lambda w, b: w.untyped_storage().fill_(0),
    "through an array": lambda w, b: torch.from_numpy(w.numpy()).add_(1),
    "through a subclass": lambda w, b: w.as_subclass(Simple).add_(1),
    "sparse": lambda w, b: w.add_(torch.eye(4, 6).to_sparse()),
    "statistics": lambda w, b: functional.batch_norm(w, b, b.abs(), training=True),
    "native statistics": lambda w, b: torch.native_batch_norm(
        w, None, None, b, b.abs(), True, 0.1, 1e-5
    ),
    "instance norm": lambda w, b: functional.instance_norm(w[None], b[:4], b[:4].abs()),
    "largest norm": lambda w, b: functional.embedding(torch.tensor([0, 1]), w, max_norm=0.1),
}


@pytest.mark.parametrize("name", LEAF_WRITES)
def test_leaves_are_not_written_to(name: str) -> None:
    weights = leaves()
    versions = {fqn: one._version for fqn, one in weights.items()}
    with pytest.raises(CompileError, match="program's own tensors"):
        record(lambda w, b, i: LEAF_WRITES[name](w, b), weights)
    assert agree(weights, leaves())
    assert {fqn: one._version for fqn, one in weights.items()} == versions


# -- memory -----------------------------------------------------------------------------------


def test_addresses_that_are_used_again() -> None:
    """Runs in a new process, because the heap of this one may place every tensor elsewhere."""
    code = "from tests.unit.recipe.test_tape import use_addresses_again as use; use()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def use_addresses_again() -> None:
    """Reuse addresses of freed memory, all of it or a part: the heap decides which."""
    seen: list[tuple[int, int]] = []

    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        for number in range(30):
            one = (w * number).repeat(64, 16)
            seen.append((address_of(one), address_of(one) + one.nbytes))
            found.append(one.sum())
            del one
            array = np.full((4, 6), number, np.float32)
            found.append(torch.from_numpy(array).sum() + b[0])
            del array
        return tuple(found)

    recording = record(function, leaves())
    places = sorted(seen)
    assert any(one[1] > following[0] for one, following in pairwise(places))
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_parts_of_one_memory_under_several_names() -> None:
    flat = torch.arange(40.0)
    weights = {"w": flat[4:28].view(4, 6), "b": flat[28:34], "whole": flat}

    def function(w: torch.Tensor, b: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return w * 2, b + 1, w.t(), whole[1:] * 3

    recording = record(function, weights)
    other = like(weights)
    assert agree(recording.values(other), truth(function, other))


def test_arrays_that_overlap_are_one_memory() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        array = np.zeros(6, np.float32)
        part = torch.from_numpy(array[2:4])
        whole = torch.from_numpy(array)
        part.add_(b[:2])
        return whole * 1, torch.from_numpy(array[3:])

    recording = record(function, leaves())
    assert agree(recording.values(like(leaves())), truth(function, like(leaves()))) or (
        "unmapped" in recording.states.values()
    )


def test_it_keeps_no_tensor_alive() -> None:
    weights = leaves()
    tape = Tape(weights)
    with tape:
        big = weights["w"] * 2
        kept = (big + 1).sum()
        dead = weakref.ref(big.untyped_storage())
        del big
        gc.collect()
        assert dead() is None
        origin = tape.origin_of(kept)
    assert planned(tape, {"y": kept}, {"y": origin}, weights).state == "recipe"


# -- modes ------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A dispatch mode that counts ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def stack() -> list[Any]:
    return _python_dispatch._get_current_dispatch_mode_stack()


def inside(w: torch.Tensor) -> torch.Tensor:
    with _disable_current_modes(), _disable_current_modes():
        return w * 2


@_disable_current_modes()
def decorated(w: torch.Tensor) -> torch.Tensor:
    return w * 2


def beside(w: torch.Tensor) -> torch.Tensor:
    with Counting() as mode, _disable_current_modes():
        found = w * 2
    assert mode.count == 0
    with Counting() as mode, FakeTensorMode():
        torch.ones(2) * 2
        with _disable_current_modes():
            found = found * 1
    return found


@pytest.mark.parametrize("function", [inside, decorated, beside])
def test_it_stays_on_where_modes_are_off(function: Function) -> None:
    with Counting() as below:
        before = stack()
        recording = record(lambda w, b, i: function(w), leaves())
        assert stack() == before == [below]
    assert recording.state == "recipe"
    other = like(leaves())
    assert agree(recording.values(other), truth(lambda w, b, i: function(w), other))


def test_an_error_inside_restores_everything() -> None:
    functions = _python_dispatch._pop_mode, _python_dispatch._push_mode

    def fails(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> None:
        with Counting(), _disable_current_modes():
            raise KeyError

    with Counting() as below:
        with pytest.raises(KeyError):
            record(fails, leaves())
        assert stack() == [below]
    assert stack() == []
    assert (_python_dispatch._pop_mode, _python_dispatch._push_mode) == functions


# -- random functions -------------------------------------------------------------------------

_STEPS: list[Any] = [
    lambda r, t, o: t * r.choice([2, 0.5, -0.0, 1e-3]),
    lambda r, t, o: t + o,
    lambda r, t, o: t.t() if t.dim() == 2 else t.unsqueeze(0),
    lambda r, t, o: t.reshape(-1),
    lambda r, t, o: t[0],
    lambda r, t, o: t[r.randint(0, 1) :: r.randint(1, 2)],
    lambda r, t, o: t.clone(),
    lambda r, t, o: t.to(r.choice([torch.float16, torch.float64, torch.bfloat16])),
    lambda r, t, o: t.sum(0),
    lambda r, t, o: t.abs().sqrt(),
    lambda r, t, o: t.expand(2, *t.shape),
    lambda r, t, o: torch.cat([t.reshape(-1), o.reshape(-1).to(t.dtype)]),
    lambda r, t, o: torch.stack([t, t]),
    lambda r, t, o: t.chunk(2, 0)[-1],
    lambda r, t, o: torch.zeros_like(t) + t,
    lambda r, t, o: t.permute(*r.sample(range(t.dim()), t.dim())),
    lambda r, t, o: torch.where(t > 0, t, -t),
    lambda r, t, o: torch.from_numpy(t.numpy()) if t.dtype is not torch.bfloat16 else t,
    lambda r, t, o: torch.empty_like(t).copy_(t),
    lambda r, t, o: t.as_strided((2,), (1,), t.storage_offset()) if t.numel() > 2 else t,
]
_WRITES: list[Any] = [
    lambda r, t, o: t.add_(r.choice([1, 0.25])),
    lambda r, t, o: t.mul_(o.to(t.dtype).sum()),
    lambda r, t, o: t[0].mul_(3),
    lambda r, t, o: t.zero_(),
    lambda r, t, o: t.view(-1)[r.randint(0, 2) :].zero_(),
    lambda r, t, o: t.copy_(o.to(t.dtype).sum()),
    lambda r, t, o: t.__setitem__((..., 0), r.choice([5, -0.0, 2.5])),
    lambda r, t, o: t.t_() if t.dim() == 2 else t.unsqueeze_(0),
    lambda r, t, o: t[:-1].copy_(t[1:].clone()),
    lambda r, t, o: t.unbind(0)[-1].sub_(1),
]


def random_function(seed: int) -> Function:
    """Return a function of leaves that makes the same calls for one seed, whatever the values."""

    def run(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = random.Random(seed)  # noqa: S311 - no secret
        pool, own = [w, b, (i * 2.5).float()], [w * 1, b + 1]
        for _ in range(r.randint(3, 14)):
            other = r.choice(pool)
            try:
                if r.random() < 0.35:
                    r.choice(_WRITES)(r, r.choice(own), other)
                else:
                    pool.append(r.choice(_STEPS)(r, r.choice([*pool, *own]), other))
            except (RuntimeError, IndexError, TypeError):
                continue  # the shapes do not fit, and will not in the next run either
        return (*own, *pool[-4:])

    return run


@pytest.mark.parametrize("part", range(4))
def test_random_functions(part: int) -> None:
    for seed in range(50 * part, 50 * part + 50):
        function = random_function(seed)
        recording = record(function, leaves())
        assert "unmapped" not in recording.states.values(), seed
        for weights in (leaves(), like(leaves(), seed + 1)):
            assert agree(recording.values(weights), truth(function, weights)), seed


def test_chains_of_thousands_of_ops_are_written_and_computed() -> None:
    def long(w: torch.Tensor) -> torch.Tensor:
        y = w.clone()
        for number in range(3000):
            y = y + number if number % 2 else y * 0.5
        y[0] = 1.0
        return y

    found = record(long, {"w": torch.randn(5)})
    assert found.state == "recipe"
    new = torch.randn(5)
    values = found.values({"w": new})
    assert not isinstance(values, str)
    assert torch.equal(values["y"], long(new))
