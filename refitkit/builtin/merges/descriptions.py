"""The merges that users describe: which weights are merged, with which numbers.

Importing this module imports no torch, and describing a merge opens no weights.
"""

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
    """Weights computed from other weights. Pass a merge as weights, or as a part of a merge."""

    @abstractmethod
    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """Return a source of the merged weights. It reads headers now and data on demand.

        Args:
            open_weights: Opens any weights that refitkit accepts.

        Raises:
            SourceError: Some parts cannot be read, or they differ in names, dtypes or shapes. The
                error lists all problems of all parts.
        """


class WeightedAverage(Merge):
    """The average of several checkpoints of one model: ``sum(weight x part) / sum(weight)``.

    As in ``numpy.average``, weights need not sum to 1: ``{a: 1, b: 1}`` is the mean. Negative
    weights extrapolate. A part with weight 0 must fit, but its data is not read.

    All parts must have the same names, dtypes and shapes. Each result is on the device of the first
    part whose weight is not 0.

    Sums are accumulated in float32 (in float64 for float64), in the order of the parts. The result
    is rounded once, to the dtype of the parts. Real and imaginary parts of complex numbers are
    averaged separately. An element that is equal in all parts keeps the bits of the first part, so
    frozen layers keep their bits and masks keep their infinities. In other elements, NaN and
    infinities follow floating-point arithmetic.

    Integers, bools and 8-bit floats cannot be averaged: 8-bit floats mean nothing without their
    scales. They must be the same in all parts; otherwise the entry is unusable, which matters only
    if the program reads it.

    Attributes:
        parts: Weights and their shares. Shares sum to 1 if they are normalized.
        normalize: Whether shares are divided by their sum.
    """

    def __init__(
        self,
        parts: Mapping[Any, float] | Iterable[tuple[Any, float]],
        *,
        normalize: bool = True,
    ) -> None:
        """Describe an average.

        Args:
            parts: Any weights that refitkit accepts, each with its share: ``{"a.safetensors": 0.3,
                "b/": 0.7}``. Weights that cannot be keys are given in pairs: ``[(state_dict, 1),
                ...]``.
            normalize: If False, compute a plain weighted sum. Elements that are equal in all parts
                are then summed as all others are.

        Raises:
            ConfigError: There are no parts, a share is not a finite number, or the shares sum to 0
                (without ``normalize``: all shares are 0). The error lists all problems.
        """
        given = _pairs(parts, "an average")
        total = math.fsum(share for _, share in given)
        if not any(share for _, share in given) or (normalize and not _can_divide(given, total)):
            raise ConfigError(
                "Shares of an average cannot be divided by their sum.",
                problems=[Problem("sum", "shares", str(total), "a number that is not 0")],
                hint="Pass shares such as 0.3 and 0.7, or normalize=False for a plain sum.",
            )
        self.normalize = normalize
        # Divided here, so that equal descriptions (3 and 7, 0.3 and 0.7) have equal revisions.
        scale = total if normalize else 1.0
        self.parts = tuple((part, share / scale) for part, share in given)

    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """See ``Merge.open``."""
        from refitkit.builtin.merges.sources import open_average  # noqa: PLC0415 - imports torch

        return open_average(self.parts, open_weights, normalize=self.normalize)


class TaskVectors(Merge):
    """A base plus what fine-tuning changed: ``base + sum(scale x (fine-tuned - base))``.

    This is task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", 2022). Each
    difference is a task vector. Scales need not sum to 1; a negative scale makes the model forget
    a task. A task with scale 0 must fit, but its data is not read.

    All weights must have the names, dtypes and shapes of the base. Results are on its device.

    Differences are computed and summed in float32 (in float64 for float64), in the order of the
    tasks, and added to the base. The result is rounded once, to the dtype of the base. Real and
    imaginary parts of complex numbers are summed separately. An element that no task changes keeps
    the bits of the base, infinities included. In other elements, NaN and infinities follow
    floating-point arithmetic. Integers, bools and 8-bit floats must be the same everywhere: see
    :class:`WeightedAverage`.

    Attributes:
        base: Weights from which the tasks were fine-tuned.
        tasks: Fine-tuned weights and their scales.
    """

    def __init__(
        self, base: object, tasks: Mapping[Any, float] | Iterable[tuple[Any, float]]
    ) -> None:
        """Describe a sum of task vectors.

        Args:
            base: Any weights that refitkit accepts.
            tasks: Fine-tuned weights (not differences), each with its scale, in a mapping or in
                pairs.

        Raises:
            ConfigError: A scale is not a finite number. The error lists all problems.
        """
        self.base = base
        self.tasks = _pairs(tasks, "task vectors", may_be_empty=True)

    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:
        """See ``Merge.open``."""
        from refitkit.builtin.merges.sources import open_task_vectors  # noqa: PLC0415 - as above

        return open_task_vectors(self.base, self.tasks, open_weights)


def _can_divide(given: Iterable[tuple[object, float]], total: float) -> bool:
    """Return whether every share divided by the sum is finite."""
    # Shares such as 1e308, -1e308 and 1e-320 have a sum other than 0 and infinite quotients.
    return bool(total) and all(math.isfinite(share / total) for _, share in given)


def _pairs(given: Any, merge: str, *, may_be_empty: bool = False) -> tuple[tuple[Any, float], ...]:
    """Return pairs of weights and a number, from a mapping or from pairs.

    Args:
        given: Argument of the user.
        merge: Name of the merge for error messages.
        may_be_empty: Whether a merge without parts is valid.

    Raises:
        ConfigError: An item is not a pair of weights and a finite number. The error lists all
            problems.
    """
    # A string is an iterable of its letters, but surely meant as one path.
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(
            f"The parts of {merge} must be a mapping or pairs, not a {type(given).__name__}.",
            hint="Write [(weights, 0.3), (others, 0.7)].",
        )
    items = list(given.items() if isinstance(given, Mapping) else given)
    problems = list(_invalid_items(items))
    if not items and not may_be_empty:
        problems.append(Problem("parts", "missing", "none", "at least one"))
    if problems:
        hint = "Write [(weights, 0.3), (others, 0.7)] with finite numbers."
        raise ConfigError(f"The parts of {merge} are invalid.", problems=problems, hint=hint)
    return tuple((part, float(number)) for part, number in items)


def _invalid_items(items: Iterable[Any]) -> Iterator[Problem]:
    """Yield a problem for each item that is not a pair of weights and a finite number."""
    for number, item in enumerate(items, 1):
        if not (isinstance(item, tuple | list) and len(item) == 2):  # noqa: PLR2004 - a pair
            yield Problem(f"part {number}", "not a pair", type(item).__name__, "(weights, number)")
        # bool is a subclass of int, but True is more likely a mistake than a share of 1.
        elif isinstance(item[1], bool) or not isinstance(item[1], Real):
            yield Problem(f"part {number}", "no number", repr(item[1]), "a finite number")
        elif not math.isfinite(item[1]):
            yield Problem(f"part {number}", "not finite", repr(item[1]), "a finite number")
