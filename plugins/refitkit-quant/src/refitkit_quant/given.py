"""What a source has of one model's quantized weights, and what is wrong with that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import OutputMeasure, TensorInfo
from refitkit.program.bits import all_finite, counted, finite

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import torch
    from refitkit.protocols import WeightSource

    from refitkit_quant.scheme import Entry

_NO_CAST = "convert it yourself: weights are never cast silently"


class Given:
    """A source on its way through one transform.

    Attributes:
        names: What the source has.
        partial: Whether what the source has nothing for stays as it is.
    """

    def __init__(
        self, source: WeightSource, leaves: Collection[str], limit: float, *, partial: bool
    ) -> None:
        """Nothing is read yet.

        Args:
            source: The weights as they were given.
            leaves: FQNs of all that the program reads.
            limit: Largest error of quantization that passes, relative to the largest element.
            partial: See above.
        """
        self.names, self.partial = source.names(), partial
        self._limit = limit
        self._source, self._leaves = source, leaves
        self._looks: list[Callable[[], Iterable[Problem]]] = []

    def is_read(self, name: str) -> bool:
        """Whether the program itself reads an entry of this name."""
        return name in self._leaves

    def read(self, name: str) -> torch.Tensor:
        """The source's tensor; not to be written to."""
        return self._source.get(name)

    def info(self, name: str) -> TensorInfo:
        """What the source says of an entry, without reading it."""
        return self._source.info(name)

    def misfits(
        self, entry: Entry, name: str = "", *, any_shape: bool = False
    ) -> Iterator[Problem]:
        """Why an entry of the source is not what the scheme says; headers only.

        Args:
            entry: What the scheme says.
            name: The source's name of it; empty: the same.
            any_shape: Whether only the number of elements matters.
        """
        name = name or entry.name
        info = self._source.info(name)
        wanted = TensorInfo(dtype=entry.dtype, shape=entry.shape)
        if info.unusable:
            yield Problem(name, "unusable", info.unusable, str(entry))
            return
        if info.dtype != entry.dtype:
            yield Problem(name, "dtype", info.dtype, entry.dtype, _NO_CAST)
        if info.shape != entry.shape and not (any_shape and info.count == wanted.count):
            yield Problem(name, "shape", str(info.shape), str(entry.shape))

    def watch(self, look: Callable[[], Iterable[Problem]]) -> None:
        """Have values looked at; see ``require``."""
        self._looks.append(look)

    def require(self, look: Callable[[], Iterable[Problem]]) -> None:
        """Look at values that are about to be used.

        Raises:
            WeightMismatchError: They cannot be; lists those of all that is watched.
        """
        if list(look()):
            problems = [problem for each in self._looks for problem in each()]
            message = f"{self._source.description} has values that cannot be quantized."
            raise WeightMismatchError(message, problems=problems)

    def not_finite(self, name: str) -> Iterator[Problem]:
        """Why a weight has no scale: an element that is NaN or infinite."""
        value = self.read(name)
        if not all_finite(value):
            found = counted(~finite(value))
            yield Problem(name, "non-finite", found, hint="it cannot be quantized")

    def measure(self, name: str, given: torch.Tensor, meant: torch.Tensor) -> OutputMeasure:
        """How far what is represented is from what was given.

        Args:
            name: The leaf that holds the quantized weight.
            given: The float weight.
            meant: What its quantized form stands for, of the same shape.
        """
        wide = given.float()
        scale = float(wide.abs().max()) if wide.numel() else 0.0
        error = float((meant.float() - wide).abs().max()) if wide.numel() else 0.0
        limit = self._limit * scale
        share = error / scale if scale else 0.0
        return OutputMeasure(
            name=name,
            ok=error <= limit,
            max_abs_error=error,
            limit=limit,
            scale=scale,
            note=f"error of quantization: {share:.3g} of the largest element",
        )


def info_of(entry: Entry) -> TensorInfo:
    """An entry as a source announces it."""
    return TensorInfo(dtype=entry.dtype, shape=entry.shape)
