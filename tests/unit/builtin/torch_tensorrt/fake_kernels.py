"""The kernels of direct refits as plain Python, for memory of the CPU."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Launcher:
    """``kernel[grid](...)``."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return self.run


def _copy(target: Any, sources: Any, starts: Any, rows: Any, _tiles: Any, **_: Any) -> None:
    size = target.element_size()
    each = zip(sources.tolist(), starts.tolist(), rows.flatten().tolist(), strict=True)
    for source, start, count in each:
        ctypes.memmove(target.data_ptr() + start * size, source, count * size)


def _turn(target: Any, sources: Any, starts: Any, rows: Any, _tiles: Any, **_: Any) -> None:
    size = target.element_size()
    for source, start, row in zip(sources.tolist(), starts.tolist(), rows.tolist(), strict=True):
        digits = [row[at : at + 3] for at in range(4, len(row), 5)]
        for index in product(*(range(count) for count, _, _ in digits)):
            steps = list(zip(index, digits, strict=True))
            read = source + size * sum(i * digit[1] for i, digit in steps)
            written = start + sum(i * digit[2] for i, digit in steps)
            ctypes.memmove(target.data_ptr() + written * size, read, size)


def _screen(
    found: Any, words: Any, sources: Any, counts: Any, masks: Any, _tiles: Any, **_: Any
) -> None:
    each = zip(sources.tolist(), counts.tolist(), masks.tolist(), strict=True)
    for source, count, mask in each:
        raw = ctypes.string_at(source, count * words.element_size())
        values = torch.frombuffer(bytearray(raw), dtype=words.dtype)
        if bool(((values & mask) == mask).any()):
            found.fill_(1)


def _differ(other: Any, words: Any, end: Any, found: Any, **_: Any) -> None:
    count = int(end)
    if not torch.equal(other[:count], words[:count]):
        found.fill_(1)


def _fold(target: Any, values: Any, rows: Any, **_: Any) -> None:
    for row in rows:
        weight, bias, mean, var, eps = (values[at] for at in row[:5])
        scale = weight / (var + eps).double().sqrt().to(weight.dtype)
        target[row[5]] = scale
        target[row[6]] = (bias.double() - mean.double() * scale.double()).to(weight.dtype)


def _fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("there is no C compiler")


class NoKernels:
    """Kernels that cannot be compiled."""

    copy = turn = screen = differ = fold = Launcher(_fails)


class FakeKernels:
    """The module of the kernels."""

    copy, turn, screen = Launcher(_copy), Launcher(_turn), Launcher(_screen)
    differ, fold = Launcher(_differ), Launcher(_fold)
