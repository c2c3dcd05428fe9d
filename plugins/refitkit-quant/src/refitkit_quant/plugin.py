"""The hooks of the plugin, which the entry point ``quant`` of the group ``refitkit`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.config import Config
    from refitkit.errors import Problem
    from refitkit.protocols import Plan, WeightSource, WeightTransform


@hookimpl
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """A transform that quantizes by the scheme in the settings, or by that in the plan."""
    from refitkit_quant.scheme import QuantSettings

    settings = QuantSettings.of(config)
    from refitkit_quant.transform import QuantTransform

    return [QuantTransform(settings.scheme, settings.error_limit)]


@hookimpl
def refitkit_load_module(config: Config) -> None:
    """Register the ops of saved quantized programs; return None, so that others open the module.

    torch can load a program only after its ops are registered, and the ops of quantized programs
    are torchao's and ModelOpt's.
    """
    from refitkit_quant.ops import register_ops
    from refitkit_quant.scheme import QuantSettings

    settings = QuantSettings.of(config)
    if settings.scheme is not None:
        register_ops(settings.scheme)


@hookimpl
def refitkit_check(plan: Plan, source: WeightSource) -> Iterable[Problem]:
    """Problems with ModelOpt weights without scales and scales without weights.

    It needs no scheme.
    """
    from refitkit_quant.pairs import incomplete_pairs

    return incomplete_pairs((leaf.fqn for leaf in plan.data.leaves), source.names())
