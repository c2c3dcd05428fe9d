"""Interfaces of the objects that plugins provide. All are structural: inherit from none of them.

A backend compiles or opens a target and returns an :class:`OpenedModule` with its :class:`Engine`
objects. A refit opens a :class:`WeightSource`. :class:`WeightTransform` objects turn its entries
into weights of the program. :class:`MappingStrategy` objects return a :class:`SlotValue` for each
slot. Each engine stages its values, then all engines commit. A :class:`Verifier` checks the result.

A :class:`WeightTransport` brings the weights of live updates.

:class:`Plan`, :class:`BindableProgram` and :class:`Tools` are what refitkit passes to plugins.

Optional abilities are protocols of their own. refitkit checks for their members:

* backends: :class:`KnowsPlanKey`; parts of a program: :class:`HoldsValues`;
* engines: :class:`SupportsReadback`, :class:`RemembersWeights`, :class:`ChecksFinite`,
  :class:`SupportsPartial`,
  :class:`SupportsOverwrite`, :class:`SupportsSpareBuffer`, :class:`HoldsPrevious`,
  :class:`StagesGradually` (with :class:`Filling`), :class:`SupportsWarming`, :class:`TellsRoute`;
* staged refits: :class:`ShowsStaged`;
* opened modules: :class:`Offline`, :class:`LowersPrecision`, :class:`OpensStaged`,
  :class:`OrdersCalls`, :class:`ProbesFromState`, :class:`Rebuilds`, :class:`ServesSideBySide`,
  :class:`SharesWeights`;
* transforms: :class:`AttachesData`, :class:`ExplainsMissing`;
* sources: :class:`GivesAway`, :class:`GivesPieces`, :class:`HasNamings`, :class:`HoldsProgram`,
  :class:`KeepsMade`, :class:`KnowsBits`, :class:`KnowsRevisions`, :class:`KnowsTies`,
  :class:`LeavesOut`, :class:`MadeOf`, :class:`MayChange`, :class:`SupportsReread`.
"""

from refitkit.protocols.backends import Backend, HoldsValues, KnowsPlanKey, PlanDraft, PlanKey
from refitkit.protocols.engines import (
    ChecksFinite,
    Engine,
    Filling,
    HoldsPrevious,
    RemembersWeights,
    ShowsStaged,
    SlotValue,
    StagedRefit,
    StagesGradually,
    SteadyValues,
    SupportsOverwrite,
    SupportsPartial,
    SupportsReadback,
    SupportsSpareBuffer,
    SupportsWarming,
    TellsRoute,
)
from refitkit.protocols.modules import (
    LowersPrecision,
    Offline,
    OpenedModule,
    OpensStaged,
    OrdersCalls,
    ProbesFromState,
    Rebuilds,
    ServesSideBySide,
    SharedMemory,
    SharesWeights,
)
from refitkit.protocols.plans import BindableProgram, Plan
from refitkit.protocols.sources import (
    GivesAway,
    GivesPieces,
    HasNamings,
    HoldsProgram,
    KeepsMade,
    KnowsBits,
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
from refitkit.protocols.transforms import (
    AttachesData,
    ExplainsMissing,
    Made,
    TransformRequest,
    WeightGroup,
    WeightTransform,
)
from refitkit.protocols.transports import TransportConnection, WeightTransport
from refitkit.protocols.verifiers import Verifier, VerifyRequest

__all__ = [
    "AttachesData",
    "Backend",
    "BindableProgram",
    "ChecksFinite",
    "Engine",
    "ExplainsMissing",
    "Filling",
    "GivesAway",
    "GivesPieces",
    "HasNamings",
    "HoldsPrevious",
    "HoldsProgram",
    "HoldsValues",
    "KeepsMade",
    "KnowsBits",
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
    "OpensStaged",
    "OrdersCalls",
    "Plan",
    "PlanDraft",
    "PlanKey",
    "ProbesFromState",
    "Rebuilds",
    "RemembersWeights",
    "ServesSideBySide",
    "SharedMemory",
    "SharesWeights",
    "ShowsStaged",
    "SlotValue",
    "StagedRefit",
    "StagesGradually",
    "SteadyValues",
    "SupportsOverwrite",
    "SupportsPartial",
    "SupportsReadback",
    "SupportsReread",
    "SupportsSpareBuffer",
    "SupportsWarming",
    "TellsRoute",
    "Tools",
    "TransformRequest",
    "TransportConnection",
    "Verifier",
    "VerifyRequest",
    "WeightGroup",
    "WeightSource",
    "WeightTransform",
    "WeightTransport",
]
