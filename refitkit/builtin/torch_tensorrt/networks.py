"""A part as a TensorRT network, and the weights in its layers.

The interpreter records most weights that it adds, by the name that the engine will give them
(``ConversionContext.record_weight``); a scan of the layers finds all, by the registered layer
types. Where both know a weight they have to agree, bit for bit. The scan is what counts: 2.14
records transposed convolutions under the names of convolutions, and converters in ``cat``,
``shuffle`` and ``shape`` add constants that they do not record.
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

from refitkit.builtin.torch_tensorrt.refitter import fact_of_trt, torch_name
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
    """Where one weight is in a network.

    Attributes:
        layer: The layer, as the class that gives access to its weights.
        attribute: The attribute that holds it.
        kind: Its ``tensorrt.DataType``.
        count: Number of its elements, as TensorRT counts them.
    """

    layer: Any
    attribute: str
    kind: Any
    count: int


class Network:
    """One part as a network definition, with the tensors that its layers point to.

    Attributes:
        recorded: Weights that the interpreter recorded, by engine weight name.
        scanned: Weights found in the layers, by engine weight name; flat.
        origins: Where they come from, if a recording ran.
        layer_types: Names of the layer types that hold them.
    """

    def __init__(
        self,
        part: ProgramPart,
        settings: Any,
        layer_types: Mapping[str, LayerType],
        tape: Tape | None = None,
    ) -> None:
        """Interpret a part: once, as another time it would give other names.

        ``get_node_name`` (``converter_utils.py``, 2.11 to 2.14) takes an item off a node's stack of
        modules whenever it is called.

        Args:
            part: The part.
            settings: A ``torch_tensorrt.dynamo.CompilationSettings``.
            layer_types: Layer types that hold weights.
            tape: The recording that runs, to learn where weights come from.

        Raises:
            CompileError: The interpreter failed.
            NotRefittableError: Two weights have one name, or recorded and found ones differ.
        """
        self._name = part.name
        self._interpreter = _interpreted(part, settings)
        with nullcontext() if tape is None else tape.paused():
            self._read(layer_types, tape)

    def _read(self, layer_types: Mapping[str, LayerType], tape: Tape | None) -> None:
        self.recorded: dict[str, torch.Tensor] = dict(self._interpreter.ctx.weight_refit_map)
        self._places: dict[str, WeightLocation] = {}
        self.scanned: dict[str, torch.Tensor] = {}
        self.layer_types: set[str] = set()
        problems = list(self._scan(layer_types))
        self.origins = {} if tape is None else self._origins(tape)
        owned = self._own_scattered()
        problems += self._differences()
        self._own_all(owned)
        if problems:
            raise NotRefittableError(
                f"Weights of {self._name!r} cannot be told apart by the names that TensorRT gives.",
                problems=problems,
            )

    def _scan(self, layer_types: Mapping[str, LayerType]) -> Iterator[Problem]:
        import tensorrt  # noqa: PLC0415 - imported by whoever calls this

        network = self._interpreter.ctx.net
        for index in range(network.num_layers):
            layer = network[index]
            found = layer_types.get(layer.type.name)
            if found is None:
                continue
            layer.__class__ = getattr(tensorrt, found.interface)
            for attribute, role in found.weights:
                name = f"{layer.name} {role}"
                held = getattr(layer, attribute)
                value = tensor_of(held)
                if not value.numel():
                    continue
                if name in self.scanned:
                    yield Problem(name, "two weights of one name")
                self.scanned[name] = value
                self.layer_types.add(found.name)
                self._places[name] = _place(layer, attribute, held, value)

    def _origins(self, tape: Tape) -> dict[str, Origin]:
        """Where weights come from: what was recorded, or what lies where a layer reads."""
        found: dict[str, Origin] = {}
        for name, value in self.scanned.items():
            recorded = self.recorded.get(name)
            fits = recorded is not None and (recorded.dtype, recorded.numel()) == (
                value.dtype,
                value.numel(),
            )
            found[name] = (
                tape.origin_of(recorded) if recorded is not None and fits else tape.origin_at(value)
            )
        return found

    def _own_scattered(self) -> frozenset[str]:
        """Point layers whose weight was not contiguous to a copy that lives.

        ``to_trt_weights`` (``converter_utils.py``, 2.11 to 2.14) hands out the address of a
        contiguous copy that nobody keeps.
        """
        copies = {
            name: value.detach().cpu().contiguous().reshape(-1)
            for name, value in self.recorded.items()
            if name in self.scanned and not value.is_contiguous()
        }
        alike = {
            name: copy
            for name, copy in copies.items()
            if (copy.dtype, copy.numel()) == (self.scanned[name].dtype, self.scanned[name].numel())
        }
        self.point(alike)
        return frozenset(alike)

    def _own_all(self, owned: Collection[str]) -> None:
        """Have values live without the network: those that were recorded own their memory.

        Args:
            owned: Slots whose values own theirs already; their layers read it, so it has to stay.
        """
        for name, value in self.scanned.items():
            if name in owned:
                continue
            recorded = self.recorded.get(name)
            fits = recorded is not None and recorded.is_contiguous() and not recorded.is_cuda
            self.scanned[name] = (
                recorded.detach().reshape(-1) if recorded is not None and fits else value.clone()
            )

    def _differences(self) -> Iterator[Problem]:
        for name in self.recorded.keys() & self.scanned:
            recorded = self.recorded[name].detach().cpu().reshape(-1)
            if not same_bits(recorded.contiguous(), self.scanned[name]):
                yield Problem(name, "recorded with another value than its layer has")

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
        """Have layers read these values from now on, without a copy.

        Args:
            values: Flat contiguous tensors by slot name, of the slots' dtypes and counts; they
                have to live until other values are pointed to.

        Raises:
            KeyError: There is no such slot.
            CompileError: TensorRT does not take one.
        """
        import tensorrt  # noqa: PLC0415 - imported by whoever calls this

        with raised_as(CompileError, "TensorRT does not take these weights"):
            for name, value in values.items():
                place = self._places[name]
                weights = tensorrt.Weights(place.kind, value.data_ptr(), place.count)
                setattr(place.layer, place.attribute, weights)
                self.scanned[name] = value

    def build(self) -> bytes:
        """Engine bytes of the network as it is.

        After a build that fails this process cannot build again: build in a process that can be
        thrown away.

        Raises:
            CompileError: TensorRT refused the network.
        """
        with raised_as(CompileError, f"TensorRT cannot build {self._name!r}"):
            config = self._interpreter._populate_trt_builder_config()  # noqa: SLF001 - as upstream
            plan = self._interpreter.builder.build_serialized_network(
                self._interpreter.ctx.net, config
            )
        if plan is None:
            raise CompileError(f"TensorRT cannot build {self._name!r}; it wrote why to its log.")
        return bytes(plan)


def _interpreted(part: ProgramPart, settings: Any) -> Any:
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


def _place(layer: Any, attribute: str, held: Any, value: torch.Tensor) -> WeightLocation:
    """Where a weight is; what NumPy gave has lost TensorRT's own dtype and has none to lose."""
    import tensorrt  # noqa: PLC0415 - imported by whoever calls this
    from torch_tensorrt._enums import dtype  # noqa: PLC0415

    if isinstance(held, tensorrt.Weights):
        return WeightLocation(layer, attribute, held.dtype, held.size)
    kind = dtype._from(value.dtype).to(tensorrt.DataType)  # noqa: SLF001 - its only way
    return WeightLocation(layer, attribute, kind, value.numel())


