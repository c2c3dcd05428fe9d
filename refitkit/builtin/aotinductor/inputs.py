"""Describe the inputs that an engine was compiled for, and check the inputs of each call.

AOTInductor checks nothing: a wrong shape, dtype or stride gives a wrong result or a crash. So each
call is compared with the description first, and tensors with other strides are copied.

``spec_of`` reads the description off a program, and a saved module keeps it as JSON: ``CallSpec``.
``InputChecker`` applies it to the inputs of a call. It remembers the layouts of inputs that passed,
so most calls cost no check. The end of the module handles sizes that vary: ``SymbolicSize``
describes one, and ``ShapeMatcher`` compares the shapes of a call.
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
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram


_CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
_UNBOUNDED = 2**62  # torch.export writes larger numbers for a missing bound
_REMEMBERED = 256  # layouts that a checker remembers

# no public API
_dispatch_keys = torch._C._dispatch_keys  # noqa: SLF001
_dispatch_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001
_transform = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001

Primitive = bool | int | float | str | None
Dim = Annotated[int, Field(ge=0)]
Range = tuple[int, int | None]


class SymbolicSize(Frozen):
    """A size that varies: ``factor * symbol + offset``, the form that torch.export allows.

    Attributes:
        symbol: Name of the symbol, as ``s0``.
        factor: Factor of the symbol.
        offset: Number that is added.
    """

    symbol: str
    factor: int = 1
    offset: int = 0

    def __str__(self) -> str:
        text = self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"
        return f"{text}{self.offset:+d}" if self.offset else text

    def of(self, value: int) -> int:
        """Return the size for a value of the symbol."""
        return self.factor * value + self.offset

    def solve(self, size: int) -> int | None:
        """Return the symbol's value for a size; None if no integer gives that size."""
        value, rest = divmod(size - self.offset, self.factor)
        return None if rest else value


class TensorInput(Frozen):
    """A tensor input.

    Attributes:
        name: Name of the input in the program.
        dtype: Name of the dtype, without ``torch.``.
        device: Kind of device: ``cpu``, ``cuda``.
        shape: Size of each dimension.
        order: Dimensions from the slowest to the fastest in memory, for a tensor without gaps.
        strides: Strides, if all are numbers; they take precedence over ``order``.
        written: Whether the model changes the tensor in place.
    """

    name: str
    dtype: str
    device: str
    shape: tuple[Dim | SymbolicSize, ...]
    order: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None
    written: bool = False


class FixedInput(Frozen):
    """An input that is not a tensor. The program was exported for this value only.

    Attributes:
        name: Name of the input in the program.
        value: The only valid value.
    """

    name: str
    value: Primitive


class CallSpec(Frozen):
    """Description of all inputs and outputs, flattened, in order.

    Attributes:
        inputs: Description of each leaf of the inputs.
        ranges: Smallest and largest value of each symbol; None for a missing upper bound.
        numbers: Positions of outputs that are numbers in the program. Engines return tensors there.
    """

    inputs: tuple[TensorInput | FixedInput, ...]
    ranges: dict[str, Range]
    numbers: tuple[Dim, ...] = ()


# -- reading the description off a program ----------------------------------------------------


def spec_of(program: ExportedProgram) -> CallSpec:
    """Return the description of a program's inputs and outputs.

    Raises:
        CompileError: Some inputs have a form that cannot be checked. The error lists all of them.
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
    ranges = {str(symbol): _range(bounds) for symbol, bounds in program.range_constraints.items()}
    return CallSpec(inputs=tuple(inputs), ranges=ranges, numbers=numbers)


def _tensor_input(name: str, value: torch.Tensor, *, written: bool) -> TensorInput | Problem:
    """Return the description of an input, or what prevents one.

    Args:
        name: Name of the input.
        value: Fake tensor of the program, with symbolic sizes.
        written: Whether the model changes the tensor in place.
    """
    sizes = [_size_of(dim) for dim in value.shape]
    shape = tuple(size for size in sizes if size is not None)
    if len(shape) != value.dim():
        return Problem(name, "size", str(tuple(value.shape)), "numbers, or symbol*factor+offset")
    strides = value.stride()
    fixed = all(isinstance(stride, int) for stride in strides)
    # A copy with such strides cannot be written to.
    if 0 in strides and 0 not in shape:
        hint = "export with x.contiguous() as example input"
        return Problem(name, "example input", "expanded: one element at several places", hint=hint)
    order = tuple(value.dim_order()) if value.dim() else ()
    # Without gaps, strides of any sizes follow from the order of dimensions.
    if not fixed and not _is_dense(value, order):
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


def _is_dense(value: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Return whether a tensor with symbolic sizes has no gaps, for the sizes of its example."""
    step: Any = 1
    for dim in reversed(order):
        if bool(value.stride(dim) != step):
            return False
        step = step * value.shape[dim]
    return True


