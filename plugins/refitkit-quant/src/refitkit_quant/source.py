"""A weight source as the rules of both tools see it: headers, values, and checks of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import OutputMeasure, TensorInfo
from refitkit.program.bits import all_finite, counted, finite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import torch
    from refitkit.protocols import WeightSource

    from refitkit_quant.scheme import TensorSpec

_NO_CAST = "convert it: the plugin casts no weights"


class TransformSource:
    """The source of one transform request.

    Attributes:
        names: Names of the source's entries.
        partial: Whether weights that the source lacks keep their values.
    """

    def __init__(
        self, source: WeightSource, leaves: Collection[str], limit: float, *, partial: bool
    ) -> None:
        """Wrap a source; nothing is read yet.

        Args:
            source: Weights of the request.
            leaves: FQNs of all leaves of the program.
            limit: Largest quantization error that passes, relative to the largest element.
            partial: Whether weights that the source lacks keep their values.
        """
        self.names, self.partial = source.names(), partial
        self._limit = limit
        self._source, self._leaves = source, leaves
        self._checks: list[Callable[[], Iterable[Problem]]] = []

    def is_read(self, name: str) -> bool:
        """Whether the program reads an entry of this name unchanged."""
        return name in self._leaves

    def read(self, name: str) -> torch.Tensor:
        """The tensor of an entry. Do not write to it."""
        return self._source.get(name)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of an entry, without reading its data."""
        return self._source.info(name)

    def misfits(
        self, entry: TensorSpec, name: str = "", *, any_shape: bool = False
    ) -> Iterator[Problem]:
        """Differences between an entry of the source and the scheme, from headers only.

        Args:
            entry: Tensor of the scheme.
            name: Name in the source; empty: the name in the scheme.
            any_shape: Whether only the number of elements has to match.
        """
        name = name or entry.name
        info = self._source.info(name)
        wanted = TensorInfo(dtype=entry.dtype, shape=entry.shape)
        # An unusable entry has no dtype or shape to compare.
        if info.unusable:
            yield Problem(name, "unusable", info.unusable, str(entry))
            return
        if info.dtype != entry.dtype:
            yield Problem(name, "dtype", info.dtype, entry.dtype, _NO_CAST)
        # A scale of one element may be a scalar or have shape (1,).
        if info.shape != entry.shape and not (any_shape and info.count == wanted.count):
            yield Problem(name, "shape", str(info.shape), str(entry.shape))

    def add_check(self, check: Callable[[], Iterable[Problem]]) -> None:
        """Register a check of values, which ``require_valid`` runs if another check fails."""
        self._checks.append(check)

    def require_valid(self, check: Callable[[], Iterable[Problem]]) -> None:
        """Check values before their first use.

        Raises:
            WeightMismatchError: The check fails; lists the problems of all registered checks.
        """
        # A group is made one at a time. Run all checks, so that one error lists every problem.
        if list(check()):
            problems = [problem for each in self._checks for problem in each()]
            message = f"{self._source.description} has values that cannot be quantized."
            raise WeightMismatchError(message, problems=problems)

    def not_finite(self, name: str) -> Iterator[Problem]:
        """The problem that a weight has infinite or NaN elements, and so no scale."""
        value = self.read(name)
        if not all_finite(value):
            found = counted(~finite(value))
            yield Problem(name, "non-finite", found, hint="such elements cannot be quantized")

    def measure(self, name: str, weight: torch.Tensor, dequantized: torch.Tensor) -> OutputMeasure:
        """The quantization error of a weight.

        Args:
            name: Leaf with the quantized weight.
            weight: Float weight.
            dequantized: Values that the quantized weight represents, of the same shape.
        """
        wide = weight.float()
        scale = float(wide.abs().max()) if wide.numel() else 0.0
        error = float((dequantized.float() - wide).abs().max()) if wide.numel() else 0.0
        # Relative to the largest element, so that one setting fits weights of all sizes.
        limit = self._limit * scale
        share = error / scale if scale else 0.0
        return OutputMeasure(
            name=name,
            ok=error <= limit,
            max_abs_error=error,
            limit=limit,
            scale=scale,
            note=f"quantization error: {share:.3g} of the largest element",
        )


def info_of(entry: TensorSpec) -> TensorInfo:
    """Dtype and shape of a tensor of the scheme."""
    return TensorInfo(dtype=entry.dtype, shape=entry.shape)
