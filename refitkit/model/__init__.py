"""Frozen values that carry data between packages. None of them imports torch.

Values that are stored in files or shown to users are pydantic models. Events are dataclasses: they
are never stored, and are created often. ``docs/reference/protocols.md`` has the fields of events
and of the values that plugins construct. ``help`` of one class begins with its fields; the members
that pydantic adds to each model come after them.

Slots and tensors (``slot.py``):

* ``Slot``: one weight of an engine, as the engine describes it
* ``SlotKey``: ``(engine, slot)``, the key of a slot in a module
* ``TensorInfo``: dtype and shape of a source's entry
* ``LayerType``: one type of TensorRT network layer that has weights
* ``ITEM_BYTES``: bytes per element, by the name of the dtype

Events for the hook ``refitkit_event`` (``events.py``):

* ``Event``: the base class
* ``Started``: an operation has started
* ``StageStarted``: a stage has started
* ``Step``: a step of a stage has ended
* ``StageFinished``: a stage has ended without an error
* ``StageFailed``: a stage has ended with an error, or was interrupted
* ``Finished``: an operation has succeeded
* ``Failed``: an operation has failed
* ``Aborted``: an operation was interrupted

Rules for names and layouts of weights (``rules.py``):

* ``Rules``: the setting ``Config.rules``
* ``Rename``: replaces names of entries
* ``Pack``: a weight that is one tensor in one layout and several in another

Reports (``report.py``):

* ``RefitReport``: the report of one refit
* ``ReportRow``: one slot in it
* ``StageTime``: the duration of one stage
* ``ChangeRow``: the distance between the old and the new value of one slot
* ``StateRow``: the effect on one slot that calls of the module write
* ``TransformRow``: one group of entries that a transform computed
* ``EngineMemory``: the memory that an engine uses for a rollback
* ``EngineRoute``: the way in which an engine got its weights
* ``KeptWeights``: earlier weights that a module can restore
* ``VerificationResult``: the verdict of a verifier
* ``OutputMeasure``: one comparison of a verifier or a transform
* ``Metric``: one number of it beside the largest error, with its limit
* ``DiffReport``: the differences between two sets of weights
* ``DiffRow``: one tensor in it

Live updates (``update.py``):

* ``UpdateManifest``: all tensors of an update, and what it is for
* ``UpdateEntry``: one tensor in it

Plans (``plan.py``):

* ``PlanData``: a plan for all engines of one module
* ``FORMAT``: name and version of its format
* ``LedgerRow``: one slot and the origin of its value
* ``SlotState``: where the value of a slot comes from
* ``Leaf``: one tensor that a program reads
* ``LeafKind``: parameter, buffer or constant
* ``Overlap``: the position of one leaf in the memory of another
* ``PinnedTensor``: one tensor that the plan stores
* ``Guard``: a value that must be as it was at planning time
* ``Need``: an object of a plugin that the plan depends on
* ``Fingerprint``: the identity of the program and the engines
* ``fingerprint_of_slots``: computes the part of it that is about slots

Recipes in plans (``plan.py``):

* ``OpCall``: one call of an aten op
* ``Value``: the origin of a tensor: one of the three references
* ``SourceRef``: a reference to a tensor of the weight source
* ``PinnedRef``: a reference to a tensor that the plan stores
* ``CallRef``: a reference to a result of an earlier call
* ``Argument``: one argument of a call
* ``Tensor``: dtype and shape of a result of a call
* ``TorchName``: a constant of torch, such as a dtype
* ``Number``: a number that JSON cannot represent
"""

from refitkit.model.events import (
    Aborted,
    Event,
    Failed,
    Finished,
    StageFailed,
    StageFinished,
    StageStarted,
    Started,
    Step,
)
from refitkit.model.plan import (
    FORMAT,
    Argument,
    CallRef,
    Fingerprint,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    Need,
    Number,
    OpCall,
    Overlap,
    PinnedRef,
    PinnedTensor,
    PlanData,
    SlotState,
    SourceRef,
    Tensor,
    TorchName,
    Value,
    fingerprint_of_slots,
)
from refitkit.model.report import (
    ChangeRow,
    DiffReport,
    DiffRow,
    EngineMemory,
    EngineRoute,
    KeptWeights,
    Metric,
    OutputMeasure,
    RefitReport,
    ReportRow,
    StageTime,
    StateRow,
    TransformRow,
    VerificationResult,
)
from refitkit.model.rules import Pack, Rename, Rules
from refitkit.model.slot import ITEM_BYTES, LayerType, Slot, SlotKey, TensorInfo
from refitkit.model.update import UpdateEntry, UpdateManifest

__all__ = [
    "FORMAT",
    "ITEM_BYTES",
    "Aborted",
    "Argument",
    "CallRef",
    "ChangeRow",
    "DiffReport",
    "DiffRow",
    "EngineMemory",
    "EngineRoute",
    "Event",
    "Failed",
    "Fingerprint",
    "Finished",
    "Guard",
    "KeptWeights",
    "LayerType",
    "Leaf",
    "LeafKind",
    "LedgerRow",
    "Metric",
    "Need",
    "Number",
    "OpCall",
    "OutputMeasure",
    "Overlap",
    "Pack",
    "PinnedRef",
    "PinnedTensor",
    "PlanData",
    "RefitReport",
    "Rename",
    "ReportRow",
    "Rules",
    "Slot",
    "SlotKey",
    "SlotState",
    "SourceRef",
    "StageFailed",
    "StageFinished",
    "StageStarted",
    "StageTime",
    "Started",
    "StateRow",
    "Step",
    "Tensor",
    "TensorInfo",
    "TorchName",
    "TransformRow",
    "UpdateEntry",
    "UpdateManifest",
    "Value",
    "VerificationResult",
    "fingerprint_of_slots",
]