def _size_of(dim: Any) -> int | SymbolicSize | None:
    """Return a size of an exported tensor; None if it is not linear in one symbol."""
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
    return SymbolicSize(symbol=str(symbols[0]), factor=factor, offset=offset)


def _range(bounds: Any) -> Range:
    lower = int(bounds.lower) if abs(bounds.lower) < _UNBOUNDED else 0
    upper = int(bounds.upper) if bounds.upper < _UNBOUNDED else None
    return lower, upper


# -- checking a call --------------------------------------------------------------------------


@dataclass
class CallTensors:
    """Tensors of one call.

    Attributes:
        tensors: Tensors for the engine.
        copies: ``(caller's tensor, its copy)`` for inputs that the model changes in place.
        as_given: Whether all tensors are the caller's memory, with the caller's strides.
    """

    tensors: list[torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    as_given: bool = True

    def add(self, value: torch.Tensor, spec: TensorInput) -> None:
        """Append a tensor, with the strides that the engine was compiled for."""
        alias = value.detach()
        prepared = _with_strides(alias, spec)
        self.tensors.append(prepared)
        self.as_given = self.as_given and prepared is alias
        if spec.written and prepared.data_ptr() != value.data_ptr():
            self.copies.append((value, prepared))

    def write_back(self) -> None:
        """Copy to the caller's tensors what the engine wrote to their copies."""
        if self.copies:
            with torch.no_grad():
                for value, copy in self.copies:
                    value.copy_(copy)


class InputChecker:
    """Checks the inputs of every call, and prepares them for the engine.

    A check costs more than a call of a small engine. So the checker remembers the layouts of inputs
    that passed and that the engine could take as they are. Inputs with such a layout pass at once.
    """

    def __init__(self, spec: CallSpec | None, in_spec: pytree.TreeSpec) -> None:
        """Create a checker for a module.

        Args:
            spec: Description of the inputs. None for packages that torch wrote, which have none:
                then only the structure is checked.
            in_spec: Structure of ``(args, kwargs)``, from the engine.
        """
        self._spec = spec
        self._in_spec = in_spec
        # Layouts, each with the names of keyword inputs in the order of the engine's structure.
        self._passed: dict[Hashable, tuple[str, ...]] = {}

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallTensors:
        """Return the tensors of a call as the engine needs them.

        Raises:
            InputMismatchError: The structure or number of inputs, a dtype, a shape, a device or a
                value is not that of the description. The error lists all problems.
        """
        try:
            layout = _layout(args, kwargs)
            names = self._passed.get(layout)
        except (RuntimeError, TypeError):  # TypeError: sizes are symbols, which have no hash
            layout = names = None
        if names is not None:
            values = (*args, *[kwargs[name] for name in names]) if names else args
            # a layout does not tell that memory was freed; the full check does
            if all(map(has_memory, values)):
                return CallTensors([value.detach() for value in values])
        result = self._checked(args, kwargs)
        if layout is not None and self._spec is not None and _is_repeatable(result):
            if len(self._passed) >= _REMEMBERED:
                self._passed.clear()
            self._passed[layout] = tuple(self._in_order(kwargs))
        return result

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallTensors:
        """Return the tensors of a call, of any layout; see ``flatten``."""
        flat, found = pytree.tree_flatten((args, self._in_order(kwargs)))
        if found != self._in_spec:
            raise InputMismatchError(
                "The inputs have another structure than those that the model was compiled for.",
                problems=[Problem("inputs", "structure", _text(found), _text(self._in_spec))],
            )
        if self._spec is None:
            # inputs of other types are constants in the engine's code
            return CallTensors([value for value in flat if isinstance(value, torch.Tensor)])
        problems = list(_problems(flat, self._spec))
        if problems:
            raise InputMismatchError(
                "The model was compiled for other inputs.",
                problems=problems,
                hint="Dimensions that vary must be exported as dynamic ones: dynamic_shapes=.",
            )
        result = CallTensors([])
        for value, spec in zip(flat, self._spec.inputs, strict=True):
            if isinstance(spec, TensorInput):
                result.add(value, spec)
        return result

    def _in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword inputs in the order of the engine's structure, unknown ones last."""
        spec = self._in_spec
        # torch 2.14 deprecates ``children_specs`` (torch/utils/_pytree.py) for ``children()``.
        children = spec.children() if hasattr(spec, "children") else spec.children_specs
        wanted = [name for name in children[1].context or () if name in kwargs]
        return {name: kwargs[name] for name in [*wanted, *(kwargs.keys() - set(wanted))]}


def _layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, ...] | None:
    """Return all that the check of a call depends on; None if that is more than layouts.

    All inputs must be plain tensors: no subclasses, other values or structures. No dispatch mode
    and no transform of ``torch.func`` may be on, because they change the tensors. The dispatch
    keys contain the kind of device, the layout, wrappers, and pending conjugations or negations.

    Raises:
        RuntimeError: A tensor has no sizes or no strides.
    """
    if _dispatch_modes() or _transform() is not None:
        return None
    found: list[Hashable] = [*kwargs]
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) is not torch.Tensor:
            return None
        found += (_dispatch_keys(value).raw_repr(), value.dtype, value.shape, value.stride())
    return tuple(found)


