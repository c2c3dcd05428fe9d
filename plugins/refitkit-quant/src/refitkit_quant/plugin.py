"""The hooks. Found by the entry-point group ``refitkit`` under the name ``quant``."""

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
    """Quantize by the scheme in the settings; without one, nothing is offered."""
    from refitkit_quant.settings import Settings

    settings = Settings.of(config)
    if settings.scheme is None:
        return []
    from refitkit_quant.transform import QuantTransform

    return [QuantTransform(settings.scheme, settings.error_limit)]


@hookimpl
def refitkit_load_module(config: Config) -> None:
    """Open nothing, but have the ops at hand that a saved quantized program may hold.

    torch reads a program only once its ops are registered, and they are torchao's and ModelOpt's.
    """
    from refitkit_quant.settings import Settings

    settings = Settings.of(config)
    if settings.scheme is not None:
        from refitkit_quant.ops import register

        register(settings.scheme)


@hookimpl
def refitkit_check(plan: Plan, source: WeightSource) -> Iterable[Problem]:
    """Weights of ModelOpt without their scales, and scales without weights; scheme or not."""
    from refitkit_quant.pairs import torn_apart

    return torn_apart((leaf.fqn for leaf in plan.data.leaves), source.names())
