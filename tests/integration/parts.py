"""Models that show their weights in their outputs, and calls of them beside refits.

A mixture of two sets of weights, or of two values of one weight, shows in an answer.
"""

from __future__ import annotations

import itertools
import operator
import threading
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import nn

import refitkit
from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from refitkit.builtin.aotinductor.publishing import PublishingEngine
    from refitkit.testing.oracles import Storage

SECONDS = 60
"""Longer than anything takes: only what waits for ever fails."""

PARTS, SIZE = 4, 1 << 16
NAMES = (*(f"parts.{number}" for number in range(PARTS)), "table")
AT = torch.tensor([0, 2])
State: TypeAlias = "tuple[float, ...]"
"""The number that all elements of each slot have."""


class Parts(nn.Module):
    """Weights whose least and largest elements are the outputs, and a table to look up in."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(SIZE) for _ in range(PARTS))
        self.table = nn.Parameter(torch.zeros(4, 3))

    def forward(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [torch.stack([part.min(), part.max()]) for part in self.parts]
        return torch.stack(ends), self.table.index_select(0, at)


class Tally(nn.Module):
    """A large buffer that each call counts up, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.weight


def save(model: nn.Module, example: torch.Tensor, folder: Path) -> Path:
    """Compile a model, and return the path of the saved module."""
    program = torch.export.export(model.eval(), (example,))
    # One thread for each call, so that several run at once on few cores.
    compiled = refitkit.compile(program, options={"cpp.threads": 1}, prove=False)
    compiled.save(folder / "module.refit")
    return folder / "module.refit"


# -- weights and answers --------------------------------------------------------------------------


def weights(number: float, names: Sequence[str] = NAMES) -> dict[str, torch.Tensor]:
    """New tensors whose elements are all one number."""
    shapes = {name: (4, 3) if name == "table" else (SIZE,) for name in names}
    return {name: torch.full(shape, float(number)) for name, shape in shapes.items()}


def values(
    engine: PublishingEngine, tensors: Mapping[str, torch.Tensor], *, keepable: bool = False
) -> list[SlotValue]:
    keep = (lambda _: True) if keepable else None
    return [
        SlotValue(engine.slots[name], "test", (name,), lambda one=one: one, keepable=keep)
        for name, one in tensors.items()
    ]


def commit(engine: PublishingEngine, number: float, **how: Any) -> Any:
    """Refit all slots without the pipeline."""
    staged = engine.stage(values(engine, weights(number), **how))
    staged.commit()
    return staged


def commit_some(engine: PublishingEngine, number: float, names: Sequence[str]) -> Any:
    """Refit some slots without the pipeline."""
    staged = engine.stage_partial(values(engine, weights(number, names)))
    staged.commit()
    return staged


def answered(outputs: tuple[torch.Tensor, torch.Tensor]) -> State:
    """The number that each weight had in a call.

    Raises:
        AssertionError: A weight had several.
    """
    ends, rows = outputs
    found = [*ends.tolist(), [float(rows.min()), float(rows.max())]]
    assert all(low == high for low, high in found), f"a torn weight: {found}"
    return tuple(low for low, _ in found)


def answer(module: Any) -> State:
    return answered(module.run((AT,), {}))


def state(number: float) -> State:
    return (float(number),) * len(NAMES)


def undo(engine: PublishingEngine, number: float, between: Callable[[], Any] = int) -> None:
    """Refit all slots, do something, and take the refit back without copies."""
    commit(engine, number)
    between()
    engine.stage(values(engine, engine.previous())).commit()


def over(engine: PublishingEngine, number: float) -> None:
    """Refit all slots without a way back."""
    engine.stage_over(values(engine, weights(number))).commit()


def alive(sets: list[list[Storage]]) -> int:
    """How many storages are still in use."""
    return len({one.key for some in sets for one in some if not one.expired()})


# -- threads --------------------------------------------------------------------------------------


class Inside(threading.Thread):
    """A call that stops in its turn, before the library runs, until it may go on."""

    def __init__(self, do: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.entered, self.go_on = threading.Event(), threading.Event()
        self._do, self.result = do, None
        self.start()
        assert self.entered.wait(SECONDS)

    def run(self) -> None:
        self.result = self._do()

    def finish(self) -> Any:
        """Let it go on; what it returned."""
        self.go_on.set()
        self.join(SECONDS)
        assert not self.is_alive()
        return self.result


class Callers:
    """Threads that call again and again, until the end of a ``with`` block.

    Attributes:
        found: What each thread was answered, in the order of its calls.
    """

    def __init__(self, *calls: Callable[[], Any]) -> None:
        self.found: list[list[Any]] = [[] for _ in calls]
        self._failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=pair, daemon=True)
            for pair in zip(calls, self.found, strict=True)
        ]

    def _repeat(self, do: Callable[[], Any], results: list[Any]) -> None:
        try:
            while not self._stop.is_set():
                results.append(do())
        except BaseException as exc:  # noqa: BLE001 - raised by ``__exit__``
            self._failures.append(exc)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS)
        if self._failures:
            raise self._failures[0]
        assert not any(thread.is_alive() for thread in self._threads)

    def steps(self, least: int) -> Iterator[int]:
        """Count from 1, until there are as many steps, and as many calls of each thread."""
        for number in itertools.count(1):
            yield number
            if self._failures or (number >= least and min(map(len, self.found)) >= least):
                return

    def wait(self) -> None:
        """Wait until each thread has made a whole call."""
        wanted = [len(results) + 2 for results in self.found]
        while not self._failures and any(map(operator.lt, map(len, self.found), wanted)):
            self._stop.wait(1e-4)
