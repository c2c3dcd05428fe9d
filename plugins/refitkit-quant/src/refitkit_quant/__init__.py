"""Refit quantized models from float checkpoints: a weight and its scale change together.

``scheme_of(model)`` reads from a quantized model how its weights were quantized. With this scheme
in the settings of the plugin, every refit quantizes in the same way::

    scheme = refitkit_quant.scheme_of(model, original=floats)
    pipeline = refitkit.Pipeline({"plugin_settings": {"quant": {"scheme": scheme}}})
    pipeline.refit(compiled, new_floats)

Importing this package imports neither torch nor torchao nor modelopt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit_quant.scheme import QuantSettings, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["QuantSettings", "Scheme", "scheme_of"]


def scheme_of(
    model: torch.nn.Module,
    original: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
    *,
    config: Any = None,
) -> Scheme:
    """How the weights of a quantized model were quantized.

    Quantized tensors do not show by which rule their scales were chosen. So this quantizes the
    original weights with each possible rule, and takes the rule that gives the same bits.

    Args:
        model: Model that ``torchao.quantization.quantize_`` (before or after
            ``unwrap_tensor_subclass``) or ``modelopt.torch.quantization.quantize`` quantized. It is
            not changed.
        original: The float model before quantization, or its state_dict. torchao's
            ``IntxWeightOnlyConfig`` needs it, unless ``config`` is given. It also gives the names
            of tied weights.
        config: torchao config that quantized the whole model. It is checked against the tensors,
            and against ``original`` if that is given.

    Returns:
        The scheme, a frozen value. ``save`` writes it as JSON.

    Raises:
        UnsupportedTargetError: No weight is quantized, or some are in a way without a rule here, or
            not from these originals; lists all these weights.
        ConfigError: Several rules may have made a weight, so ``original`` or ``config`` is needed.
    """
    from refitkit_quant.reading import read_scheme

    return read_scheme(model, original, config)
