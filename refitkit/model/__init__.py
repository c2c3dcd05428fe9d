"""Values: data only, frozen, free of torch. What is stored or shown is a pydantic model."""

from refitkit.model.diff import DiffReport, DiffRow
from refitkit.model.events import Event, StageFinished, StageStarted, Step
from refitkit.model.layers import LayerType
from refitkit.model.plan import (
    FORMAT,
    Fingerprint,
    Leaf,
    LeafKind,
    LedgerRow,
    PinnedTensor,
    PlanData,
    SlotState,
    fingerprint_of_slots,
)
from refitkit.model.recipe import (
    Argument,
    CallRef,
    Guard,
    Number,
    OpCall,
    PinnedRef,
    SourceRef,
    Tensor,
    TorchName,
    Value,
)
from refitkit.model.report import (
    ChangeRow,
    EngineMemory,
    KeptWeights,
    OutputMeasure,
    RefitReport,
    ReportRow,
    StageTime,
    TransformRow,
    VerificationResult,
)
from refitkit.model.rules import Pack, Rename, Rules
from refitkit.model.slot import Slot, TensorInfo

__all__ = [
    "FORMAT",
    "Argument",
    "CallRef",
    "ChangeRow",
    "DiffReport",
    "DiffRow",
    "EngineMemory",
    "Event",
    "Fingerprint",
    "Guard",
    "KeptWeights",
    "LayerType",
    "Leaf",
    "LeafKind",
    "LedgerRow",
    "Number",
    "OpCall",
    "OutputMeasure",
    "Pack",
    "PinnedRef",
    "PinnedTensor",
    "PlanData",
    "RefitReport",
    "Rename",
    "ReportRow",
    "Rules",
    "Slot",
    "SlotState",
    "SourceRef",
    "StageFinished",
    "StageStarted",
    "StageTime",
    "Step",
    "Tensor",
    "TensorInfo",
    "TorchName",
    "TransformRow",
    "Value",
    "VerificationResult",
    "fingerprint_of_slots",
]
