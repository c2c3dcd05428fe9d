"""Read from ModelOpt's quantizers how a model is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelopt.torch.quantization.nn import TensorQuantizer
from refitkit.errors import Problem
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name

from refitkit_quant.modelopt_rules.formulas import largest
from refitkit_quant.scheme import ModeloptWeight, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from refitkit_quant.modelopt_rules.formulas import Format

_FORMATS: dict[Any, Format] = {(4, 3): "fp8", 8: "int8"}
_WEIGHT = "weight_quantizer"
_INPUT = "input_quantizer"


def read(model: torch.nn.Module) -> Iterator[ModeloptWeight | Problem]:
    """Each weight with an enabled quantizer; or a problem if this plugin has no rule for it."""
    # remove_duplicate=False: a shared module has weights under several names.
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, child in module.named_children():
            if name.endswith(_WEIGHT) and _is_on(child):
                lead = f"{prefix}." if prefix else ""
                why = _why_unsupported(module, name, child)
                if why:
                    yield Problem(f"{lead}{name}", "no rule", why)
                else:
                    yield _weight(lead, module, child)


def _is_on(quantizer: Any) -> bool:
    return bool(getattr(quantizer, "is_enabled", True))


def _why_unsupported(module: torch.nn.Module, name: str, quantizer: Any) -> str:
    """Why this plugin has no rule for a weight; empty if it has one."""
    # A subclass or a sequence of quantizers has other formulas.
    if type(quantizer) is not TensorQuantizer:
        return f"a {type(quantizer).__name__}"
    if name != _WEIGHT or module._parameters.get("weight") is None:  # noqa: SLF001 - the attribute is the quantized one
        return "not the quantizer of a parameter 'weight'"
    if quantizer.num_bits not in _FORMATS or quantizer.unsigned:
        bits = f"num_bits={quantizer.num_bits}, unsigned={quantizer.unsigned}"
        return f"{bits}; only fp8 and int8 have a rule"
    unsupported = [
        *_unsupported_settings(quantizer),
        *_unsupported_input_settings(getattr(module, _INPUT, None)),
    ]
    if unsupported:
        return ", ".join(unsupported)
    return "" if hasattr(quantizer, "_amax") else "it is not calibrated"


def _unsupported_settings(quantizer: Any) -> list[str]:
    """Settings that change the formula, by the names of ``QuantizerAttributeConfig``."""
    axis = quantizer.axis
    unsupported = {
        "block_sizes": quantizer.block_sizes is not None,
        "pre_quant_scale": quantizer.pre_quant_scale is not None,
        "rotate": quantizer.rotate_is_enabled,
        "bias": quantizer.bias is not None,
        "type='dynamic'": quantizer._dynamic,  # noqa: SLF001 - it has no public name
        "fake_quant=False": not quantizer.fake_quant,
        "narrow_range": quantizer.narrow_range,
        f"axis={axis}": isinstance(axis, tuple | list) and len(axis) > 1,
    }
    return [name for name, is_set in unsupported.items() if is_set]


def _unsupported_input_settings(quantizer: Any) -> list[str]:
    """Settings with which the weight differs from the float checkpoint's.

    SmoothQuant, AWQ and rotations change the weight together with the input.
    """
    unsupported = []
    if getattr(quantizer, "pre_quant_scale", None) is not None:
        unsupported.append(f"{_INPUT}.pre_quant_scale")
    if getattr(quantizer, "rotate_is_enabled", False):
        unsupported.append(f"{_INPUT}.rotate")
    return unsupported


def _weight(lead: str, module: torch.nn.Module, quantizer: Any) -> ModeloptWeight:
    weight = module._parameters["weight"]  # noqa: SLF001 - the attribute may be the quantized one
    amax = quantizer._amax  # noqa: SLF001 - torch.export names this buffer
    # ModelOpt stores one axis as a number or as a tuple.
    axis = quantizer.axis[0] if isinstance(quantizer.axis, tuple | list) else quantizer.axis
    # The calibration method is not stored. If the largest element gives the amax, it was "max".
    computed = largest(weight.detach(), axis).reshape(amax.shape)  # type: ignore[union-attr]
    # A layer that quantizes only its weight has no calibration of the input.
    inputs = getattr(module, _INPUT, None)
    input_amax = getattr(inputs, "_amax", None) if inputs is not None and _is_on(inputs) else None
    return ModeloptWeight(
        weight=_entry(f"{lead}weight", weight),
        format=_FORMATS[quantizer.num_bits],
        axis=axis,
        amax=_entry(f"{lead}{_WEIGHT}._amax", amax),
        amax_is="max" if same_bits(computed, amax) else "given",
        input_amax=None if input_amax is None else _entry(f"{lead}{_INPUT}._amax", input_amax),
    )


def _entry(name: str, tensor: Any) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