def has_memory(value: torch.Tensor) -> bool:
    """Return whether the storage of a strided tensor has all of its elements."""
    have = value.untyped_storage().nbytes()
    if have >= value.nbytes and value.is_contiguous() and not value.storage_offset():
        return True  # the usual case
    last = value.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    return not value.numel() or have >= (last + 1) * value.itemsize


def _is_repeatable(result: CallTensors) -> bool:
    """Return whether every call of the same layout gets its tensors as this one does."""
    # in a trace of torch.jit, sizes are tensors
    if not result.as_given or torch._C._get_tracing_state() is not None:  # noqa: SLF001
        return False
    # A wrapper that outlived its transform may have the same layout, and is refused.
    return not any(torch._is_functional_tensor(value) for value in result.tensors)  # noqa: SLF001


def _problems(flat: list[Any], spec: CallSpec) -> Iterator[Problem]:
    """Yield everything in which the leaves of a call differ from the description."""
    if len(flat) != len(spec.inputs):
        yield Problem("inputs", "number", str(len(flat)), str(len(spec.inputs)))
        return
    matcher = ShapeMatcher(spec.ranges)
    for value, wanted in zip(flat, spec.inputs, strict=True):
        if isinstance(wanted, FixedInput):
            # The type counts, too: True == 1 == 1.0.
            if type(value) is not type(wanted.value) or value != wanted.value:
                yield Problem(wanted.name, "value", repr(value), repr(wanted.value))
        elif not isinstance(value, torch.Tensor):
            yield Problem(wanted.name, "type", type(value).__name__, "Tensor")
        elif value.is_nested:  # it has no sizes
            yield Problem(wanted.name, "layout", "nested", "torch.strided")
        else:
            yield from _tensor_problems(value, wanted)
            yield from matcher.problems(wanted.name, value.shape, wanted.shape)


def _tensor_problems(value: torch.Tensor, spec: TensorInput) -> Iterator[Problem]:
    if not_real := why_not_real(value):
        yield Problem(spec.name, "no data", not_real)
    elif value.layout is torch.strided and not value.is_meta and not has_memory(value):
        yield Problem(spec.name, "no data", "its memory was freed, or is smaller than its shape")
    if dtype_name(value.dtype) != spec.dtype:
        yield Problem(spec.name, "dtype", dtype_name(value.dtype), spec.dtype)
    if value.device.type != spec.device:
        yield Problem(spec.name, "device", str(value.device), spec.device)
    if value.layout is not torch.strided:
        yield Problem(spec.name, "layout", str(value.layout), "torch.strided")


