"""Interfaces of the objects that plugins provide. All are structural: inherit from none of them.

A backend compiles or opens a target and returns an :class:`OpenedModule` with its :class:`Engine`
objects. A refit opens a :class:`WeightSource`. :class:`WeightTransform` objects turn its entries
into weights of the program. :class:`MappingStrategy` objects return a :class:`SlotValue` for each
slot. Each engine stages its values, then all engines commit. A :class:`Verifier` checks the result.

``docs/reference/protocols.md`` has every protocol with its members, without inherited ones.

What plugins implement, and the values that go in and out:

* ``Backend``: compiles programs, and reads the files that it saved
* ``PlanDraft``: the result of ``Backend.draft``: how slots get their values
* ``PlanKey``: what a plan depends on, for the plan cache
* ``OpenedModule``: a compiled module with one or more engines
* ``SharedMemory``: weights that several processes serve from
* ``Engine``: one unit of a module whose weights are replaced together
* ``StagedRefit``: new values of one engine that are not live yet
* ``Filling``: values of one engine that are staged as they arrive
* ``SlotValue``: a new value for one slot, computed when it is loaded
* ``SteadyValues``: values of one engine, for one refit after another
* ``WeightSource``: a set of weights, read lazily by name
* ``WeightTransform``: computes weights of the program from entries of a checkpoint
* ``TransformRequest``: the input of ``WeightTransform.groups``
* ``WeightGroup``: entries that are computed in one step
* ``Made``: the result of ``WeightGroup.make``
* ``MappingStrategy``: finds new values for slots
* ``MapRequest``: the input of ``MappingStrategy.map``
* ``Mapped``: the result of ``MappingStrategy.map``
* ``Verifier``: checks a refitted module
* ``VerifyRequest``: the input of ``Verifier.prepare``
* ``WeightTransport``: brings the weights of live updates to this process
* ``TransportConnection``: an open connection of a transport to a trainer

What refitkit implements and passes to plugins:

* ``Plan``: a plan that plugins read
* ``BindableProgram``: a program that was stored without its weights
* ``Tools``: services of the pipeline

Optional abilities are protocols of their own. refitkit checks for their members.

Abilities of backends, and of the parts that ``refitkit_partition`` returns:

* ``KnowsPlanKey``: plans can be stored in the plan cache
* ``HoldsValues``: a part knows the values of its engine, without an engine

Abilities of engines:

* ``SupportsReadback``: reads its live weights
* ``RemembersWeights``: cannot read them, and keeps those of the last refit
* ``ChecksFinite``: compares new values with remembered ones
* ``SupportsPartial``: writes some slots and keeps the others
* ``SupportsOverwrite``: writes over live weights, without a second set
* ``SupportsSpareBuffer``: has a second set of weights that can be freed
* ``HoldsPrevious``: keeps the values from before the last commit
* ``StagesGradually``: stages values as they arrive
* ``SupportsWarming``: prepares for its first refit
* ``TellsRoute``: takes new weights in one of several ways

Abilities of staged refits:

* ``ShowsStaged``: new values can be read before the commit

Abilities of opened modules:

* ``OpensStaged``: new values are verified before they are live, and calls never wait
* ``OrdersCalls``: calls return before their work on a device is done
* ``ServesSideBySide``: runs several calls at once
* ``SharesWeights``: several processes can share the weights
* ``ProbesFromState``: can be probed from another state than its present one
* ``Rebuilds``: finds slot values by converting a program again
* ``Offline``: cannot be called on this machine
* ``LowersPrecision``: computes a dtype in the precision of another one

Abilities of transforms:

* ``AttachesData``: keeps data in the plan, such as the scheme of a quantization
* ``ExplainsMissing``: says what to pass instead of a missing entry

Abilities of weight sources:

* ``KnowsRevisions``: recognizes an entry without reading it
* ``GivesPieces``: reads an entry piece by piece, or into the memory of an engine
* ``KnowsBits``: recognizes the bits of an entry that it has read
* ``KeepsMade``: keeps computed entries during one refit
* ``GivesAway``: has tensors that an engine may keep as its own memory
* ``MayChange``: reads data that others can write to
* ``SupportsReread``: reads files a second time and compares
* ``MadeOf``: computes its entries from another source
* ``LeavesOut``: has tensors that are no weights
* ``KnowsTies``: knows which names are one tensor
* ``HasNamings``: knows its weights by several sets of names
* ``HoldsProgram``: comes with the program of the weights
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
