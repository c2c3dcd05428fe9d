"""Apply kinds of bad input to a saved module, each in a process of its own; tell JSON.

usage: bad_input.py MODULE CASE...
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from aoti_helpers import digest, each_in_a_process, slots_of
from aoti_models import CASES

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

State = dict[str, Any]
NAME = "a.weight"


@dataclass
class Try:
    """One refit to try.

    Attributes:
        change: Changes a good state_dict in place.
        partial: Whether the refit is partial.
        settings: Settings of the pipeline.
    """

    change: Callable[[State], None]
    partial: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def _with(make: Callable[[torch.Tensor], Any], name: str = NAME) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = make(state[name])

    return change


def _several(state: State) -> None:
    state["a.weight"] = state["a.weight"][:, :3]
    state["a.bias"] = state["a.bias"].double()
    state["b.weight"] = torch.full_like(state["b.weight"], torch.nan)
    state["typo.weight"] = torch.zeros(2)
    del state["scale"]


def _unknown_and_known(state: State) -> None:
    _only("a.bias")(state)
    state["x"] = torch.zeros(2)


def _only(*names: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in set(state) - set(names):
            del state[name]

    return change


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous view that starts in the middle of other memory, as in a flat checkpoint."""
    flat = torch.full((tensor.numel() + 13,), torch.nan)
    flat[7:-6] = tensor.reshape(-1)
    return flat[7:-6].view(tensor.shape)


def _gappy(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 3), torch.nan)
    wide[::2, 1::3] = tensor
    return wide[::2, 1::3]


def _bad_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[3, 5] = value
        return tensor

    return make


def _trained(tensor: torch.Tensor) -> torch.Tensor:
    weight = torch.nn.Parameter(tensor.clone())
    (weight * 2).sum().backward()
    return weight


def _negated_lazily(tensor: torch.Tensor) -> torch.Tensor:
    """The same values through a view whose negative bit is set."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg()
    return lazy


def _negated_lazily_in_place(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-tensor)


def _quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


TRIES: dict[str, Try] = {
    "smaller": Try(_with(lambda t: t[:-1])),
    "bigger": Try(_with(lambda t: torch.cat([t, t]))),
    "transposed": Try(_with(lambda t: t.t().contiguous())),
    "flattened": Try(_with(lambda t: t.reshape(-1))),
    "one row, which would broadcast": Try(_with(lambda t: t[:1])),
    "float16": Try(_with(lambda t: t.half())),
    "bfloat16": Try(_with(lambda t: t.bfloat16())),
    "float64": Try(_with(lambda t: t.double())),
    "int32": Try(_with(lambda t: t.to(torch.int32))),
    "int32 of the same bits": Try(_with(lambda t: t.view(torch.int32))),
    "sparse": Try(_with(lambda t: t.to_sparse())),
    "meta": Try(_with(lambda t: t.to("meta"))),
    "quantized": Try(_with(_quantized)),
    "array": Try(_with(lambda t: t.numpy())),
    "nan": Try(_with(_bad_element(torch.nan))),
    "infinity": Try(_with(_bad_element(-torch.inf))),
    "unknown name": Try(lambda state: state.update({"a.wieght": torch.zeros(24, 16)})),
    "missing name": Try(lambda state: state.pop("b.bias")),
    "several": Try(_several),
    "partial, nothing": Try(_only(), partial=True),
    "partial, unknown name": Try(_unknown_and_known, partial=True),
    "offset": Try(_with(_offset)),
    "turned": Try(_with(lambda t: t.t().contiguous().t())),
    "gaps": Try(_with(_gappy)),
    "expanded": Try(_with(lambda t: t[:1].expand(24, 16))),
    "trained": Try(_with(_trained)),
    "negated lazily": Try(_with(_negated_lazily)),
    "negated lazily, dense": Try(_with(_negated_lazily_in_place)),
    "nan allowed": Try(_with(_bad_element(torch.nan)), settings={"check_finite": False}),
    "partial": Try(_only("a.bias", "scale"), partial=True),
}


def outcome(path: str, name: str) -> dict[str, Any]:
    """Refit with a changed state_dict, and with what the module should hold after it."""
    attempt, case = TRIES[name], CASES["small"]
    pipeline = refitkit.Pipeline(attempt.settings)
    compiled = pipeline.load(path)
    before, slots = digest(compiled(*case.args())), slots_of(compiled)
    state: State = {k: v.clone() for k, v in case.model(1).state_dict().items()}
    attempt.change(state)
    told: dict[str, Any] = {"error": None}
    try:
        pipeline.refit(compiled, state, partial=attempt.partial)
    except refitkit.RefitError as exc:
        told["error"] = type(exc).__name__
        told["problems"] = [problem.as_dict() for problem in exc.problems]
        told["message"] = str(exc)
    told["outputs kept"] = digest(compiled(*case.args())) == before
    told["slots kept"] = slots_of(compiled) == slots
    if told["error"] is None:
        told["as a plain refit"] = _as_plain(path, state, compiled)
        told["live gradients"] = [n for n in state if compiled.read(n).requires_grad]
    return told


def _as_plain(path: str, state: State, compiled: refitkit.CompiledModule) -> bool:
    """Whether the result has the bits of a second module refitted with plain tensors."""
    case, other = CASES["small"], refitkit.load(path)
    wanted = {n: other.read(n) for n in ("a.weight", "a.bias", "b.weight", "b.bias", "scale")}
    wanted |= {n: torch.tensor(t.detach().tolist()) for n, t in state.items()}
    refitkit.Pipeline({"check_finite": False}).refit(other, wanted)
    same_outputs = digest(other(*case.args())) == digest(compiled(*case.args()))
    return same_outputs and slots_of(other) == slots_of(compiled)


if __name__ == "__main__":
    module, *names = sys.argv[1:]
    told = each_in_a_process({name: functools.partial(outcome, module, name) for name in names})
    sys.stdout.write(json.dumps(told) + "\n")
