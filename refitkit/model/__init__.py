"""Values: data only, frozen, free of torch. What is stored or shown is a pydantic model."""

from refitkit.model.events import Event, StageFinished, StageStarted, Step
from refitkit.model.layers import LayerType
from refitkit.model.plan import (
    FORMAT,
    Fingerprint,
    Leaf,
    LeafKind,
    LedgerRow,
    PinnedRef,
    PinnedTensor,
    PlanData,
    SlotState,
    SourceRef,
    fingerprint_of_slots,
)
from refitkit.model.report import (
    EngineMemory,
    OutputMeasure,
    RefitReport,
    ReportRow,
    StageTime,
    VerificationResult,
)
from refitkit.model.slot import Slot, TensorInfo

__all__ = [
    "FORMAT",
    "EngineMemory",
    "Event",
    "Fingerprint",
    "LayerType",
    "Leaf",
    "LeafKind",
    "LedgerRow",
    "OutputMeasure",
    "PinnedRef",
    "PinnedTensor",
    "PlanData",
    "RefitReport",
    "ReportRow",
    "Slot",
    "SlotState",
    "SourceRef",
    "StageFinished",
    "StageStarted",
    "StageTime",
    "Step",
    "TensorInfo",
    "VerificationResult",
    "fingerprint_of_slots",
]
