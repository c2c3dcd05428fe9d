"""A plugin for refitkit: a mapper for the weights of an op of its own, and a layer type."""

from refitkit.hookspecs import hookimpl
from refitkit.model import LayerType
from refitkit.protocols import MappingStrategy


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Offer the mapper; it is imported now, and torch with it."""
    from refitkit_example.mapper import GateStrategy

    return [GateStrategy()]


@hookimpl
def refitkit_layer_types() -> list[LayerType]:
    """Offer a type of layer that TensorRT had before version 10."""
    roles = (("kernel", "KERNEL"), ("bias", "BIAS"))
    return [LayerType(name="FULLY_CONNECTED", interface="IFullyConnectedLayer", weights=roles)]
