"""Refit quantized models from float checkpoints: weight and scale move together.

``scheme_of(model)`` reads off a quantized model how its weights were quantized. Kept beside the
engine and given as a setting of this plugin, it makes every refit quantize in the same way::

    scheme = refitkit_quant.scheme_of(model, original=floats)
    pipeline = refitkit.Pipeline({"plugin_settings": {"quant": {"scheme": scheme}}})
    pipeline.refit(compiled, new_floats)

Importing this imports neither torch nor torchao nor modelopt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit_quant.scheme import Scheme
from refitkit_quant.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["Scheme", "Settings", "scheme_of"]


def scheme_of(
    model: torch.nn.Module,
    original: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
    *,
    config: Any = None,
) -> Scheme:
    """How the weights of a quantized model were quantized.

    Quantized tensors do not tell everything: not by which of several rules a scale was chosen. What
    they do not tell is found by quantizing the original weights with each rule: the one that
    gives the very same bits is the one. Nothing is guessed.

    Args:
        model: The model, quantized by ``torchao.quantization.quantize_`` (before or after
            ``unwrap_tensor_subclass``) or by ``modelopt.torch.quantization.quantize``. It is not
            changed.
        original: The float model, or its state_dict, as it was before; needed for torchao's
            ``IntxWeightOnlyConfig``, unless ``config`` is given. Names of weights that are tied in
            it are learned from it, too.
        config: The torchao config with which all of it was quantized. It is checked against what
            the tensors tell, and against ``original`` where that is given.

    Returns:
        The scheme: frozen, and JSON by ``model_dump_json`` or ``save``.

    Raises:
        UnsupportedTargetError: Nothing in it is quantized, or is in a way that has no rule here, or
            not from these originals; lists every such weight.
        ConfigError: Several rules may have made a weight, so ``original`` or ``config`` is needed.
    """
    from refitkit_quant.reading import read_scheme

    return read_scheme(model, original, config)
