"""Batch norms that TensorRT folds: which there are, and what lies in memory instead of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.launching import Launch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from refitkit.builtin.torch_tensorrt.direct.places import Place


@dataclass(frozen=True)
class Fold:
    """A batch norm that TensorRT folds: names of its weights in the engine.

    In memory, ``weight`` is ``weight / sqrt(var + eps)``, each step rounded to the norm's dtype,
    and ``bias`` is ``bias - mean * scale`` with that scale, computed in float64 and rounded once.
    Measured with TensorRT-RTX 1.4, in float32 and float16.
    """

    weight: str
    bias: str
    mean: str
    var: str
    eps: str

    def scale(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what lies where the weight would be, flat."""
        return _scale(*(values[n].reshape(-1) for n in (self.weight, self.var, self.eps)))

    def shift(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what lies where the bias would be, flat."""
        bias, mean = (values[n].reshape(-1) for n in (self.bias, self.mean))
        return _shift(bias, mean, self.scale(values))

    @property
    def names(self) -> tuple[str, str, str, str, str]:
        """All five weights."""
        return self.weight, self.bias, self.mean, self.var, self.eps

    @property
    def unplaced(self) -> tuple[str, str, str]:
        """The weights that have no place of their own."""
        return self.mean, self.var, self.eps


def _scale(weight: torch.Tensor, var: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    # by float64: a root of float32 is not rounded correctly everywhere
    return weight / (var + eps).double().sqrt().to(weight.dtype)


def _shift(bias: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (bias.double() - mean.double() * scale.double()).to(bias.dtype)


class FoldsAtOnce:
    """All folds of an engine, computed in a few launches instead of some for each."""

    def __init__(
        self,
        folds: Iterable[Fold],
        places: Mapping[str, Place],
        values: Mapping[str, torch.Tensor],
        runs: Mapping[torch.dtype, torch.Tensor],
        kernels: Any = None,
    ) -> None:
        """Compute the indices of all words to read and to write.

        Args:
            folds: The folds.
            places: Places of their weights and biases.
            values: Memory for all weights of the norms, flat, by name; parts of ``runs``.
            runs: Memory for all weights of a dtype, flat.
            kernels: The module of the kernels; None without Triton.
        """
        self._runs = runs
        by_dtype: dict[torch.dtype, list[Fold]] = defaultdict(list)
        for fold in folds:
            by_dtype[values[fold.weight].dtype].append(fold)
        self._parts = {
            dtype: (self._sources(some, values, runs[dtype]), self._targets(some, places, values))
            for dtype, some in by_dtype.items()
        }
        self._launches = {
            dtype: _folding(kernels, runs[dtype], sources.view(len(_ENDS), -1), targets)
            for dtype, (sources, targets) in self._parts.items()
            if kernels is not None and dtype.itemsize <= torch.float32.itemsize
        }

    @staticmethod
    def _sources(
        folds: Iterable[Fold], values: Mapping[str, torch.Tensor], run: torch.Tensor
    ) -> torch.Tensor:
        """Indices into a run of all weights, biases, means, variances and eps, one per channel."""
        found: list[list[torch.Tensor]] = [[] for _ in _ENDS]
        for fold in folds:
            count = values[fold.weight].numel()
            for name, indices in zip(fold.names, found, strict=True):
                value = values[name]
                first = int(value.storage_offset()) - int(run.storage_offset())
                steps = torch.arange(value.numel(), device=run.device)
                indices.append((first + steps).expand(count))
        return torch.cat([one for indices in found for one in indices])

    @staticmethod
    def _targets(
        folds: Iterable[Fold], places: Mapping[str, Place], values: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Where all scales and all shifts lie in the engine's memory."""
        pairs = [(fold.weight, fold.bias) for fold in folds]
        return [
            torch.cat([places[pair[at]].indices(values[pair[at]].device) for pair in pairs])
            for at in (0, 1)
        ]

    def write(self, words: Mapping[torch.dtype, torch.Tensor]) -> None:
        """Compute what lies in memory, and write it there.

        Args:
            words: The engine's memory as words of each dtype.
        """
        for dtype, (sources, targets) in self._parts.items():
            launch = self._launches.get(dtype)
            if launch is not None and launch(words[dtype]):
                continue
            found = self._runs[dtype].index_select(0, sources)
            weight, bias, mean, var, eps = found.view(len(_ENDS), -1)
            scale = _scale(weight, var, eps)
            shift = _shift(bias, mean, scale)
            for where, value in zip(targets, (scale, shift), strict=True):
                words[dtype].index_copy_(0, where, value)


def _folding(
    kernels: Any, run: torch.Tensor, sources: torch.Tensor, targets: list[torch.Tensor]
) -> Launch:
    """The launch that computes all scales and shifts of a dtype.

    Each program has rows of its own: five of sources, and two of targets. The last channels are
    computed several times, so that all rows have the same length.
    """
    table = torch.stack([*sources, *targets])
    more = -table.shape[1] % _CHANNELS
    table = torch.cat([table, table[:, -1:].expand(-1, more)], 1)
    rows = table.view(len(table), -1, _CHANNELS).transpose(0, 1).contiguous()
    return Launch(kernels.fold, len(rows), run, rows, BLOCK=_CHANNELS)


_CHANNELS = 256
"""Channels that one program folds."""
_ENDS = ("weight", "bias", "running_mean", "running_var", "eps")
"""What the names of a norm's weights end with, in the order of ``Fold``."""


def folds_among(names: Iterable[str]) -> tuple[Fold, ...]:
    """Return the batch norms that names of weights tell of; a proof shows if they are folded.

    Torch-TensorRT calls the weights of a norm ``..._weight``, ``..._bias``, ``..._running_mean``,
    ``..._running_var`` and ``..._eps``, each with something behind it.
    """
    names, found = sorted(names), []
    for mean in names:
        stem, is_mean, _ = mean.partition("_running_mean")
        alike = {end: [n for n in names if n.startswith(f"{stem}_{end}")] for end in _ENDS}
        if is_mean and all(len(some) == 1 for some in alike.values()):
            found.append(Fold(*(alike[end][0] for end in _ENDS)))
    return tuple(found)
