"""A part as a TensorRT network, and the weights in its layers.

:class:`Network` interprets an accelerated part and finds its weights in two ways. The interpreter
records most of the weights that it adds, under the names in the engine
(``ConversionContext.record_weight``). A scan of the layers finds all weights, by the registered
layer types. The two must agree in every bit if both have a weight. The scan decides, for two
reasons: 2.14 records transposed convolutions under the names of convolutions, and the converters in
``cat``, ``shuffle`` and ``shape`` add constants without recording them.

:class:`TorchTensors` offers the same interface for a part that torch runs.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refitkit.builtin.torch_tensorrt.refitter import spec_of_trt, torch_name
from refitkit.errors import CompileError, EngineError, NotRefittableError, Problem, raised_as
from refitkit.model import Slot
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch.fx import GraphModule

    from refitkit.builtin.torch_tensorrt.parts import ProgramPart
    from refitkit.model import LayerType
    from refitkit.recipe import Tape
    from refitkit.recipe.origins import Origin


@dataclass(frozen=True)
class WeightLocation:
    """The location of one weight in a network.

    Attributes:
        layer: The layer, with a class that has the weight's attribute.
        attribute: Name of the attribute.
        kind: The weight's ``tensorrt.DataType``.
        count: Number of elements, as TensorRT counts them.
    """

    layer: Any
    attribute: str
    kind: Any
    count: int


class Network:
    """One part as a network definition, with the tensors that its layers read.

    Attributes:
        recorded: Weights that the interpreter recorded, by engine weight name.
        scanned: Weights that the layers have, by engine weight name; flat.
        origins: Origins of the weights by engine weight name; empty without a recording.
        layer_types: Names of the layer types that have the weights.
    """

    def __init__(
        self,
        part: ProgramPart,
        settings: Any,
        layer_types: Mapping[str, LayerType],
        tape: Tape | None = None,
    ) -> None:
        """Interpret a part.

        A part must be interpreted only once, because a second run gives other names:
        ``get_node_name`` (``converter_utils.py``, 2.11 to 2.14) removes an item from a node's
        module stack in every call.

        Args:
            part: The accelerated part.
            settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
            layer_types: Layer types with weights, by name.
            tape: The active recording, to find the origins of the weights; None without one.

        Raises:
            CompileError: The interpreter failed.
            NotRefittableError: Two weights have one name, or a recorded weight differs from its
                layer.
        """
        self._name = part.name
        self._interpreter = _interpret(part, settings)
        # copies and comparisons of values are not ops that a recipe has to repeat
        with nullcontext() if tape is None else tape.paused():
            self._read(layer_types, tape)

    def _read(self, layer_types: Mapping[str, LayerType], tape: Tape | None) -> None:
        self.recorded: dict[str, torch.Tensor] = dict(self._interpreter.ctx.weight_refit_map)
        self._locations: dict[str, WeightLocation] = {}
        self.scanned: dict[str, torch.Tensor] = {}
        self.layer_types: set[str] = set()
        problems = list(self._scan(layer_types))
        self.origins = {} if tape is None else self._origins(tape)
        # before values are compared: the memory of these layers may be freed already
        owned = self._copy_noncontiguous()
        problems += self._differences()
        self._own_values(owned)
        if problems:
            raise NotRefittableError(
                f"TensorRT's names do not identify the weights of {self._name!r}.",
                problems=problems,
            )

    def _scan(self, layer_types: Mapping[str, LayerType]) -> Iterator[Problem]:
        import tensorrt  # noqa: PLC0415 - takes seconds to import

        network = self._interpreter.ctx.net
        for index in range(network.num_layers):
            layer = network[index]
            found = layer_types.get(layer.type.name)
            if found is None:
                continue
            # ``network[i]`` is an ``ILayer``, and only the subclass has the weights' attributes
            layer.__class__ = getattr(tensorrt, found.interface)
            for attribute, role in found.weights:
                name = f"{layer.name} {role}"
                weights = getattr(layer, attribute)
                value = tensor_of(weights)
                if not value.numel():  # an optional weight that the layer does not use
                    continue
                if name in self.scanned:
                    yield Problem(name, "two weights with one name")
                self.scanned[name] = value
                self.layer_types.add(found.name)
                self._locations[name] = _location_of(layer, attribute, weights, value)

    def _origins(self, tape: Tape) -> dict[str, Origin]:
        """Origins of the weights, from the recorded tensors or else from the layers' memory."""
        found: dict[str, Origin] = {}
        for name, value in self.scanned.items():
            recorded = self.recorded.get(name)
            matches = recorded is not None and (recorded.dtype, recorded.numel()) == (
                value.dtype,
                value.numel(),
            )
            found[name] = (
                tape.origin_of(recorded)
                if recorded is not None and matches
                else tape.origin_at(value)
            )
        return found

    def _copy_noncontiguous(self) -> frozenset[str]:
        """Make layers read a copy that stays alive, if their weight is not contiguous.

        ``to_trt_weights`` (``converter_utils.py``, 2.11 to 2.14) passes the address of a contiguous
        copy to the layer and then drops the copy.

        Returns:
            Names of the weights that were copied.
        """
        copies = {
            name: value.detach().cpu().contiguous().reshape(-1)
            for name, value in self.recorded.items()
            if name in self.scanned and not value.is_contiguous()
        }
        matching = {
            name: copy
            for name, copy in copies.items()
            if (copy.dtype, copy.numel()) == (self.scanned[name].dtype, self.scanned[name].numel())
        }
        self.point(matching)
        return frozenset(matching)

    def _own_values(self, owned: Collection[str]) -> None:
        """Make ``scanned`` independent of the network's memory, without a copy if possible.

        Args:
            owned: Slots whose values are independent already. Their layers read these values.
        """
        for name, value in self.scanned.items():
            if name in owned:
                continue
            recorded = self.recorded.get(name)
            # a recorded tensor owns its memory; other values are views of the network's
            matches = recorded is not None and recorded.is_contiguous() and not recorded.is_cuda
            self.scanned[name] = (
                recorded.detach().reshape(-1) if recorded is not None and matches else value.clone()
            )

    def _differences(self) -> Iterator[Problem]:
        for name in self.recorded.keys() & self.scanned:
            recorded = self.recorded[name].detach().cpu().reshape(-1)
            if not same_bits(recorded.contiguous(), self.scanned[name]):
                yield Problem(name, "the recorded value differs from the layer's value")

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All weights as slots, in the order of the layers."""
        return tuple(self._slot(name, value) for name, value in self.scanned.items())

    def _slot(self, name: str, value: torch.Tensor) -> Slot:
        return Slot(
            engine=self._name,
            name=name,
            dtype=dtype_name(value.dtype),
            shape=self._shape(name, value),
            count=value.numel(),
            readable=True,
        )

    def _shape(self, name: str, value: torch.Tensor) -> tuple[int, ...] | None:
        recorded = self.recorded.get(name)
        if recorded is None or prod(recorded.shape) != value.numel():
            return None
        return tuple(recorded.shape)

    def point(self, values: Mapping[str, torch.Tensor]) -> None:
        """Make layers read these values from now on, without a copy.

        Args:
            values: Flat contiguous tensors by slot name, with the dtypes and counts of the slots.
                They must stay alive until the next call with the same slots.

        Raises:
            KeyError: A slot does not exist.
            CompileError: TensorRT refuses a value.
        """
        import tensorrt  # noqa: PLC0415 - takes seconds to import

        with raised_as(CompileError, "TensorRT refuses the weights"):
            for name, value in values.items():
                location = self._locations[name]
                weights = tensorrt.Weights(location.kind, value.data_ptr(), location.count)
                setattr(location.layer, location.attribute, weights)
                # this also keeps the tensor alive: the layer has no more than its address
                self.scanned[name] = value

    def build(self) -> bytes:
        """Build the network and return the engine bytes.

        After a failed build a process cannot build again, so build in a process of its own.

        Raises:
            CompileError: TensorRT cannot build the network.
        """
        with raised_as(CompileError, f"TensorRT cannot build {self._name!r}"):
            config = self._interpreter._populate_trt_builder_config()  # noqa: SLF001 - as upstream
            plan = self._interpreter.builder.build_serialized_network(
                self._interpreter.ctx.net, config
            )
        if plan is None:
            raise CompileError(f"TensorRT cannot build {self._name!r}; its log has the reason.")
        return bytes(plan)


def _interpret(part: ProgramPart, settings: Any) -> Any:
    from torch_tensorrt.dynamo.conversion._conversion import (  # noqa: PLC0415
        infer_module_output_dtypes,
    )
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter  # noqa: PLC0415

    with torch.no_grad(), raised_as(CompileError, f"Torch-TensorRT cannot convert {part.name!r}"):
        dtypes = infer_module_output_dtypes(part.module, truncate_double=settings.truncate_double)
        interpreter = TRTInterpreter(
            part.module, part.inputs, output_dtypes=dtypes, compilation_settings=settings
        )
        interpreter._construct_trt_network_def()  # noqa: SLF001 - as upstream's _refit.py
    return interpreter


def _location_of(layer: Any, attribute: str, weights: Any, value: torch.Tensor) -> WeightLocation:
    """The location of a weight.

    NumPy arrays do not have TensorRT's dtype, so it is derived from torch's: each dtype of NumPy
    has exactly one counterpart.
    """
    import tensorrt  # noqa: PLC0415 - takes seconds to import
    from torch_tensorrt._enums import dtype  # noqa: PLC0415

    if isinstance(weights, tensorrt.Weights):
        return WeightLocation(layer, attribute, weights.dtype, weights.size)
    kind = dtype._from(value.dtype).to(tensorrt.DataType)  # noqa: SLF001 - there is no public way
    return WeightLocation(layer, attribute, kind, value.numel())


# -- memory of weights ---------------------------------------------------------------------------

# ``tensorrt`` returns weights as NumPy arrays if NumPy has the dtype, else as ``tensorrt.Weights``.
# The latter has no address in Python, so ``_address_of`` reads it from the object's own memory.


class _CWeights(ctypes.Structure):
    """``nvinfer1::Weights`` of ``NvInferRuntimeBase.h``: dtype, pointer, number of elements."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def tensor_of(weights: Any) -> torch.Tensor:
    """A flat view of a layer's weights, valid as long as the layer's memory.

    4-bit types are returned as bytes with two elements each.

    Args:
        weights: Value of a layer's attribute: a NumPy array or ``tensorrt.Weights``.

    Raises:
        EngineError: This build of tensorrt stores weights in an unknown layout.
    """
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(weights).reshape(-1)
    dtype = torch_dtype_of(weights.dtype)
    if not weights.size:
        return torch.empty(0, dtype=dtype)
    count = spec_of_trt("", weights.dtype, weights.size).count
    # weights.nbytes is wrong for 4-bit types: 2**64 minus the count (tensorrt_rtx 1.6.1)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(_address_of(weights))
    return torch.frombuffer(raw, dtype=dtype)


