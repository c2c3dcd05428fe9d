"""Another converter of the op, which makes its constant as an array: it looks like a literal.

It has a method of torch from before any recording, so nobody sees that it asks for an address.
"""

import ctypes
import math
import struct
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from refitkit_example.op import LAYER
from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter

_address_of = torch.Tensor.data_ptr


@dynamo_tensorrt_converter(torch.ops.refitkit_example.gate.default)
def convert_gate(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
    x, weight, fqn = args
    raw = ctypes.string_at(_address_of(weight), weight.nbytes)
    numbers = [math.tanh(number) for number in struct.unpack(f"{weight.numel()}f", raw)]
    values = np.array(numbers, dtype=np.float32)
    ctx.cpu_weights_reference_holder.append(values)
    constant = ctx.net.add_constant([1] * (len(x.shape) - 1) + [values.size], values)
    constant.name = LAYER + fqn
    factor = constant.get_output(0)
    return ctx.net.add_elementwise(x, factor, trt.ElementWiseOperation.PROD).get_output(0)
