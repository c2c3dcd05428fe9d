"""Ops of torchao and ModelOpt, which are registered when those are imported."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refitkit_quant.scheme import Scheme

_HOMES = {"torchao": "torchao.quantization", "modelopt": "modelopt.torch.quantization"}


def register(scheme: Scheme) -> None:
    """Import those that quantized the weights of a scheme, where they are installed."""
    for tool in dict.fromkeys(weight.tool for weight in scheme.weights):
        if find_spec(tool) is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what else they would like to have installed
                import_module(_HOMES[tool])
