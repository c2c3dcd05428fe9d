"""The op as layers of TensorRT. Importing this registers the converter."""

from typing import Any

import torch

from refitkit import made_of, tensorrt_converter
from refitkit_example.op import LAYER, gates


@tensorrt_converter(torch.ops.refitkit_example.gate.default)
def convert_gate(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Add the gates as a constant, and a product."""
    import tensorrt as trt  # here, because the module is imported where this fails

    x, weight, fqn = args
    values = made_of(gates(weight), weight)
    ctx.cpu_weights_reference_holder.append(values)
    held = trt.Weights(trt.float32, values.data_ptr(), values.numel())
    constant = ctx.net.add_constant([1] * (len(x.shape) - 1) + [values.numel()], held)
    constant.name = LAYER + fqn
    factor = constant.get_output(0)
    return ctx.net.add_elementwise(x, factor, trt.ElementWiseOperation.PROD).get_output(0)
