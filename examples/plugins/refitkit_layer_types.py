import refitkit
from refitkit.model import LayerType


class OldLayers:
    """A type of layer that TensorRT had before version 10."""

    name = "old-layers"

    @refitkit.hookimpl
    def refitkit_layer_types(self):
        weights = (("kernel", "KERNEL"), ("bias", "BIAS"))
        return [
            LayerType(name="FULLY_CONNECTED", interface="IFullyConnectedLayer", weights=weights)
        ]

    @refitkit.hookimpl
    def refitkit_load_module(self, target, tools):
        if target == "which layers?":
            print(*sorted(tools.layer_types))


pipeline = refitkit.Pipeline(plugins=[OldLayers()])
try:
    pipeline.load("which layers?")
except refitkit.UnsupportedTargetError:
    pass  # it is no module
# CONSTANT CONVOLUTION DECONVOLUTION FULLY_CONNECTED SCALE
