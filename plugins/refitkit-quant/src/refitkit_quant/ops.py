"""Registers the ops of torchao and ModelOpt, which programs with quantized weights contain."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refitkit_quant.scheme import Scheme

_MODULES = {"torchao": "torchao.quantization", "modelopt": "modelopt.torch.quantization"}
"""Modules whose import registers the ops of a tool."""


def register_ops(scheme: Scheme) -> None:
    """Import the tools that quantized the weights of a scheme, which registers their ops.

    A tool that is not installed is ignored: if the program needs its ops, torch raises.
    """
    for tool in dict.fromkeys(weight.tool for weight in scheme.weights):
        if find_spec(tool) is not None:
            with warnings.catch_warnings():
                # Both tools warn about optional packages that are not installed.
                warnings.simplefilter("ignore")
                import_module(_MODULES[tool])
