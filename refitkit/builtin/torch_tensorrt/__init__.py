"""The backends ``torch_tensorrt`` and ``tensorrt_network``.

Importing this package imports neither torch nor torch_tensorrt; the hooks below import what they
need.
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
"""What ``tensorrt`` (10 to 11, and TensorRT-RTX) has: see ``NvInfer.h``."""


@hookimpl
def refitkit_layer_types() -> list[LayerType]:
    """SCALE, CONVOLUTION, DECONVOLUTION, CONSTANT."""
    return list(LAYER_TYPES)


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register ``torch_tensorrt`` and ``tensorrt_network``."""
    from refitkit.builtin.torch_tensorrt.backend import TorchTensorRTBackend
    from refitkit.builtin.torch_tensorrt.network.backend import NetworkBackend

    register(TorchTensorRTBackend())
    register(NetworkBackend())


@hookimpl
def refitkit_load_module(target: object, tools: Tools) -> OpenedModule | None:
    """Open modules and programs that hold engines, files of them, and folders of networks."""
    from refitkit.builtin.torch_tensorrt import module as opening
    from refitkit.builtin.torch_tensorrt.module import default_makers

    makers = default_makers(check_finite=tools.check_finite)
    if not isinstance(target, Path):
        return opening.open_target(target, makers)
    from refitkit.builtin.torch_tensorrt.network import backend

    found = backend.open_folder(target, tools)
    return opening.open_target(target, makers) if found is None else found


@hookimpl
def refitkit_partition(
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    tools: Tools,
) -> Mapping[str, Any] | None:
    """Lower a program and cut it into parts as Torch-TensorRT does."""
    if backend == NETWORK:
        from refitkit.builtin.torch_tensorrt.network.backend import partition

        return partition(program, module, options, tools)
    if backend == NAME:
        from refitkit.builtin.torch_tensorrt.backend import partition as cut_for_target

        return cut_for_target(program, module, options, tools)
    return None


@hookimpl
def refitkit_mapping_strategies() -> list[MappingStrategy]:
    """Offer ``name-map`` and ``rebuild``."""
    from refitkit.builtin.torch_tensorrt.name_map import NameMapStrategy
    from refitkit.builtin.torch_tensorrt.rebuild import RebuildStrategy

    return [NameMapStrategy(), RebuildStrategy()]


@hookimpl
def refitkit_verifiers() -> list[Verifier]:
    """Offer ``engine-bytes``."""
    from refitkit.builtin.torch_tensorrt.network.backend import EngineBytesVerifier

    return [EngineBytesVerifier()]
