"""Weight transforms: objects that turn entries of a checkpoint into weights of a program.

A transform quantizes, packs, casts or renames. A plugin offers transforms with the hook
``refitkit_weight_transforms``. Read :class:`WeightTransform` first, then :class:`WeightGroup`.
The optional abilities are :class:`AttachesData` and :class:`ExplainsMissing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    import torch
    from pydantic import JsonValue

    from refitkit.model import OutputMeasure, TensorInfo
    from refitkit.protocols.modules import OpenedModule
    from refitkit.protocols.plans import Plan
    from refitkit.protocols.sources import WeightSource


@dataclass(frozen=True)
class TransformRequest:
    """The input of ``WeightTransform.groups``.

    Attributes:
        plan: Plan of the refit. Its leaves are the weights that the program reads.
        source: Weights as the user passed them, or as transforms of lower priority returned them.
            In ``groups`` read names and infos only; read data in ``WeightGroup.make``.
        partial: Whether slots that the source has no weights for keep their present values.
        module: The opened target, with its present weights. None if there is none, as in a
            comparison of two sources. Do not call it and do not write to it.
        attached: What this transform attached to the plan (:class:`AttachesData`), else None. A
            file may contain any JSON: check it. Do not change it.
    """

    plan: Plan
    source: WeightSource
    partial: bool = False
    module: OpenedModule | None = None
    attached: JsonValue = None


@dataclass(frozen=True)
class Made:
    """The result of ``WeightGroup.make``.

    Attributes:
        values: One tensor for each name in ``WeightGroup.gives``, with the announced dtype and
            shape.
        measures: Errors of the values, such as the quantization error, by the names in ``gives``.
            If one is not ``ok``, refitkit raises ``VerificationError`` before the commit.
    """

    values: Mapping[str, torch.Tensor]
    measures: tuple[OutputMeasure, ...] = ()


@dataclass(frozen=True)
class WeightGroup:
    """Entries that are computed in one step from other entries: a quantized weight and its scale.

    Attributes:
        takes: Names of the source that the step reads. They are then no longer part of the
            weights, unless ``gives`` contains them too.
        gives: Dtype and shape of each result, by FQN. A result is a leaf of the plan, or an entry
            that a later transform takes.
        make: Reads the entries in ``takes`` and returns all results. It must return the same bits
            each time. refitkit calls it before and during staging, once for each read of a result
            unless the last group that was computed is the same.
        formula: Stands for ``make`` within this process. Groups of one plugin with equal formulas
            compute equal bits from equal entries. A refit with ``delta`` then skips entries that
            have a revision; see :class:`KnowsRevisions`. None: entries have to be read.
        note: Text for the notes of the report. refitkit shows equal texts once.
    """

    takes: tuple[str, ...]
    gives: Mapping[str, TensorInfo]
    make: Callable[[], Made]
    formula: Hashable | None = None
    note: str = ""


@runtime_checkable
class WeightTransform(Protocol, metaclass=Ability):
    """A method to compute weights of the program from entries of a checkpoint."""

    @property
    def name(self) -> str:
        """Name of the transform, for reports and messages."""

    @property
    def priority(self) -> int:
        """Rank of the transform: lower ones run first, and higher ones see their results.

        Transforms of equal priority get the same source, and must not compute the same entry.
        Built-in priorities: names 10, packing 20, casts 30. Quantization comes after those: 50.
        """

    def groups(self, request: TransformRequest) -> Iterable[WeightGroup]:
        """Return the groups that this transform computes from the source.

        Called when weights meet a plan: in each refit right after the weights are opened, and for
        ``refitkit.verify`` and ``refitkit diff``. If a source has several sets of names, it is
        called for each set. Leave out entries that the program reads as they are, or return them
        unchanged to measure them.

        Returns:
            No groups if the source has no entries for this transform.

        Raises:
            WeightMismatchError: Some entries are meant for this transform and cannot be used, such
                as a scale without its weight. It lists all of them.
        """


# -- optional abilities -----------------------------------------------------------------------


@runtime_checkable
class AttachesData(Protocol, metaclass=Ability):
    """A transform that keeps data in the plan, such as the scheme of a quantization.

    The data travels with the plan: in plan files and in saved modules. The transform gets it back
    in :attr:`TransformRequest.attached`, in any process. A plan with data of a transform needs that
    transform: refitkit refuses a refit without it.

    Asked by: ``compile`` and ``plan``.
    Gain: users give the scheme once, where they compile; refits need no settings.
    """

    def attach(self, program: torch.export.ExportedProgram, plan: Plan) -> JsonValue:
        """Return what the plan keeps for this transform; None for nothing.

        Called each time a plan is made or read from the plan cache, before it is proved.

        Args:
            program: The program that is compiled or planned; do not change it.
            plan: Its plan, without attached data.

        Returns:
            A value of JSON: dicts with text as keys, lists, text, finite numbers, booleans, None.
            As text it may have 16 MiB.

        Raises:
            RefitError: The program cannot be planned with this transform. Any other exception
                becomes a ``PluginError`` that names the transform.
        """


@runtime_checkable
class ExplainsMissing(Protocol, metaclass=Ability):
    """A transform that says which entries of a checkpoint replace a missing entry.

    Asked by: refits and ``verify``, when they are refused because entries are missing.
    Gain: the error says what to pass, and not only what the program reads.
    """

    def explain_missing(
        self, request: TransformRequest, missing: Sequence[str]
    ) -> Mapping[str, str]:
        """Return what to pass instead of missing entries, for the hints of the error.

        Called when a refit is refused because entries are missing.

        Args:
            request: The request of the refit. Its source has the weights as the user passed them.
            missing: FQNs that the program reads and the source lacks, after all transforms.

        Returns:
            A text for those entries that this transform could make, by FQN: ``pass '0.weight'``. A
            comma and "from which ..." may follow. No text for the others.
        """
