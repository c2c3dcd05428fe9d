import torch
from safetensors.torch import load, save

import refitkit
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class Bytes:
    """Receives safetensors as bytes: {"data": ...}."""

    name = "bytes"

    def open(self, init_info, open_weights):
        return self

    def receive(self, update_info):
        yield load(update_info["data"])

    def close(self):
        pass


class BytesPlugin:
    name = "bytes-plugin"

    @refitkit.hookimpl
    def refitkit_weight_transports(self):
        return [Bytes()]


module = planned_module([OpenEngine("model", {"weight": torch.zeros(2)})])
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), BytesPlugin()])
compiled = pipeline.load(module)
receiver = refitkit.WeightReceiver(compiled, transport="bytes")
receiver.start_weight_update("step-1")
receiver.update_weights(data=save({"weight": torch.ones(2)}))
receiver.finish_weight_update()
print(compiled.label, compiled.read("weight"))
# step-1 tensor([1., 1.])