# MERGED weight_memory: Reading weights out of network layers, whatever their dtype.
#
# ``tensorrt`` gives weights as NumPy arrays where NumPy knows the dtype, and else as
# ``tensorrt.Weights``, which tell no address. There the address is read from the object itself: a
# pybind11 instance holds, after its header, a pointer to the C++ value, and ``nvinfer1::Weights``
# is ``{DataType type; void const* values; int64_t count;}`` (``NvInferRuntimeBase.h``). Type and
# count that lie there are compared with what the object says before the address is used.


class _CWeights(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def tensor_of(weights: Any) -> torch.Tensor:
    """A flat view of weights that a layer holds: valid while the layer's memory lives.

    Types with two elements in a byte are given as bytes.

    Args:
        weights: What an attribute of a layer gave: a NumPy array or ``tensorrt.Weights``.

    Raises:
        EngineError: This build of tensorrt keeps its weights in another way.
    """
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(weights).reshape(-1)
    dtype = torch_dtype_of(weights.dtype)
    if not weights.size:
        return torch.empty(0, dtype=dtype)
    count = fact_of_trt("", weights.dtype, weights.size).count
    # its own nbytes is 2**64 minus the count for types of four bits (tensorrt_rtx 1.6.1)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(_address(weights))
    return torch.frombuffer(raw, dtype=dtype)


def torch_dtype_of(kind: Any) -> torch.dtype:
    """Torch's dtype for a ``tensorrt.DataType``; ``uint8`` for those with two elements in a byte.

    Raises:
        EngineError: torch has none.
    """
    name = torch_name(kind.name)
    if name is None:
        raise EngineError(f"torch has no dtype for TensorRT's {kind.name}.")
    return dtype_of(name)


def _address(weights: Any) -> int:
    value = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    if value is None:
        raise _unknown_layout()
    found = _CWeights.from_address(value)
    if (found.type, found.count) != (int(weights.dtype), weights.size) or not found.values:
        raise _unknown_layout()
    return int(found.values)


def _unknown_layout() -> EngineError:
    return EngineError("This build of tensorrt keeps weights of networks in a way unknown to us.")


# MERGED torch_tensors: The tensors that a part holds which torch runs.


class TorchTensors:
    """Parameters, buffers and constants of one part.

    Attributes:
        scanned: Their values by name; flat and contiguous.
        origins: Where they come from, if a recording ran.
        layer_types: Always empty: it has no layers.
    """

    layer_types: frozenset[str] = frozenset()

    def __init__(self, name: str, module: GraphModule, tape: Tape | None = None) -> None:
        """Read a part."""
        self._name = name
        held = tensors_in(module)
        self.origins: dict[str, Origin] = (
            {} if tape is None else {name: tape.origin_of(value) for name, value in held.items()}
        )
        self._shapes = {target: tuple(tensor.shape) for target, tensor in held.items()}
        self.scanned: dict[str, torch.Tensor] = {
            target: tensor.detach().contiguous().reshape(-1) for target, tensor in held.items()
        }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of them as slots."""
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
        """Take other values, without a copy."""
        self.scanned.update(values)


def tensor_in(module: GraphModule, name: str) -> torch.Tensor:
    """One of ``tensors_in``: its name is a path of attributes, and no graph has to be walked.

    Raises:
        KeyError: There is none of this name.
    """
    try:
        value = attrgetter(name)(module)
    except AttributeError:  # a hook of the module's state_dict may have names of its own
        return tensors_in(module)[name]
    if not isinstance(value, torch.Tensor):
        raise KeyError(name)
    return value


def tensors_in(module: GraphModule) -> dict[str, torch.Tensor]:
    """Tensors that the graph of a module reads, by name, and those of its state_dict."""
    found: dict[str, torch.Tensor] = dict(module.state_dict())
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(node.target)(module)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found
