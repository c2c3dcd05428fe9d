"""What users write: which weights are merged, and how. No torch, and nothing is opened yet."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.protocols import WeightSource


class Merge(ABC):
    """Weights that are made of others. Pass one wherever weights are taken, also as a part."""

    @abstractmethod
    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """The weights as they are read; headers now, data on demand.

        Args:
            open_weights: Opens anything that a user calls weights.

        Raises:
            SourceError: Parts cannot be read or do not fit together; lists all problems of all.
        """


class WeightedAverage(Merge):
    """The average of several checkpoints of one model: ``sum(weight x part) / sum(weight)``.

    As ``numpy.average`` has it, weights need not sum to 1: ``{a: 1, b: 1}`` is the mean. They may
    be negative, which extrapolates. A part with weight 0 has to fit, and is not read.

    Sums are made in float32 (float64 for float64, real and imaginary parts of complex numbers
    each), in the order of the parts, and rounded once to the parts' dtype. An element that is equal
    in all parts stays what it is in the first, so that frozen layers keep their bits and masks
    their infinities; of elements that differ, NaN and infinities go the way of floating point.
    Integers, bools and the 8-bit floats, which mean nothing without their scales, have to be the
    same in all parts: others are unusable, which matters where the program reads them.

    All parts must have the same names, dtypes and shapes. Each result is on the device of the first
    part that counts.

    Attributes:
        parts: Weights and their share, as numbers that sum to 1 if they are normalized.
        normalize: Whether they are divided by their sum.
    """

    def __init__(
        self,
        parts: Mapping[Any, float] | Iterable[tuple[Any, float]],
        *,
        normalize: bool = True,
    ) -> None:
        """Describe it.

        Args:
            parts: Anything that is called weights, each with its share: ``{"a.safetensors": 0.3,
                "b/": 0.7}``, or pairs, for weights that cannot be keys: ``[(state_dict, 1), ...]``.
            normalize: False: a plain weighted sum. Elements that are equal in all parts are then
                summed as all others.

        Raises:
            ConfigError: There are no parts, shares that are no finite numbers, or they sum to 0
                (to nothing but 0 where they are not normalized); lists all problems.
        """
        given = _pairs(parts, "an average")
        total = math.fsum(share for _, share in given)
        if not any(share for _, share in given) or (normalize and not _divides(total, given)):
            raise ConfigError(
                "Shares of an average cannot be divided by their sum.",
                problems=[Problem("sum", "shares", str(total), "a number that is not 0")],
                hint="Pass shares such as 0.3 and 0.7; normalize=False for sums of any shares.",
            )
        self.normalize = normalize
        scale = total if normalize else 1.0
        self.parts = tuple((part, share / scale) for part, share in given)

    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """See ``Merge``."""
        from refitkit.builtin.merges.sources import open_average  # noqa: PLC0415 - imports torch

        return open_average(self.parts, open_weights, normalize=self.normalize)


class TaskVectors(Merge):
    """A base and what fine-tuning added to it: ``base + sum(scale x (fine-tuned - base))``.

    Task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", 2022): each difference
    is a task; scales may be negative, to forget one, and need not sum to anything. A task with
    scale 0 has to fit, and is not read.

    Differences are made and summed in float32 (float64 for float64, real and imaginary parts of
    complex numbers each), in the order of the tasks, added to the base, and rounded once to its
    dtype. An element that no task changes keeps the bits of the base, infinities included; of
    others, NaN and infinities go the way of floating point. Integers, bools and the 8-bit floats
    have to be the same everywhere: see :class:`WeightedAverage`.

    All weights must have the names, dtypes and shapes of the base. Results are on its device.

    Attributes:
        base: What the tasks began with.
        tasks: Fine-tuned weights, and by how much they count.
    """

    def __init__(
        self, base: object, tasks: Mapping[Any, float] | Iterable[tuple[Any, float]]
    ) -> None:
        """Describe it.

        Args:
            base: Anything that is called weights.
            tasks: Fine-tuned weights, not differences, each with its scale; as mapping or pairs.

        Raises:
            ConfigError: Scales are no finite numbers; lists all problems.
        """
        self.base = base
        self.tasks = _pairs(tasks, "task vectors", may_be_empty=True)

    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """See ``Merge``."""
        from refitkit.builtin.merges.sources import open_task_vectors  # noqa: PLC0415 - as above

        return open_task_vectors(self.base, self.tasks, open_weights)


def _divides(total: float, given: Iterable[tuple[object, float]]) -> bool:
    """Whether a sum is a number that shares can be divided by."""
    return bool(total) and all(math.isfinite(share / total) for _, share in given)


def _pairs(given: Any, what: str, *, may_be_empty: bool = False) -> tuple[tuple[Any, float], ...]:
    """Parts and numbers of any way to write them."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(
            f"Parts of {what} are a mapping or pairs, not a {type(given).__name__}.",
            hint="Write [(weights, 0.3), (others, 0.7)].",
        )
    listed = list(given.items() if isinstance(given, Mapping) else given)
    problems = list(_odd(listed))
    if not listed and not may_be_empty:
        problems.append(Problem("parts", "missing", "none", "at least one"))
    if problems:
        hint = "Write [(weights, 0.3), (others, 0.7)]: finite numbers."
        raise ConfigError(f"These are no parts of {what}.", problems=problems, hint=hint)
    return tuple((part, float(number)) for part, number in listed)


def _odd(listed: Iterable[Any]) -> Iterator[Problem]:
    for number, pair in enumerate(listed, 1):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):  # noqa: PLR2004 - a pair
            yield Problem(f"part {number}", "no pair", type(pair).__name__, "(weights, number)")
        elif isinstance(pair[1], bool) or not isinstance(pair[1], Real):
            yield Problem(f"part {number}", "no number", repr(pair[1]), "a finite number")
        elif not math.isfinite(pair[1]):
            yield Problem(f"part {number}", "not finite", repr(pair[1]), "a finite number")
