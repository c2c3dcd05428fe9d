"""Check many values for NaN and infinity with one wait for the device."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.moves import BLOCK, WARPS, blocks_of
from refitkit.builtin.torch_tensorrt.refitter import current_device
from refitkit.program.bits import sum_of_floats

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Integers of the same size, and the bits that are all set in NaN and infinity, and only there."""


class Screen:
    """Checks the same values in each refit."""

    def __init__(self, values: Sequence[torch.Tensor], kernels: Any) -> None:
        """Prepare the launches.

        Args:
            values: Views of memory of one device, at least one. Integers are always finite.
            kernels: The module of the kernels; None without Triton.
        """
        self._device = values[0].device
        self._values = [value for value in values if value.is_floating_point()]
        self._is_able = all(value.dtype in _EXPONENTS for value in self._values)
        self._launches: list[_Launch] = []
        self._slow = self._values
        if kernels is not None and self._is_able:
            self._slow = [value for value in self._values if not value.is_contiguous()]
            by_word: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
            for value in self._values:
                if value.is_contiguous() and value.numel():
                    by_word[_EXPONENTS[value.dtype][0]].append(value)
            self._found = torch.zeros(1, dtype=torch.int32, device=self._device)
            self._launches = [
                _Launch(kernels, word, some, self._found) for word, some in by_word.items()
            ]

    def total(self) -> torch.Tensor:
        """Return one element of float32 that is finite only if all values are.

        It can be NaN or infinite although all values are finite: a sum may overflow, and some
        dtypes cannot be checked.
        """
        if not self._is_able:
            return torch.full((), torch.nan, device=self._device)
        slow = self._slow
        zero = torch.zeros((), device=self._device)
        if self._launches:
            try:
                with current_device(self._device):
                    self._found.zero_()
                    for launch in self._launches:
                        launch()
            except Exception:  # noqa: BLE001 - Triton cannot compile, as without a C compiler
                self._launches, self._slow = [], self._values
                slow = self._values
            else:
                zero = torch.where(self._found[0] > 0, torch.nan, zero)
        total = sum_of_floats(slow)
        return zero if total is None else total + zero


class _Launch:
    """Contiguous values with words of one size."""

    def __init__(
        self,
        kernels: Any,
        word: torch.dtype,
        values: Sequence[torch.Tensor],
        found: torch.Tensor,
    ) -> None:
        device = found.device
        self._kernels, self._found = kernels, found
        counts = [value.numel() for value in values]
        tiles = blocks_of(counts)
        self._grid = (len(tiles),)
        self._table = (
            torch.zeros(1, dtype=word, device=device),  # the kernel needs the type alone
            torch.tensor([value.data_ptr() for value in values], device=device),
            torch.tensor(counts, device=device),
            torch.tensor([_EXPONENTS[v.dtype][1] for v in values], dtype=word, device=device),
            tiles.to(device),
        )

    def __call__(self) -> None:
        screen = self._kernels.screen[self._grid]
        screen(self._found, *self._table, BLOCK=BLOCK, num_warps=WARPS)
