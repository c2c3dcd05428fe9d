"""What inputs an engine was compiled for, and how to bring others into that form.

AOTInductor itself believes its inputs: a wrong shape or dtype gives a wrong result or a crash, and
so do strides other than those of the example inputs. So calls are checked first, and tensors with
other strides are copied.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.utils import _pytree as pytree

from refitkit.errors import CompileError, InputMismatchError, Problem, raise_if_resource
from refitkit.model.base import Frozen
from refitkit.program.ambient import why_not_real
from refitkit.program.bits import dense_strides
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.program.liveness import mutated_placeholders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.export import ExportedProgram


_CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
Primitive = bool | int | float | str | None


class TensorInput(Frozen):
    """One tensor input.

    Attributes:
        name: Its name in the program.
        dtype: torch's name without the ``torch.``.
        device: Kind of device: ``cpu``, ``cuda``.
        shape: Sizes of all dimensions.
        order: Dimensions from the slowest to the fastest in memory, for tensors without gaps.
        strides: Strides where they are numbers; they then go before ``order``.
        written: Whether the model changes it in place.
    """

    name: str
    dtype: str
    device: str
    shape: tuple[Dim | Size, ...]
    order: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None
    written: bool = False


class FixedInput(Frozen):
    """One input that is no tensor: the program was made for this very value."""

    name: str
    value: Primitive


class CallSpec(Frozen):
    """Inputs and outputs, flat, in order.

    Attributes:
        inputs: One for each leaf of the inputs.
        ranges: Smallest and largest value of each symbol; None where there is no bound.
        numbers: Positions of outputs that are numbers in the program; engines give tensors.
    """

    inputs: tuple[TensorInput | FixedInput, ...]
    ranges: dict[str, Range]
    numbers: tuple[Dim, ...] = ()


def spec_of(program: ExportedProgram) -> CallSpec:
    """The inputs and outputs of a program.

    Raises:
        CompileError: It takes inputs of a form that an engine cannot be given safely; lists all.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    written = mutated_placeholders(program)
    inputs: list[TensorInput | FixedInput] = []
    problems: list[Problem] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        name = getattr(spec.arg, "name", "input")
        value = nodes[name].meta.get("val") if name in nodes else None
        if isinstance(value, torch.Tensor):
            given = _tensor_input(name, value, written=name in written)
            inputs += [given] if isinstance(given, TensorInput) else []
            problems += [given] if isinstance(given, Problem) else []
        elif hasattr(spec.arg, "value"):
            inputs.append(FixedInput(name=name, value=spec.arg.value))
        else:
            problems.append(Problem(name, "input", type(value).__name__, "a tensor or a constant"))
    if problems:
        message = "The program takes inputs that an AOTInductor engine cannot be given safely."
        raise CompileError(message, problems=problems)
    outputs = [s.arg for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    numbers = tuple(i for i, arg in enumerate(outputs) if type(arg).__name__ != "TensorArgument")
    ranges = ranges_of(program.range_constraints)
    return CallSpec(inputs=tuple(inputs), ranges=ranges, numbers=numbers)


def _tensor_input(name: str, value: torch.Tensor, *, written: bool) -> TensorInput | Problem:
    sizes = [size_of(dim) for dim in value.shape]
    shape = tuple(size for size in sizes if size is not None)
    if len(shape) != value.dim():
        return Problem(name, "size", str(tuple(value.shape)), "numbers, or symbol*factor+offset")
    strides = value.stride()
    fixed = all(isinstance(stride, int) for stride in strides)
    if 0 in strides and 0 not in shape:
        hint = "export with x.contiguous() as example input"
        return Problem(name, "example input", "expanded: one element at several places", hint=hint)
    order = tuple(value.dim_order()) if value.dim() else ()
    if not fixed and not _dense(value, order):
        hint = "export with x.contiguous() as example input"
        return Problem(name, "example input", "gaps in memory and varying sizes", hint=hint)
    return TensorInput(
        name=name,
        dtype=dtype_name(value.dtype),
        device=value.device.type,
        shape=shape,
        order=order,
        strides=tuple(strides) if fixed else None,
        written=written,
    )


def _dense(value: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Whether a tensor with symbolic sizes has no gaps, for the sizes of its example."""
    step: Any = 1
    for dim in reversed(order):
        if bool(value.stride(dim) != step):
            return False
        step = step * value.shape[dim]
    return True


@dataclass
class Arranged:
    """The tensors of one call.

    Attributes:
        tensors: What the engine gets.
        copies: ``(caller's tensor, its copy)`` of inputs that the model changes in place.
    """

    tensors: list[torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, value: torch.Tensor, spec: TensorInput) -> None:
        """Add one, with the strides that the engine was compiled for."""
        arranged = _arranged(value, spec)
        self.tensors.append(arranged)
        if spec.written and arranged.data_ptr() != value.data_ptr():
            self.copies.append((value, arranged))

    def write_back(self) -> None:
        """Give the caller's tensors what the engine wrote into their copies."""
        with torch.no_grad():
            for value, copy in self.copies:
                value.copy_(copy)


class InputChecker:
    """Checks and arranges the inputs of every call."""

    def __init__(self, spec: CallSpec | None, in_spec: pytree.TreeSpec) -> None:
        """Build one for a module.

        Args:
            spec: What the inputs must be; None, for packages of torch's own, which do not say it:
                only their structure is checked.
            in_spec: Structure of ``(args, kwargs)``, from the engine.
        """
        self._spec = spec
        self._in_spec = in_spec

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arranged:
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
            return Arranged([value for value in flat if isinstance(value, torch.Tensor)])
        problems = list(_problems(flat, self._spec))
        if problems:
            raise InputMismatchError(
                "The model was compiled for other inputs.",
                problems=problems,
                hint="Dimensions that vary must be exported as dynamic ones: dynamic_shapes=.",
            )
        arranged = Arranged([])
        for value, spec in zip(flat, self._spec.inputs, strict=True):
            if isinstance(spec, TensorInput):
                arranged.add(value, spec)
        return arranged

    def _in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs in the order of the engine's structure, as far as it knows them."""
        spec = self._in_spec
        children = spec.children() if hasattr(spec, "children") else spec.children_specs
        wanted = [name for name in children[1].context or () if name in kwargs]
        return {name: kwargs[name] for name in [*wanted, *(kwargs.keys() - set(wanted))]}


def _problems(flat: list[Any], spec: CallSpec) -> Iterator[Problem]:
    if len(flat) != len(spec.inputs):
        yield Problem("inputs", "number", str(len(flat)), str(len(spec.inputs)))
        return
    fit = Fit(spec.ranges)
    for value, wanted in zip(flat, spec.inputs, strict=True):
        if isinstance(wanted, FixedInput):
            if type(value) is not type(wanted.value) or value != wanted.value:
                yield Problem(wanted.name, "value", repr(value), repr(wanted.value))
        elif not isinstance(value, torch.Tensor):
            yield Problem(wanted.name, "type", type(value).__name__, "Tensor")
        else:
            yield from _tensor_problems(value, wanted)
            yield from fit.problems(wanted.name, value.shape, wanted.shape)


def _tensor_problems(value: torch.Tensor, spec: TensorInput) -> Iterator[Problem]:
    if not_real := why_not_real(value):
        yield Problem(spec.name, "no data", not_real)
    if dtype_name(value.dtype) != spec.dtype:
        yield Problem(spec.name, "dtype", dtype_name(value.dtype), spec.dtype)
    if value.device.type != spec.device:
        yield Problem(spec.name, "device", str(value.device), spec.device)
    if value.layout is not torch.strided:
        yield Problem(spec.name, "layout", str(value.layout), "torch.strided")


def _arranged(value: torch.Tensor, spec: TensorInput) -> torch.Tensor:
    """The same values with the strides that the engine was compiled for."""
    value = value.detach().resolve_conj().resolve_neg()
    strides = spec.strides or dense_strides(value.shape, spec.order)
    if all(
        s == w or n < 2  # noqa: PLR2004 - the stride of a dimension of size 1 means nothing
        for s, w, n in zip(value.stride(), strides, value.shape, strict=True)
    ):
        return value
    dtype = dtype_of(spec.dtype)
    copy = torch.empty_strided(value.shape, strides, dtype=dtype, device=value.device)
    return copy.copy_(value)


def run_unknown(runner: Any, flat: list[torch.Tensor]) -> list[Any]:
    """Run a container whose inputs nobody knows, with the checks that AOTInductor has itself.

    Those are off unless the environment variable is set when the library runs for the first time
    (``AOTI_RUNTIME_CHECK_INPUTS``, in ``torch/_inductor/codegen/cpp_wrapper_cpu.py``, 2.14).

    Raises:
        InputMismatchError: They, or the engine, refused the inputs.
    """
    before = os.environ.get(_CHECK_INPUTS)
    os.environ[_CHECK_INPUTS] = "1"
    try:
        outputs: list[Any] = runner.run([_packed(value) for value in flat])
    except RuntimeError as exc:
        raise_if_resource(exc, "The engine cannot answer")
        first = str(exc).strip().partition("\n")[0]
        hint = "Make a plan from its program: refitkit.plan(program, target=...) tells the inputs."
        raise InputMismatchError(f"The engine refused the inputs: {first}", hint=hint) from exc
    finally:
        if before is None:
            del os.environ[_CHECK_INPUTS]
        else:
            os.environ[_CHECK_INPUTS] = before
    return outputs


def _packed(value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_meta or why_not_real(value):
        raise InputMismatchError(f"An input has the layout {value.layout} or no data.")
    return value.detach().resolve_conj().resolve_neg().contiguous()


def _shown(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec))


# MERGED shapes: Sizes of dimensions that vary, as data, and whether the inputs of a call fit
# them.

Dim = Annotated[int, Field(ge=0)]
Range = tuple[int, int | None]
_LIMIT = 2**62


class Size(Frozen):
    """A size that varies: ``factor * symbol + offset``, the form that torch.export allows."""

    symbol: str
    factor: int = 1
    offset: int = 0

    def __str__(self) -> str:
        text = self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"
        return f"{text}{self.offset:+d}" if self.offset else text

    def of(self, value: int) -> int:
        """The size where the symbol has this value."""
        return self.factor * value + self.offset

    def solve(self, size: int) -> int | None:
        """The symbol's value where the size is this; None where there is none."""
        value, rest = divmod(size - self.offset, self.factor)
        return None if rest else value


def size_of(dim: Any) -> int | Size | None:
    """A dimension of an exported tensor as data; None where it has another form than ``Size``."""
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) != 1:
        return None
    polynomial = expression.as_poly(symbols[0])
    if polynomial is None or polynomial.degree() != 1:
        return None
    factor, offset = (int(c) for c in polynomial.all_coeffs())
    return Size(symbol=str(symbols[0]), factor=factor, offset=offset)


def ranges_of(constraints: Mapping[Any, Any]) -> dict[str, Range]:
    """Smallest and largest value of each symbol of a program; None where there is no bound."""
    return {str(symbol): _range(bounds) for symbol, bounds in constraints.items()}


def _range(bounds: Any) -> Range:
    lower = int(bounds.lower) if abs(bounds.lower) < _LIMIT else 0
    upper = int(bounds.upper) if bounds.upper < _LIMIT else None
    return lower, upper


class Fit:
    """Holds the shapes of one call against those that were exported; symbols must agree."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        """Start a call: no symbol has a value yet."""
        self._ranges = ranges
        self._values: dict[str, tuple[int, str]] = {}

    def problems(
        self, name: str, shape: Sequence[int], wanted: Sequence[int | Size]
    ) -> Iterator[Problem]:
        """What is wrong with the shape of one input."""
        text = f"({', '.join(map(str, wanted))}{',' * (len(wanted) == 1)})"
        fixed = [(s, w) for s, w in zip(shape, wanted, strict=False) if isinstance(w, int)]
        if len(shape) != len(wanted) or any(s != w for s, w in fixed):
            yield Problem(name, "shape", str(tuple(shape)), text)
            return
        for size, one in zip(shape, wanted, strict=True):
            if isinstance(one, Size):
                yield from self._one(name, size, one)

    def _one(self, name: str, size: int, wanted: Size) -> Iterator[Problem]:
        value = wanted.solve(size)
        if value is None:
            yield Problem(name, f"dimension {wanted}", str(size), "a size of that form")
            return
        first, where = self._values.setdefault(wanted.symbol, (value, name))
        lower, upper = self._ranges.get(wanted.symbol, (0, None))
        if value != first:
            size_there = f"{wanted.of(first)}, as {where} is"
            yield Problem(name, f"dimension {wanted}", str(size), size_there)
        elif value < lower or (upper is not None and value > upper):
            most = "or more" if upper is None else f"to {wanted.of(upper)}"
            yield Problem(name, f"dimension {wanted}", str(size), f"{wanted.of(lower)} {most}")
