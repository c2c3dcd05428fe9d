"""Sizes of dimensions that vary, as data, and whether the inputs of a call fit them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from refitkit.errors import Problem
from refitkit.model.base import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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
