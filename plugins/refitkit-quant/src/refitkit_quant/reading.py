"""Read the scheme of a quantized model, with the rules of each tool."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from refitkit.errors import ConfigError, Problem, UnsupportedTargetError
from refitkit.program.ambient import plain

from refitkit_quant.scheme import ModeloptWeight, Scheme, TorchaoWeight

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit_quant.scheme import QuantizedWeight
    from refitkit_quant.torchao_rules.reading import UnclearRule

_DISTRIBUTIONS = {"torchao": "torchao", "modelopt": "nvidia-modelopt"}


@plain
def read_scheme(
    model: torch.nn.Module,
    original: torch.nn.Module | Mapping[str, torch.Tensor] | None,
    config: Any,
) -> Scheme:
    """The scheme of a model; arguments and errors as for :func:`refitkit_quant.scheme_of`."""
    weights: list[QuantizedWeight] = []
    unsupported: list[Problem] = []
    unclear: list[Problem] = []
    for one in _read(model, _tensors(original), config):
        if isinstance(one, Problem):
            unsupported.append(one)
        elif isinstance(one, TorchaoWeight | ModeloptWeight):
            weights.append(one)
        else:
            unclear.append(one.problem)
    # Report unsupported weights first: no original or config would help with them.
    if unsupported or not (weights or unclear):
        message = (
            "Some weights are quantized in ways that this plugin does not support."
            if unsupported
            else f"No weight of this {type(model).__name__} is quantized by torchao or ModelOpt."
        )
        raise UnsupportedTargetError(message, problems=[*unsupported, *unclear])
    if unclear:
        message = "The quantized tensors alone do not show how these weights were quantized."
        raise ConfigError(message, problems=unclear)
    tools = dict.fromkeys(weight.tool for weight in weights)
    versions = {_DISTRIBUTIONS[tool]: version(_DISTRIBUTIONS[tool]) for tool in tools}
    return Scheme(versions=versions, weights=tuple(weights))


def _read(
    model: torch.nn.Module, originals: Mapping[str, torch.Tensor] | None, config: Any
) -> Iterator[TorchaoWeight | ModeloptWeight | Problem | UnclearRule]:
    """The weights that each tool quantized, or why they have no rule.

    A tool that was not imported cannot have quantized the model, so it is not imported here.
    """
    if "torchao" in sys.modules:
        from refitkit_quant.torchao_rules import reading as torchao

        yield from torchao.read(model, originals, config)
    if "modelopt" in sys.modules:
        from refitkit_quant.modelopt_rules import reading as modelopt

        yield from modelopt.read(model)


def _tensors(
    original: torch.nn.Module | Mapping[str, torch.Tensor] | None,
) -> Mapping[str, torch.Tensor] | None:
    if isinstance(original, torch.nn.Module):
        return original.state_dict(keep_vars=True)
    return original
