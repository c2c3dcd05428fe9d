"""Call saved modules with wrong or awkward inputs, each in a process of its own; tell JSON.

usage: wrong_calls.py FOLDER CASE...
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from aoti_helpers import digest, each_in_a_process, max_error
from aoti_models import CASES
from torch.utils import _pytree as pytree

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first(change: Callable[[torch.Tensor], Any]) -> Callable[[tuple[Any, ...], Any], Call]:
    return lambda args, kwargs: ((change(args[0]), *args[1:]), kwargs)


def _parts(change: Callable[[dict[str, Any]], Any]) -> Callable[[tuple[Any, ...], Any], Call]:
    return lambda args, kwargs: (args, {**kwargs, "parts": change(kwargs["parts"])})


def _gaps(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full([2 * size for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    place = tuple(slice(1, None, 2) for _ in tensor.shape)
    wide[place] = tensor
    return wide[place]


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.full((tensor.numel() + 5,), torch.nan)
    flat[3:-2] = tensor.reshape(-1)
    return flat[3:-2].view(tensor.shape)


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-tensor)


def _rows(count: int) -> Callable[[tuple[Any, ...], Any], Call]:
    return lambda args, kwargs: ((torch.ones(count, 16),), kwargs)


CALLS: dict[str, tuple[str, Callable[[tuple[Any, ...], Any], Call]]] = {
    "fewer rows": ("small", _first(lambda t: t[:1])),
    "more rows": ("small", _first(lambda t: t.repeat(500, 1))),
    "no rows": ("small", _first(lambda t: t[:0])),
    "fewer columns": ("small", _first(lambda t: t[:, :2])),
    "more columns": ("small", _first(lambda t: t.repeat(1, 64))),
    "turned shape": ("small", _first(lambda t: t.t())),
    "one dimension": ("small", _first(lambda t: t.reshape(-1))),
    "three dimensions": ("small", _first(lambda t: t[None])),
    "a number": ("small", _first(lambda _: 3.0)),
    "nothing": ("small", _first(lambda _: None)),
    "a list": ("small", _first(lambda t: t.tolist())),
    "an array": ("small", _first(lambda t: t.numpy())),
    "float64": ("small", _first(lambda t: t.double())),
    "float16": ("small", _first(lambda t: t.half())),
    "int64": ("small", _first(lambda t: t.long())),
    "sparse": ("small", _first(lambda t: t.to_sparse())),
    "meta": ("small", _first(lambda t: t.to("meta"))),
    "no arguments": ("small", lambda _, kwargs: ((), kwargs)),
    "two arguments": ("small", lambda args, kwargs: (args * 2, kwargs)),
    "unknown keyword": ("small", lambda args, _: (args, {"y": args[0]})),
    "0 of 1 to 64": ("batch", _rows(0)),
    "65 of 1 to 64": ("batch", _rows(65)),
    "missing keyword": (
        "nested",
        lambda args, kwargs: (args, {"parts": kwargs["parts"]}),
    ),
    "extra keyword": ("nested", lambda args, kwargs: (args, {**kwargs, "z": args[0]})),
    "missing part": ("nested", _parts(lambda parts: {"p": parts["p"]})),
    "extra part": ("nested", _parts(lambda parts: {**parts, "r": parts["p"]})),
    "parts in a list": ("nested", _parts(lambda parts: list(parts.values()))),
    "wrong part": ("nested", _parts(lambda parts: {"p": parts["q"], "q": parts["p"]})),
    "token too large": ("transformer", _first(lambda t: t.fill_(32))),
    "token far too large": ("transformer", _first(lambda t: t.fill_(2**40))),
    "token negative": ("transformer", _first(lambda t: t.fill_(-33))),
    "float tokens": ("transformer", _first(lambda t: t.float())),
    "int32 tokens": ("transformer", _first(lambda t: t.int())),
    "gaps": ("small", _first(_gaps)),
    "an offset": ("small", _first(_offset)),
    "turned": ("small", _first(_turned)),
    "expanded": ("small", _first(lambda t: t[:1].expand(3, 16))),
    "negated lazily": ("small", _first(_negated)),
    "with gradient": ("small", _first(lambda t: t.clone().requires_grad_())),
    "a parameter": ("small", _first(torch.nn.Parameter)),
    "channels last": (
        "convnet",
        _first(lambda t: t.contiguous(memory_format=torch.channels_last)),
    ),
    "image with gaps": ("convnet", _first(_gaps)),
    "gaps in many rows": ("batch", lambda args, kwargs: ((_gaps(torch.ones(50, 16)),), kwargs)),
    "keywords in another order": (
        "nested",
        lambda args, kwargs: (args, dict(reversed(kwargs.items()))),
    ),
    "awkward everywhere": (
        "nested",
        lambda args, kwargs: pytree.tree_map(_gaps, (args, kwargs)),
    ),
}


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Call as named; compare with eager, and with a call of plain tensors."""
    model, change = CALLS[name]
    case, compiled = CASES[model], refitkit.load(folder / f"{model}.refit")
    right = digest(compiled(*case.args(), **case.kwargs()))
    args, kwargs = change(case.args(), case.kwargs())
    try:
        found = compiled(*args, **kwargs)
    except refitkit.RefitError as exc:
        told: dict[str, Any] = {"error": type(exc).__name__, "message": str(exc)}
    else:
        eager = case.model(0)
        plain = pytree.tree_map(lambda t: t.detach().clone().contiguous(), (args, kwargs))
        told = {
            "error": None,
            "difference": max_error(found, eager(*args, **kwargs)),
            "as plain": digest(found) == digest(compiled(*plain[0], **plain[1])),
            "gradient": any(t.requires_grad for t in pytree.tree_leaves(found)),
        }
    told["still right"] = digest(compiled(*case.args(), **case.kwargs())) == right
    return told


if __name__ == "__main__":
    where, *names = sys.argv[1:]
    tasks = {name: functools.partial(outcome, Path(where), name) for name in names}
    sys.stdout.write(json.dumps(each_in_a_process(tasks)) + "\n")