def torch_dtype_of(kind: Any) -> torch.dtype:
    """Torch's dtype for a ``tensorrt.DataType``; ``uint8`` for 4-bit types.

    Raises:
        EngineError: torch has no dtype for it.
    """
    name = torch_name(kind.name)
    if name is None:
        raise EngineError(f"torch has no dtype for TensorRT's {kind.name}.")
    return dtype_of(name)


def _address_of(weights: Any) -> int:
    # a pybind11 instance has a pointer to its C++ value right after the Python object header
    value = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    if value is None:
        raise _unknown_layout_error()
    found = _CWeights.from_address(value)
    # guards against another layout: both values are known from the public attributes
    if (found.type, found.count) != (int(weights.dtype), weights.size) or not found.values:
        raise _unknown_layout_error()
    return int(found.values)


def _unknown_layout_error() -> EngineError:
    return EngineError("This build of tensorrt stores weights in an unknown layout.")


# -- parts that torch runs -----------------------------------------------------------------------


class TorchTensors:
    """Parameters, buffers and constants of one part that torch runs.

    Attributes:
        scanned: Values by name; flat and contiguous.
        origins: Origins of the values by name; empty without a recording.
        layer_types: Always empty, because the part has no layers.
    """

    layer_types: frozenset[str] = frozenset()

    def __init__(self, name: str, module: GraphModule, tape: Tape | None = None) -> None:
        """Read the tensors of a part.

        Args:
            name: Name of the part.
            module: The part.
            tape: The active recording, to find the origins of the values; None without one.
        """
        self._name = name
        tensors = tensors_in(module)
        self.origins: dict[str, Origin] = (
            {} if tape is None else {name: tape.origin_of(value) for name, value in tensors.items()}
        )
        self._shapes = {target: tuple(tensor.shape) for target, tensor in tensors.items()}
        self.scanned: dict[str, torch.Tensor] = {
            target: tensor.detach().contiguous().reshape(-1) for target, tensor in tensors.items()
        }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All tensors as slots."""
        return tuple(
            Slot(
                engine=self._name,
                name=name,
                dtype=dtype_name(value.dtype),
                shape=self._shapes[name],
                count=value.numel(),
                readable=True,
            )
            for name, value in self.scanned.items()
        )

    def point(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace values by these tensors, without a copy."""
        self.scanned.update(values)


def tensor_in(module: GraphModule, name: str) -> torch.Tensor:
    """One tensor of ``tensors_in``, without walking the graph.

    Args:
        module: The part.
        name: Path of attributes to the tensor.

    Raises:
        KeyError: There is no such tensor.
    """
    try:
        value = attrgetter(name)(module)
    except AttributeError:  # a state_dict hook can rename tensors
        return tensors_in(module)[name]
    if not isinstance(value, torch.Tensor):
        raise KeyError(name)
    return value


def tensors_in(module: GraphModule) -> dict[str, torch.Tensor]:
    """Tensors that the module's graph reads, and those of its state_dict, by name."""
    found: dict[str, torch.Tensor] = dict(module.state_dict())
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(node.target)(module)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found
