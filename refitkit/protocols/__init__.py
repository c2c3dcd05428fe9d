"""What plugin objects offer. Everything here is structural: no base class has to be inherited.

A backend opens or compiles a target into an :class:`OpenedModule`, which lists its
:class:`Engine` objects. A refit asks :class:`MappingStrategy` objects for a :class:`SlotValue` for
every slot, has each engine stage them, and commits. Verifiers judge the result.

What an engine may or may not be able to do is a protocol of its own: :class:`SupportsReadback`,
:class:`RemembersWeights`, :class:`SupportsPartial`, :class:`SupportsSpareBuffer`,
:class:`SupportsOverwrite`, :class:`SupportsWarming`, :class:`HoldsPrevious`. So it is with what is
staged (:class:`ShowsStaged`, :class:`ShowsMemory`), with opened modules (:class:`Offline`,
:class:`LowersPrecision`, :class:`ProbesFromState`) and sources (:class:`GivesPieces`,
:class:`HasNamings`, :class:`HoldsProgram`, :class:`KeepsMade`, :class:`KnowsRevisions`,
:class:`KnowsTies`, :class:`LeavesOut`, :class:`MadeOf`, :class:`MayChange`,
:class:`SupportsReread`).

Between a source and the names that a program reads stand :class:`WeightTransform` objects.
"""

from refitkit.protocols.backends import Backend, HoldsValues, KnowsPlanKey, PlanDraft, PlanKey
from refitkit.protocols.engines import (
    Engine,
    HoldsPrevious,
    Place,
    Places,
    RemembersWeights,
    ShowsMemory,
    ShowsStaged,
    SideBySide,
    SlotValue,
    StagedRefit,
    SupportsOverwrite,
    SupportsPartial,
    SupportsReadback,
    SupportsSpareBuffer,
    SupportsWarming,
)
from refitkit.protocols.modules import (
    LowersPrecision,
    Offline,
    OpenedModule,
    ProbesFromState,
    Rebuilds,
)
from refitkit.protocols.plans import BindableProgram, Plan
from refitkit.protocols.sources import (
    GivesPieces,
    HasNamings,
    HoldsProgram,
    KeepsMade,
    KnowsRevisions,
    KnowsTies,
    LeavesOut,
    MadeOf,
    MayChange,
    SupportsReread,
    WeightSource,
)
from refitkit.protocols.strategies import Mapped, MappingStrategy, MapRequest
from refitkit.protocols.tools import Tools
from refitkit.protocols.transforms import Made, TransformRequest, WeightGroup, WeightTransform
from refitkit.protocols.verifiers import Verifier, VerifyRequest

__all__ = [
    "Backend",
    "BindableProgram",
    "Engine",
    "GivesPieces",
    "HasNamings",
    "HoldsPrevious",
    "HoldsProgram",
    "HoldsValues",
    "KeepsMade",
    "KnowsPlanKey",
    "KnowsRevisions",
    "KnowsTies",
    "LeavesOut",
    "LowersPrecision",
    "Made",
    "MadeOf",
    "MapRequest",
    "Mapped",
    "MappingStrategy",
    "MayChange",
    "Offline",
    "OpenedModule",
    "Place",
    "Places",
    "Plan",
    "PlanDraft",
    "PlanKey",
    "ProbesFromState",
    "Rebuilds",
    "RemembersWeights",
    "ShowsMemory",
    "ShowsStaged",
    "SideBySide",
    "SlotValue",
    "StagedRefit",
    "SupportsOverwrite",
    "SupportsPartial",
    "SupportsReadback",
    "SupportsReread",
    "SupportsSpareBuffer",
    "SupportsWarming",
    "Tools",
    "TransformRequest",
    "Verifier",
    "VerifyRequest",
    "WeightGroup",
    "WeightSource",
    "WeightTransform",
]
