"""The op ``x * tanh(weight)``, by channel, with the tanh of Python."""

import ctypes
import math
import struct

import torch

LAYER = "refitkit_example.gate:"


def gates(weight: torch.Tensor) -> torch.Tensor:
    """The tanh of a float32 weight, computed where neither torch nor a recorder sees it."""
    raw = weight.detach().to("cpu", torch.float32).contiguous()
    numbers = struct.unpack(f"{raw.numel()}f", ctypes.string_at(raw.data_ptr(), raw.nbytes))
    packed = struct.pack(f"{raw.numel()}f", *map(math.tanh, numbers))
    return torch.frombuffer(bytearray(packed), dtype=torch.float32)


@torch.library.custom_op("refitkit_example::gate", mutates_args=())
def gate(x: torch.Tensor, weight: torch.Tensor, fqn: str) -> torch.Tensor:
    """The op; ``fqn`` is the name of the weight in the model."""
    return x * gates(weight).to(x.device)


@gate.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, fqn: str) -> torch.Tensor:
    return torch.empty_like(x)
