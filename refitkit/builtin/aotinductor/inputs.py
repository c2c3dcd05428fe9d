"""What inputs an engine was compiled for, and how to bring others into that form.

AOTInductor itself believes its inputs: a wrong shape or dtype gives a wrong result or a crash, and
so do strides other than those of the example inputs. So calls are checked first, and tensors with
other strides are copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.utils import _pytree as pytree

from refitkit.errors import InputMismatchError, Problem
from refitkit.model.base import Frozen
from refitkit.program.bits import dense_strides
from refitkit.program.dtypes import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

Dim = Annotated[int, Field(ge=0)]
Primitive = bool | int | float | str | None


class TensorInput(Frozen):
    """One tensor input.

    Attributes:
        name: Its name in the program.
        dtype: torch's name without the ``torch.``.
        device: Kind of device: ``cpu``, ``cuda``.
        shape: A number, or the name of a symbol, for each dimension.
        order: Dimensions from the slowest to the fastest in memory.
    """

    name: str
    dtype: str
    device: str
    shape: tuple[Dim | str, ...]
    order: tuple[Dim, ...]


class FixedInput(Frozen):
    """One input that is no tensor: the program was made for this very value."""

    name: str
    value: Primitive


class InputSpec(Frozen):
    """All inputs, flat, in order.

    Attributes:
        inputs: One for each leaf of the inputs.
        ranges: Smallest and largest value of each symbol; None where there is no bound.
    """

    inputs: tuple[TensorInput | FixedInput, ...]
    ranges: dict[str, tuple[int, int | None]]


def spec_of(program: ExportedProgram) -> InputSpec | None:
    """The inputs of a program; None where they have a form that this does not describe."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs: list[TensorInput | FixedInput] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        if not hasattr(spec.arg, "name"):
            return None
        value = nodes[spec.arg.name].meta.get("val") if spec.arg.name in nodes else None
        if isinstance(value, torch.Tensor):
            inputs.append(_tensor_input(spec.arg.name, value))
        elif hasattr(spec.arg, "value"):
            inputs.append(FixedInput(name=spec.arg.name, value=spec.arg.value))
        else:
            return None
    ranges = {str(symbol): _range(bounds) for symbol, bounds in program.range_constraints.items()}
    return InputSpec(inputs=tuple(inputs), ranges=ranges)


def _tensor_input(name: str, value: torch.Tensor) -> TensorInput:
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInput(
        name=name,
        dtype=dtype_name(value.dtype),
        device=value.device.type,
        shape=shape,
        order=tuple(value.dim_order()) if value.dim() else (),
    )


def _range(bounds: Any) -> tuple[int, int | None]:
    limit = 2**62
    lower = int(bounds.lower) if abs(bounds.lower) < limit else 0
    upper = int(bounds.upper) if bounds.upper < limit else None
    return lower, upper


class InputChecker:
    """Checks and arranges the inputs of every call."""

    def __init__(self, spec: InputSpec | None, in_spec: pytree.TreeSpec) -> None:
        """Build one for a module.

        Args:
            spec: What the inputs must be; None: only their structure is checked.
            in_spec: Structure of ``(args, kwargs)``, from the engine.
        """
        self._spec = spec
        self._in_spec = in_spec
        self._names = [tensor.name for tensor in spec.inputs] if spec else []

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the form that the engine relies on.

        Raises:
            InputMismatchError: Structure, number, dtypes, shapes or devices differ; lists all.
        """
        flat, found = pytree.tree_flatten((args, self._in_order(kwargs)))
        if found != self._in_spec:
            raise InputMismatchError(
                "The inputs have another structure than those that the model was compiled for.",
                problems=[Problem("inputs", "structure", _shown(found), _shown(self._in_spec))],
            )
        if self._spec is None:
            return [value for value in flat if isinstance(value, torch.Tensor)]
        problems = list(self._problems(flat))
        if problems:
            raise InputMismatchError(
                "The model was compiled for other inputs.",
                problems=problems,
                hint="Dimensions that vary must be exported as dynamic ones: dynamic_shapes=.",
            )
        return [
            _arranged(value, spec)
            for value, spec in zip(flat, self._spec.inputs, strict=True)
            if isinstance(spec, TensorInput)
        ]

    def _in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs in the order of the engine's structure, as far as it knows them."""
        spec = self._in_spec
        children = spec.children() if hasattr(spec, "children") else spec.children_specs
        wanted = [name for name in children[1].context or () if name in kwargs]
        return {name: kwargs[name] for name in [*wanted, *(kwargs.keys() - set(wanted))]}

    def _problems(self, flat: list[Any]) -> Iterator[Problem]:
        symbols: dict[str, tuple[int, str]] = {}
        specs = self._spec.inputs if self._spec else ()
        if len(flat) != len(specs):
            yield Problem("inputs", "number", str(len(flat)), str(len(specs)))
            return
        for value, spec in zip(flat, specs, strict=True):
            if isinstance(spec, FixedInput):
                if type(value) is not type(spec.value) or value != spec.value:
                    yield Problem(spec.name, "value", repr(value), repr(spec.value))
            elif not isinstance(value, torch.Tensor):
                yield Problem(spec.name, "type", type(value).__name__, "Tensor")
            else:
                yield from _tensor_problems(value, spec)
                yield from self._shape_problems(value, spec, symbols)

    def _shape_problems(
        self, value: torch.Tensor, spec: TensorInput, symbols: dict[str, tuple[int, str]]
    ) -> Iterator[Problem]:
        found = f"{spec.name} of shape {tuple(value.shape)}"
        if value.dim() != len(spec.shape):
            yield Problem(spec.name, "shape", str(tuple(value.shape)), _shape_text(spec))
            return
        for size, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, int):
                if size != wanted:
                    yield Problem(spec.name, "shape", str(tuple(value.shape)), _shape_text(spec))
                    return
                continue
            first, where = symbols.setdefault(wanted, (size, found))
            ranges = self._spec.ranges if self._spec else {}
            lower, upper = ranges.get(wanted, (0, None))
            if size != first:
                yield Problem(spec.name, f"dimension {wanted}", str(size), f"{first} as in {where}")
            elif size < lower or (upper is not None and size > upper):
                most = "no limit" if upper is None else str(upper)
                yield Problem(spec.name, f"dimension {wanted}", str(size), f"{lower} to {most}")


def _tensor_problems(value: torch.Tensor, spec: TensorInput) -> Iterator[Problem]:
    if dtype_name(value.dtype) != spec.dtype:
        yield Problem(spec.name, "dtype", dtype_name(value.dtype), spec.dtype)
    if value.device.type != spec.device:
        yield Problem(spec.name, "device", str(value.device), spec.device)
    if value.layout is not torch.strided:
        yield Problem(spec.name, "layout", str(value.layout), "torch.strided")


def _arranged(value: torch.Tensor, spec: TensorInput) -> torch.Tensor:
    """The same values with the strides of a dense tensor in the order that was compiled for."""
    value = value.detach()
    strides = dense_strides(value.shape, spec.order)
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if all(s == w or n < 2 for s, w, n in zip(value.stride(), strides, value.shape, strict=True)):  # noqa: PLR2004
        return value
    copy = torch.empty_strided(
        value.shape, strides, dtype=dtype_of(spec.dtype), device=value.device
    )
    return copy.copy_(value)


def _shape_text(spec: TensorInput) -> str:
    return "(" + ", ".join(map(str, spec.shape)) + ("," if len(spec.shape) == 1 else "") + ")"


def _shown(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec))
