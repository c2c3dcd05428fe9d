"""Real targets of torch_tensorrt, made without a GPU.

Lowering, partitioning, networks and engine bytes are upstream's own. What needs a GPU is the engine
object alone: doubles stand for it, below upstream's class for the Python runtime (all its code runs
but ``_setup_engine``), beside it for the C++ runtime, whose class cannot be made here.
"""

from __future__ import annotations

import base64
import copy
import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

ENGINES = ("_run_on_acc_0", "_run_on_acc_2")
TORCH_PART = "_run_on_gpu_1"
REFUSED = b"refused by the runtime"


class Model(torch.nn.Module):
    """Two engines, with something in between that torch executes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.scale = torch.nn.Parameter(torch.full((4,), 2.0))
        self.b = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of two rows of four."""
        return self.b(torch.cumsum(self.a(x) * self.scale, 1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Parts:
    """A partitioned model and the real engines of its parts.

    Attributes:
        module: Partitioned; its children are graphs.
        engine_bytes: By name of the child.
        names: Names of inputs and of outputs, by name of the child.
    """

    module: torch.fx.GraphModule
    engine_bytes: dict[str, bytes]
    names: dict[str, tuple[list[str], list[str]]]


def upstream_part(name: str) -> Any:
    """A module of torch_tensorrt, which is imported already."""
    return importlib.import_module(f"torch_tensorrt.{name}")


def compilation_settings(torch_tensorrt: Any, **options: Any) -> Any:
    """Settings as a refittable compilation has them."""
    fields = {"device": torch_tensorrt.Device("cuda:0"), "immutable_weights": False} | options
    return upstream_part("dynamo._settings").CompilationSettings(**fields)


def build_parts(torch_tensorrt: Any) -> Parts:
    """Lower, partition and build, as ``torch_tensorrt.dynamo.compile`` does."""
    executed = {"torch.ops.aten.mul.Tensor", "torch.ops.aten.cumsum.default"}
    settings = compilation_settings(torch_tensorrt, min_block_size=1, torch_executed_ops=executed)
    torch.manual_seed(0)
    program = torch.export.export(Model().eval(), (torch.ones(2, 4),))
    module = _partition(_lower(program, settings), settings)
    engine_bytes, names = {}, {}
    for name in ENGINES:
        part = getattr(module, name)
        interpreter = _interpreted(part, settings)
        config = interpreter.builder.create_builder_config()
        built = interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
        engine_bytes[name] = bytes(built)
        names[name] = (list(interpreter._input_names), list(interpreter._output_names))
        _node(module, name).meta["val"] = _outputs(part)
    return Parts(module, engine_bytes, names)


def _lower(program: Any, settings: Any) -> Any:
    lowering = upstream_part("dynamo.lowering")
    table = lowering.get_decompositions(
        settings.enable_experimental_decompositions,
        settings.decompose_attention,
        settings.use_distributed_mode_trace,
        use_fp32_acc=settings.use_fp32_acc,
    )
    program = lowering.pre_export_lowering(program, settings).run_decompositions(table)
    return lowering.post_lowering(program.module(), settings)


def _partition(module: Any, settings: Any) -> Any:
    upstream_part("dynamo.conversion").DYNAMO_CONVERTERS.set_compilation_settings(settings)
    partitioned, _ = upstream_part("dynamo.partitioning").fast_partition(
        module,
        min_block_size=settings.min_block_size,
        torch_executed_ops=settings.torch_executed_ops,
    )
    return partitioned


def _interpreted(part: Any, settings: Any) -> Any:
    conversion = upstream_part("dynamo.conversion._conversion")
    inputs = upstream_part("dynamo.partitioning").construct_submodule_inputs(part)
    interpreter = upstream_part("dynamo.conversion._TRTInterpreter").TRTInterpreter(
        part,
        inputs,
        output_dtypes=conversion.infer_module_output_dtypes(part),
        compilation_settings=settings,
    )
    interpreter._construct_trt_network_def()
    return interpreter


def _node(module: torch.fx.GraphModule, name: str) -> torch.fx.Node:
    return next(node for node in module.graph.nodes if node.target == name)


def _outputs(part: torch.fx.GraphModule) -> list[Any]:
    (output,) = (node for node in part.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.all_input_nodes]


def compiled(parts: Parts, settings: Any, **different: Any) -> torch.fx.GraphModule:
    """A compiled module, as ``torch_tensorrt.dynamo.compile`` returns it.

    Args:
        parts: What it is made of.
        settings: Of its engines.
        different: Other settings for engines of these names.
    """
    runtime = upstream_part("dynamo.runtime")
    module = copy.deepcopy(parts.module)
    for name in ENGINES:
        inputs, outputs = parts.names[name]
        child = runtime.TorchTensorRTModule(
            parts.engine_bytes[name],
            list(inputs),
            list(outputs),
            name=name,
            settings=different.get(name, settings),
        )
        setattr(module, name, child)
    return module


class CudaEngine:
    """Stands for an ``ICudaEngine``: knows what it was deserialized from."""

    def __init__(self, engine_bytes: bytes) -> None:
        if engine_bytes == REFUSED:
            raise RuntimeError("Unable to deserialize the TensorRT engine")
        self.engine_bytes = engine_bytes


class CppEngine(OpaqueBase):  # type: ignore[misc]
    """Stands for ``torch.classes.tensorrt.Engine``."""

    def __init__(self, fields: Sequence[Any]) -> None:
        self.fields = list(fields)
        self.cuda = CudaEngine(self.fields[3])
        self.unowned = False
        self.requires_native_multidevice = False
        self.use_pre_allocated_outputs = False
        self.graphs_dropped = 0

    def _type(self) -> Any:
        class Kind:
            @staticmethod
            def qualified_name() -> str:
                return "__torch__.torch.classes.tensorrt.Engine"

        return Kind()

    def __getstate__(self) -> tuple[list[Any], str]:
        fields = list(self.fields)
        fields[3] = base64.b64encode(fields[3]).decode()
        return (fields, "__torch__.torch.classes.tensorrt.Engine")

    def __deepcopy__(self, memo: dict[int, Any]) -> CppEngine:
        return CppEngine(copy.deepcopy(self.fields, memo))

    def are_output_tensors_unowned(self) -> bool:
        return self.unowned

    def set_output_tensors_as_unowned(self, unowned: bool) -> None:
        self.unowned = unowned

    def reset_captured_graph(self) -> None:
        self.graphs_dropped += 1

    def update_runtime_settings(self, *_: Any, **__: Any) -> None:
        pass


@functools.cache
def _engine_double() -> type:
    class EngineDouble(upstream_part("dynamo.runtime._TRTEngine").TRTEngine):  # type: ignore[misc]
        """Upstream's Python engine, but for the deserialized engine."""

        def _setup_engine(self) -> None:
            self.cuda_engine = CudaEngine(self.serialized_engine)
            self.output_shapes = [(2, 4)]
            self.output_dtypes = [torch.float32]

    EngineDouble.__module__, EngineDouble.__qualname__ = __name__, "EngineDouble"
    globals()["EngineDouble"] = EngineDouble
    _admit_in_programs(EngineDouble)
    return EngineDouble


def _admit_in_programs(double: type) -> None:
    """Let torch keep a double among the constants of a program, as it keeps real engines."""
    register_opaque_type(double, typ="reference")


_admit_in_programs(CppEngine)


def use_runtime(patch: pytest.MonkeyPatch, torch_tensorrt: Any, runtime: str) -> None:
    """Have upstream's children make doubles for a runtime, ``python`` or ``cpp``."""
    child = upstream_part("dynamo.runtime._TorchTensorRTModule")
    features = torch_tensorrt.ENABLED_FEATURES._replace(torch_tensorrt_runtime=runtime == "cpp")
    device = "0%9%0%0%Double"
    patch.setattr(torch_tensorrt, "ENABLED_FEATURES", features)
    patch.setattr(child, "ENABLED_FEATURES", features)
    patch.setattr(child, "serialize_device_info", lambda _: device)
    patch.setattr(torch_tensorrt.Device, "_to_serialized_rt_device", lambda _: device)
    patch.setattr(torch.cuda, "default_stream", lambda _=None: None)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(upstream_part("dynamo.runtime._TRTEngine"), "TRTEngine", _engine_double())
    patch.setattr(torch.classes.tensorrt, "Engine", CppEngine)
