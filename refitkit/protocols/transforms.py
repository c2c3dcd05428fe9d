"""What happens to weights on their way to the names that a program reads: quantized, packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    import torch

    from refitkit.model import OutputMeasure, TensorInfo
    from refitkit.protocols.plans import Plan
    from refitkit.protocols.sources import WeightSource


@dataclass(frozen=True)
class TransformRequest:
    """What a transform is asked.

    Attributes:
        plan: The plan; its leaves are what the program reads.
        source: The weights as they were given, or as transforms of lower priority made them. Read
            names and infos now, data in ``make``.
        partial: Whether slots that the source has nothing for keep their present values.
    """

    plan: Plan
    source: WeightSource
    partial: bool = False


@dataclass(frozen=True)
class Made:
    """What a group made.

    Attributes:
        values: A tensor for each name in ``gives``, with the dtype and shape that were announced.
        measures: How far it is from what was taken, such as the error of quantization, under the
            names in ``gives``. One that is not ok fails the verification, before a weight is live.
    """

    values: Mapping[str, torch.Tensor]
    measures: tuple[OutputMeasure, ...] = ()


@dataclass(frozen=True)
class WeightGroup:
    """Entries that are made together, from entries that are used up: a weight and its scale.

    Attributes:
        takes: Names of the source that it is made from. They are no weights of the program any
            more, unless ``gives`` has them.
        gives: What it makes, all or none: dtype and shape by FQN. They are leaves of the plan, or
            what a later transform takes.
        make: Reads what it takes and makes what it gives; the same each time. It may be called
            several times in one refit: once for every look at the values.
        formula: What stands for ``make`` in this process: groups of one plugin with equal formulas
            make equal bits of equal entries, so that a refit with ``delta`` need not read what has
            a revision (see :class:`KnowsRevisions`). None: only reading tells.
        note: What users should know of it, for the notes of the report; the same text is shown
            once, however many groups have it.
    """

    takes: tuple[str, ...]
    gives: Mapping[str, TensorInfo]
    make: Callable[[], Made]
    formula: Hashable | None = None
    note: str = ""


@runtime_checkable
class WeightTransform(Protocol):
    """One way to make what a program reads from what a checkpoint has."""

    @property
    def name(self) -> str:
        """Its name, for reports and messages."""

    @property
    def priority(self) -> int:
        """They are asked from the lowest to the highest, each about what those before it made.

        Those of one priority are asked about the same source, and may not make the same entry.
        Built in: names 10, packing 20, casts 30. Quantizing comes after those: 50.
        """

    def groups(self, request: TransformRequest) -> Iterable[WeightGroup]:
        """What it makes of this source; nothing where it has no part in it.

        It leaves alone what a program reads as it is, or gives that unchanged, to measure it.

        Raises:
            WeightMismatchError: Entries belong to it and cannot be used, such as a scale without
                its weight; lists all of them.
        """
