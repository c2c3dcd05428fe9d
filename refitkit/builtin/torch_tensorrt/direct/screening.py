"""Questions to the device about many values at once, which are answered later.

An answer is an element of int32. It is 0 before the question.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.direct.launching import Launch
from refitkit.builtin.torch_tensorrt.direct.moves import BLOCK, blocks_of
from refitkit.builtin.torch_tensorrt.direct.places import words_of
from refitkit.program.bits import INTEGERS, sum_of_floats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout

_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Integers of the same size, and the bits that are all set in NaN and infinity, and only there."""
_SAMPLE = 1 << 16
"""Elements of a sample."""


class Screen:
    """Asks whether some values are not finite; the same values each time."""

    def __init__(self, values: Sequence[torch.Tensor], answer: torch.Tensor, kernels: Any) -> None:
        """Prepare the launches.

        Args:
            values: Views of memory of one device. Integers are always finite.
            answer: The answer, one element on that device. It is 0 only if all values are finite.
                It can be another number although they are: a sum may overflow, and some dtypes
                cannot be checked.
            kernels: The module of the kernels; None without Triton.
        """
        self._answer = answer
        self._values = [value for value in values if value.is_floating_point()]
        self._is_able = all(value.dtype in _EXPONENTS for value in self._values)
        self._launches: list[Launch] = []
        self._slow = self._values
        if kernels is not None and self._is_able:
            self._slow = [value for value in self._values if not value.is_contiguous()]
            by_word: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
            for value in self._values:
                if value.is_contiguous() and value.numel():
                    by_word[_EXPONENTS[value.dtype][0]].append(value)
            self._launches = [
                _screening(kernels, word, some, answer.device) for word, some in by_word.items()
            ]

    def ask(self) -> None:
        """Ask, on the current stream, and do not wait."""
        if not self._is_able:
            self._answer.fill_(1)
            return
        if not all(launch(self._answer) for launch in self._launches):
            self._launches, self._slow = [], self._values
        total = sum_of_floats(self._slow)
        if total is not None:
            self._answer.bitwise_or_(total.isfinite().logical_not())


def _screening(
    kernels: Any, word: torch.dtype, values: Sequence[torch.Tensor], device: torch.device
) -> Launch:
    """The launch for contiguous values with words of one size."""
    counts = [value.numel() for value in values]
    tiles = blocks_of(counts)
    table = (
        torch.zeros(1, dtype=word),  # the kernel needs the type alone
        torch.tensor([value.data_ptr() for value in values]),
        torch.tensor(counts),
        torch.tensor([_EXPONENTS[value.dtype][1] for value in values], dtype=word),
        tiles,
    )
    return Launch(kernels.screen, len(tiles), *[some.to(device) for some in table], BLOCK=BLOCK)


class Sample:
    """Asks whether some elements of one weight differ in two pieces of memory.

    Nearly all refits change each weight, so that a few elements show it.
    """

    def __init__(
        self, layout: EngineLayout, memory: torch.Tensor, answer: torch.Tensor, kernels: Any
    ) -> None:
        """Choose the elements.

        Args:
            layout: Layout of both pieces.
            memory: The first piece, as ``uint8``.
            answer: The answer, one element on the same device: not 0 if they differ.
            kernels: The module of the kernels; None without Triton.
        """
        self._answer = answer
        name, self._place = next(iter(layout.places.items()))
        self._word = INTEGERS[layout.dtypes[name].itemsize]
        self._mine = self._some_of(memory)
        self._launch: Launch | None = None
        if kernels is not None and self._mine.is_contiguous():
            count = self._mine.numel()
            end = torch.tensor([count], dtype=torch.int32, device=answer.device)
            table = self._mine, end, answer
            self._launch = Launch(kernels.differ, -(-count // BLOCK), *table, BLOCK=BLOCK)

    def _some_of(self, memory: torch.Tensor) -> torch.Tensor:
        words, place = words_of(memory, self._word), self._place
        if place.is_dense:
            return words[place.start : min(place.end, place.start + _SAMPLE)]
        view = place.of_piece(words)
        return view[: max(1, _SAMPLE * len(view) // view.numel())]

    def ask(self, other: torch.Tensor) -> None:
        """Ask, on the current stream, and do not wait.

        Args:
            other: The second piece, as ``uint8``.
        """
        theirs = self._some_of(other)
        if self._launch is None or not self._launch(theirs):
            self._answer.bitwise_or_((self._mine != theirs).any())
