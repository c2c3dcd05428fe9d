"""A layer type that TensorRT-RTX does not have, on a network and a tensorrt that are fakes.

The network is read and written by the code that reads real ones: only what TensorRT would give it
is made up.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt import networks


class ILayer:
    """What a network gives: it knows its type, and nothing of its weights."""

    def __init__(self, name: str, kind: str, **weights: Any) -> None:
        self.name, self.type, self._held = name, SimpleNamespace(name=kind), weights


class IFullyConnectedLayer(ILayer):
    """The same layer, with access to its weights."""

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_held", {})
        if name in held:
            held[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return self._held[name]


@dataclass
class Weights:
    """As ``tensorrt.Weights``: a type, an address, a number of elements."""

    kind: str
    address: int
    count: int

    def read(self) -> list[float]:
        """What lies at the address, as TensorRT would read it in a build."""
        return list((ctypes.c_float * self.count).from_address(self.address))


class DType:
    """As ``torch_tensorrt._enums.dtype``."""

    @classmethod
    def _from(cls, dtype: torch.dtype) -> Any:
        return SimpleNamespace(to=lambda _: f"trt of {dtype}")


class Net(list[ILayer]):
    """As ``tensorrt.INetworkDefinition``."""

    num_layers = property(len)


KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([7, 8], dtype=np.float32)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ILayer:
    """The only layer of a network of which the interpreter recorded nothing."""
    trt, enums = ModuleType("tensorrt"), ModuleType("torch_tensorrt._enums")
    trt.Weights, trt.DataType, enums.dtype = Weights, "DataType", DType
    trt.IFullyConnectedLayer = IFullyConnectedLayer
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt._enums", enums)
    made = ILayer("head/fc", "FULLY_CONNECTED", kernel=KERNEL, bias=BIAS)
    interpreter = SimpleNamespace(ctx=SimpleNamespace(net=Net([made]), weight_refit_map={}))
    monkeypatch.setattr(networks, "_interpret", lambda part, settings: interpreter)
    return made


def network(**settings: object) -> networks.Network:
    """The network, read with the layer types of all plugins in use."""
    types = refitkit.Pipeline(settings).host.named("refitkit_layer_types")
    return networks.Network(SimpleNamespace(name="part"), None, types)


@pytest.mark.usefixtures("layer")
def test_its_weights_are_slots() -> None:
    found = {slot.name: (slot.dtype, slot.count) for slot in network().slots}
    assert found == {"head/fc KERNEL": ("float32", 6), "head/fc BIAS": ("float32", 2)}


@pytest.mark.usefixtures("layer")
def test_their_values_are_read() -> None:
    scanned = network().scanned
    assert scanned["head/fc KERNEL"].tolist() == [0, 1, 2, 3, 4, 5]
    assert scanned["head/fc BIAS"].tolist() == [7, 8]


def test_new_values_are_written(layer: Any) -> None:
    kernel = torch.arange(6.0) * 10
    network().point({"head/fc KERNEL": kernel})
    assert layer.kernel.read() == [0, 10, 20, 30, 40, 50]
    assert layer.kernel.kind == "trt of torch.float32"
    assert layer.bias is BIAS


@pytest.mark.usefixtures("layer")
def test_without_the_plugin_nobody_sees_them() -> None:
    assert network(no_plugins={"example"}).slots == ()
