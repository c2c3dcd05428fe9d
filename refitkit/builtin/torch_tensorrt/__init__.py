"""The backends ``torch_tensorrt`` and ``tensorrt_network``.

Importing this package imports neither torch nor torch_tensorrt; the hooks below import what they
need.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.hookspecs import hookimpl
from refitkit.model import LayerType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import Backend, MappingStrategy, OpenedModule, Tools, Verifier

NAME = "torch_tensorrt"
NETWORK = "tensorrt_network"

LAYER_TYPES = (
    LayerType(
        name="SCALE", interface="IScaleLayer", weights=(("scale", "SCALE"), ("shift", "SHIFT"))
    ),
    LayerType(
        name="CONVOLUTION",
        interface="IConvolutionLayer",
        weights=(("kernel", "KERNEL"), ("bias", "BIAS")),
    ),
    LayerType(
        name="DECONVOLUTION",
        interface="IDeconvolutionLayer",
        weights=(("kernel", "KERNEL"), ("bias", "BIAS")),
    ),
    LayerType(name="CONSTANT", interface="IConstantLayer", weights=(("weights", "CONSTANT"),)),
)
"""What ``tensorrt`` (10 to 11, and TensorRT-RTX) has: see ``NvInfer.h``."""


@hookimpl
def refitkit_layer_types() -> list[LayerType]:
    """SCALE, CONVOLUTION, DECONVOLUTION, CONSTANT."""
    return list(LAYER_TYPES)


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register ``tensorrt_network``."""
    from refitkit.builtin.torch_tensorrt.network.backend import NetworkBackend

    register(NetworkBackend())


@hookimpl
def refitkit_load_module(target: object, tools: Tools) -> OpenedModule | None:
    """Open a folder that a network module was saved to."""
    if not isinstance(target, Path):
        return None
    from refitkit.builtin.torch_tensorrt.network import backend

    return backend.open_folder(target, tools)


@hookimpl
def refitkit_partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Any] | None:
    """Lower a program and cut it into parts as Torch-TensorRT does."""
    if backend != NETWORK:
        return None
    from refitkit.builtin.torch_tensorrt.network.backend import partition

    return partition(program, module, options, tools)


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Offer ``name-map`` and ``rebuild``."""
    from refitkit.builtin.torch_tensorrt.name_map import NameMapStrategy
    from refitkit.builtin.torch_tensorrt.rebuild import RebuildStrategy

    return [NameMapStrategy(), RebuildStrategy()]


@hookimpl
def refitkit_verifiers() -> list[Verifier]:
    """Offer ``engine-bytes``."""
    from refitkit.builtin.torch_tensorrt.network.verifier import EngineBytesVerifier

    return [EngineBytesVerifier()]
