"""Plugin hooks of the backends ``torch_tensorrt`` and ``tensorrt_network``.

Importing this package imports neither torch nor torch_tensorrt: each hook imports its own modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.names import NAME, NETWORK
from refitkit.hookspecs import hookimpl
from refitkit.model import LayerType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import Backend, MappingStrategy, OpenedModule, Tools, Verifier

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
"""Layers of ``tensorrt`` 10 to 11 and of TensorRT-RTX that hold weights; from ``NvInfer.h``."""


@hookimpl
def refitkit_layer_types() -> list[LayerType]:
    """Register the layer types SCALE, CONVOLUTION, DECONVOLUTION and CONSTANT."""
    return list(LAYER_TYPES)


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register the backends ``torch_tensorrt`` and ``tensorrt_network``."""
    from refitkit.builtin.torch_tensorrt.backend import TorchTensorRTBackend
    from refitkit.builtin.torch_tensorrt.network.backend import NetworkBackend

    register(TorchTensorRTBackend())
    register(NetworkBackend())


@hookimpl
def refitkit_load_module(target: object, tools: Tools) -> OpenedModule | None:
    """Open modules and programs with engines, saved files of these, and folders of networks."""
    from refitkit.builtin.torch_tensorrt.module import default_engine_factory, open_target

    factory = default_engine_factory(tools=tools)
    if not isinstance(target, Path):
        return open_target(target, factory)
    from refitkit.builtin.torch_tensorrt.network.backend import open_folder

    opened = open_folder(target, tools)
    return open_target(target, factory) if opened is None else opened


@hookimpl
def refitkit_partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Any] | None:
    """Lower a program and partition it as Torch-TensorRT does; None for other backends."""
    if backend == NETWORK:
        from refitkit.builtin.torch_tensorrt.network.backend import partition

        return partition(program, module, options, tools)
    if backend == NAME:
        from refitkit.builtin.torch_tensorrt.backend import partition_program

        return partition_program(program, module, options, tools)
    return None


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Register the strategies ``name-map`` and ``rebuild``."""
    from refitkit.builtin.torch_tensorrt.name_map import NameMapStrategy
    from refitkit.builtin.torch_tensorrt.rebuild import RebuildStrategy

    return [NameMapStrategy(), RebuildStrategy()]


@hookimpl
def refitkit_verifiers() -> list[Verifier]:
    """Register the verifier ``engine-bytes``."""
    from refitkit.builtin.torch_tensorrt.network.backend import EngineBytesVerifier

    return [EngineBytesVerifier()]
