"""Convert a program into an OpenVINO model whose weights are inputs.

OpenVINO folds and merges constants while it converts, so a constant of the model need not be a
weight of the program any more. An input stays an input. So the program is exported once more, with
its weights as inputs, and each input of the model is the weight of the same name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from refitkit import CompileError, NotRefittableError, Problem
from refitkit.model import Slot
from refitkit.program import facts_of
from refitkit.program.liveness import mutated_placeholders
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from refitkit_openvino.engine import ENGINE
from refitkit_openvino.graph import Graph, Manifest, Options, TensorSpec, load_openvino

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram
    from torch.fx import Node

INPUT = "input "
"""Begins the names of inputs of a call. No FQN begins so."""

_ELEMENT_TYPES = {
    "float64": {"f64"},
    "float32": {"f32"},
    "float16": {"f16"},
    "bfloat16": {"bf16"},
    "int64": {"i64"},
    "int32": {"i32"},
    "int16": {"i16"},
    "int8": {"i8"},
    "uint8": {"u8"},
    "bool": {"boolean", "i8", "u8"},
}
"""Element types of OpenVINO that hold the bits of a dtype of torch."""


def convert(program: ExportedProgram, options: Options) -> Graph:
    """Return the program as a model without weights.

    Raises:
        CompileError: OpenVINO cannot convert the program, or calls have inputs or outputs that
            this backend does not support.
        NotRefittableError: A weight of the program is not an input of the model.
        ToolchainError: OpenVINO is not installed.
    """
    ov = load_openvino()
    tensors = _inputs_of(program)
    outputs = _outputs_of(program)
    try:
        opened = _with_weights_as_inputs(program)
        model = ov.convert_model(opened)
    except Exception as exc:
        reason = str(exc).strip().partition("\n")[0]
        raise CompileError(f"OpenVINO cannot convert the program: {reason}") from exc
    names = [spec.arg.name for spec in opened.graph_signature.input_specs]
    # A weight that the model does not read has no slot. refitkit refuses that if answers need it.
    read = match(model, dict(zip(names, tensors, strict=True)))
    for tensor, port in zip(outputs, model.outputs, strict=True):
        _check_type(tensor, port, CompileError)
        if port.get_partial_shape() != ov.PartialShape(list(tensor.shape)):
            problems = [
                Problem(tensor.name, "shape", str(port.get_partial_shape()), str(tensor.shape))
            ]
            raise CompileError("OpenVINO gave an output another shape.", problems=problems)
    weights = [spec for spec in tensors if not spec.name.startswith(INPUT)]
    manifest = Manifest(
        slots=tuple(_slot(spec) for spec in weights if spec.name in read),
        inputs=tuple(tensors[len(weights) :]),
        outputs=tuple(outputs),
        in_spec=pytree.treespec_dumps(program.call_spec.in_spec),
        out_spec=pytree.treespec_dumps(program.call_spec.out_spec),
        fingerprint=facts_of(program).graph,
        options=options,
        versions={"openvino": ov.__version__, "torch": torch.__version__},
    )
    with tempfile.TemporaryDirectory() as folder:
        xml, constants = Path(folder, "model.xml"), Path(folder, "model.bin")
        ov.serialize(model, xml, constants)
        return Graph(manifest, xml.read_bytes(), constants.read_bytes())


def match(model: Any, tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Give each input of a model the name and the shape of its tensor in the program.

    Args:
        model: The converted model. It is changed.
        tensors: Weights and inputs of the program, by their names in the model.

    Returns:
        Names of the tensors that the model reads. It has no other inputs any more.

    Raises:
        NotRefittableError: An input of the model is no tensor of the program.
    """
    ov = load_openvino()
    parameters = {one.get_friendly_name(): one for one in model.get_parameters()}
    if unknown := sorted(parameters.keys() - tensors.keys()):
        raise NotRefittableError(
            "OpenVINO gave the model inputs that cannot be matched with tensors of the program.",
            problems=[Problem(name, "unknown input") for name in unknown],
            hint="No option helps. Compile the program with another backend.",
        )
    shapes = {}
    for name, parameter in parameters.items():
        _check_type(tensors[name], parameter.output(0), NotRefittableError)
        parameter.set_friendly_name(tensors[name].name)
        shapes[parameter.output(0)] = ov.PartialShape(list(tensors[name].shape))
    model.reshape(shapes)
    for parameter in parameters.values():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    return {one.get_friendly_name() for one in model.get_parameters()}


class _Open(torch.nn.Module):
    """The graph of a program, called with all of its weights."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.graph(*tensors)


def _with_weights_as_inputs(program: ExportedProgram) -> ExportedProgram:
    """Return the same program, with its weights and then its inputs as inputs."""
    values = [node.meta["val"] for node in _placeholders(program)]
    examples = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]
    return torch.export.export(_Open(program.graph_module), tuple(examples))


def _placeholders(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def _inputs_of(program: ExportedProgram) -> list[TensorSpec]:
    """Return the weights, then the inputs of a call.

    Raises:
        CompileError: Some are no tensors on the CPU of a fixed size, or calls write to them.
    """
    written, specs, problems = mutated_placeholders(program), [], []
    for spec, node in zip(program.graph_signature.input_specs, _placeholders(program), strict=True):
        name, value = spec.target or INPUT + node.name, node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            problems.append(Problem(name, "not a tensor"))
        elif node.name in written:
            problems.append(
                Problem(name, "written by calls", hint="export in eval mode, and return new values")
            )
        elif _varies(value):
            problems.append(Problem(name, "size that varies", str(tuple(value.shape))))
        elif value.device.type != "cpu":
            problems.append(Problem(name, "device", str(value.device), "cpu"))
        else:
            specs.append(_spec(name, value))
    if problems:
        raise CompileError("OpenVINO cannot take the inputs of the program.", problems=problems)
    return specs


def _outputs_of(program: ExportedProgram) -> list[TensorSpec]:
    """Return the outputs of a call.

    Raises:
        CompileError: Some are no tensors, or are new values of inputs.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    specs, problems = [], []
    for number, spec in enumerate(program.graph_signature.output_specs):
        value = values.get(getattr(spec.arg, "name", ""))
        if spec.kind is not OutputKind.USER_OUTPUT or not isinstance(value, torch.Tensor):
            problems.append(Problem(f"output {number}", spec.kind.name, hint="return tensors"))
        elif _varies(value):
            problems.append(
                Problem(f"output {number}", "size that varies", str(tuple(value.shape)))
            )
        else:
            specs.append(_spec(f"output {number}", value))
    if problems:
        raise CompileError("OpenVINO cannot return the program's outputs.", problems=problems)
    return specs


def _varies(value: torch.Tensor) -> bool:
    return not all(isinstance(size, int) for size in value.shape)


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec(name=name, dtype=dtype, shape=tuple(value.shape))


def _slot(spec: TensorSpec) -> Slot:
    return Slot(
        engine=ENGINE,
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        count=torch.Size(spec.shape).numel(),
        readable=True,
    )


def _check_type(
    tensor: TensorSpec, port: Any, error: type[CompileError | NotRefittableError]
) -> None:
    """Check that a port of the model holds the bits of a tensor's dtype."""
    found = port.get_element_type().get_type_name()
    if found not in _ELEMENT_TYPES.get(tensor.dtype, set()):
        problems = [Problem(tensor.name, "dtype", found, tensor.dtype)]
        raise error("OpenVINO gave a tensor another element type.", problems=problems)
