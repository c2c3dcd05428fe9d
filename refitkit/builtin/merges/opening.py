"""Descriptions of merges as sources: all parts opened, and every problem of all told at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from refitkit.builtin.merges.aligning import all_misfits
from refitkit.builtin.merges.arithmetic import average, task_sum
from refitkit.builtin.merges.sources import Formula, Merged
from refitkit.errors import Problem, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from refitkit.protocols import WeightSource

_SHOWN = 3


def open_average(
    given: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
    *,
    normalize: bool,
) -> WeightSource:
    """An average of any weights, each with its share."""
    shares = tuple(share for _, share in given)
    parts = _opened([part for part, _ in given], open_weights)
    what = "an average of " + _terms(shares, parts)
    formula = Formula(
        kind="average" if normalize else "sum",
        numbers=shares,
        counts=tuple(place for place, share in enumerate(shares) if share),
        keeps_equal=normalize,
        make=partial(average, keep_equal=normalize),
    )
    return Merged(parts, formula, what)


def open_task_vectors(
    base: object,
    tasks: Sequence[tuple[object, float]],
    open_weights: Callable[[object], WeightSource],
) -> WeightSource:
    """A base and task vectors of any weights, each with its scale."""
    scales = tuple(scale for _, scale in tasks)
    parts = _opened([base, *(task for task, _ in tasks)], open_weights)
    what = parts[0].description
    if scales:
        what += " with tasks of " + _terms(scales, parts[1:])
    formula = Formula(
        kind="task-vectors",
        numbers=(1.0, *scales),
        counts=(0, *(place for place, scale in enumerate(scales, 1) if scale)),
        keeps_equal=True,
        make=_with_tasks,
    )
    return Merged(parts, formula, what)


def _with_tasks(numbers: Sequence[float], values: Iterator[torch.Tensor]) -> torch.Tensor:
    return task_sum(numbers[1:], values)


def _opened(
    things: Sequence[object], open_weights: Callable[[object], WeightSource]
) -> tuple[WeightSource, ...]:
    """All parts.

    Raises:
        SourceError: Some cannot be read; lists what is wrong with them, and with all others.
    """
    opened: dict[int, WeightSource] = {}
    problems: list[Problem] = []
    for number, thing in enumerate(things, 1):
        try:
            opened[number] = open_weights(thing)
        except SourceError as exc:
            problems += [Problem(f"part {number}", "unreadable", hint=exc.message), *exc.problems]
    if problems:
        problems += all_misfits(opened) if opened else []
        raise SourceError("Parts of a merge cannot be read.", problems=problems)
    return tuple(opened.values())


def _terms(numbers: Sequence[float], parts: Sequence[WeightSource]) -> str:
    """``0.3 x 'a.safetensors', 0.7 x 'b.safetensors'``; not all of many."""
    shown = [f"{n:.4g} x {part.description}" for n, part in zip(numbers, parts, strict=True)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"({', '.join(shown[:_SHOWN])}{more})"
