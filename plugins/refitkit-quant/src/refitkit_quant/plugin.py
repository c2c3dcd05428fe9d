"""The hooks of the plugin, which the entry point ``quant`` of the group ``refitkit`` names."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.config import Config
    from refitkit.errors import Problem
    from refitkit.protocols import Plan, WeightSource, WeightTransform

    from refitkit_quant.scheme import Scheme


_MODULES = {"torchao": "torchao.quantization", "modelopt": "modelopt.torch.quantization"}
"""Modules whose import registers the ops of a tool."""


@hookimpl
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """A transform that quantizes by the scheme in the settings; nothing without a scheme."""
    from refitkit_quant.scheme import QuantSettings

    settings = QuantSettings.of(config)
    if settings.scheme is None:
        return []
    from refitkit_quant.transform import QuantTransform

    return [QuantTransform(settings.scheme, settings.error_limit)]


@hookimpl
def refitkit_load_module(config: Config) -> None:
    """Register the ops of saved quantized programs; return None, so that others open the module.

    torch can load a program only after its ops are registered, and the ops of quantized programs
    are torchao's and ModelOpt's.
    """
    from refitkit_quant.scheme import QuantSettings

    settings = QuantSettings.of(config)
    if settings.scheme is not None:
        _register_ops(settings.scheme)


@hookimpl
def refitkit_check(plan: Plan, source: WeightSource) -> Iterable[Problem]:
    """Problems with ModelOpt weights without scales and scales without weights.

    It needs no scheme.
    """
    from refitkit_quant.pairs import incomplete_pairs

    return incomplete_pairs((leaf.fqn for leaf in plan.data.leaves), source.names())


def _register_ops(scheme: Scheme) -> None:
    """Import the tools that quantized the weights of a scheme, which registers their ops.

    A tool that is not installed is ignored: if the program needs its ops, torch raises.
    """
    for tool in dict.fromkeys(weight.tool for weight in scheme.weights):
        if find_spec(tool) is not None:
            with warnings.catch_warnings():
                # Both tools warn about optional packages that are not installed.
                warnings.simplefilter("ignore")
                import_module(_MODULES[tool])