def _with_strides(value: torch.Tensor, spec: TensorInput) -> torch.Tensor:
    """Return a tensor with the strides that the engine was compiled for; a copy if needed."""
    # The engine reads memory, so a pending conjugation or negation must be carried out.
    value = value.resolve_conj().resolve_neg()
    strides = spec.strides or dense_strides(value.shape, spec.order)
    if all(
        s == w or n < 2  # noqa: PLR2004 - the stride of a dimension of size 1 means nothing
        for s, w, n in zip(value.stride(), strides, value.shape, strict=True)
    ):
        return value
    dtype = dtype_of(spec.dtype)
    copy = torch.empty_strided(value.shape, strides, dtype=dtype, device=value.device)
    return copy.copy_(value)


def _text(spec: pytree.TreeSpec) -> str:
    """Return a structure with ``*`` for each leaf."""
    return str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec))


class ShapeMatcher:
    """Compares the shapes of one call with the exported ones. Symbols must agree in all inputs."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        """Create a matcher for one call.

        Args:
            ranges: Smallest and largest value of each symbol.
        """
        self._ranges = ranges
        self._values: dict[str, tuple[int, str]] = {}  # value, and the input that determined it

    def problems(
        self, name: str, shape: Sequence[int], wanted: Sequence[int | SymbolicSize]
    ) -> Iterator[Problem]:
        """Yield what is wrong with the shape of one input.

        Args:
            name: Name of the input.
            shape: Shape of the tensor that was given.
            wanted: Exported shape.
        """
        text = f"({', '.join(map(str, wanted))}{',' * (len(wanted) == 1)})"
        fixed = [(s, w) for s, w in zip(shape, wanted, strict=False) if isinstance(w, int)]
        if len(shape) != len(wanted) or any(s != w for s, w in fixed):
            yield Problem(name, "shape", str(tuple(shape)), text)
            return
        for size, one in zip(shape, wanted, strict=True):
            if isinstance(one, SymbolicSize):
                yield from self._symbolic_problems(name, size, one)

    def _symbolic_problems(self, name: str, size: int, wanted: SymbolicSize) -> Iterator[Problem]:
        value = wanted.solve(size)
        if value is None:
            yield Problem(name, f"dimension {wanted}", str(size), "a size of that form")
            return
        # the first input with a symbol decides its value for the whole call
        first, where = self._values.setdefault(wanted.symbol, (value, name))
        lower, upper = self._ranges.get(wanted.symbol, (0, None))
        if value != first:
            size_there = f"{wanted.of(first)}, as {where} is"
            yield Problem(name, f"dimension {wanted}", str(size), size_there)
        elif value < lower or (upper is not None and value > upper):
            most = "or more" if upper is None else f"to {wanted.of(upper)}"
            yield Problem(name, f"dimension {wanted}", str(size), f"{wanted.of(lower)} {most}")


# -- packages without a description -----------------------------------------------------------


def run_unchecked(
    call: Callable[[list[torch.Tensor]], list[Any]], flat: list[torch.Tensor]
) -> list[Any]:
    """Run a container without a description of its inputs, with AOTInductor's own checks.

    These are off unless an environment variable is set when the library runs for the first time
    (``AOTI_RUNTIME_CHECK_INPUTS``, in ``torch/_inductor/codegen/cpp_wrapper_cpu.py``, 2.14).

    Raises:
        InputMismatchError: The checks, or the engine, refused the inputs.
        ResourceError: The system refused memory.
    """
    # Which call is the first is unknown here, so the variable is set for each.
    before = os.environ.get(_CHECK_INPUTS)
    os.environ[_CHECK_INPUTS] = "1"
    try:
        outputs = call([_contiguous(value) for value in flat])
    except RuntimeError as exc:
        raise_if_resource(exc, "The engine cannot answer")
        first = str(exc).strip().partition("\n")[0]
        hint = "Make a plan from its program: refitkit.plan(program, target=...) adds the checks."
        raise InputMismatchError(f"The engine refused the inputs: {first}", hint=hint) from exc
    finally:
        if before is None:
            del os.environ[_CHECK_INPUTS]
        else:
            os.environ[_CHECK_INPUTS] = before
    return outputs


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_meta or why_not_real(value):
        raise InputMismatchError(f"An input has the layout {value.layout} or no data.")
    return value.detach().resolve_conj().resolve_neg().contiguous()
