"""The verifier ``weights``: it reads every written slot back and compares bits.

Values of files are compared by the 128-bit digests of what was read from them, others as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import NotRefittableError, Problem
from refitkit.model import OutputMeasure, VerificationResult
from refitkit.program.bits import same_bits
from refitkit.protocols import SupportsReadback
from refitkit.recipe import is_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from refitkit.protocols import OpenedModule, SlotValue, VerifyRequest

NAME = "weights"


class WeightsVerifier:
    """Compares the values that engines hold with those that strategies gave."""

    @property
    def name(self) -> str:
        """Name that users write in ``verify=``: ``weights``."""
        return NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Return a function that reads the slots back, once the new values are live.

        Raises:
            NotRefittableError: Some engines cannot be read back. The error lists them.
        """
        engines = request.module.engines.items()
        unreadable = [name for name, e in engines if not isinstance(e, SupportsReadback)]
        if unreadable:
            raise NotRefittableError(
                "The verifier 'weights' needs to read slots, but these engines have no readback.",
                problems=[Problem(name, "no readback") for name in unreadable],
                hint="Use verify='outputs' with inputs, or verify='none'.",
            )
        values = tuple(request.values.values())

        def verify(module: OpenedModule) -> VerificationResult:
            measures = tuple(_measure(module, value) for value in values)
            wrong = sum(not m.ok for m in measures)
            note = f"{len(measures)} slots read back, {wrong} differ"
            return VerificationResult(verifier=NAME, ok=not wrong, measures=measures, note=note)

        return verify


def _measure(module: OpenedModule, value: SlotValue) -> OutputMeasure:
    """Compare one slot with its value, bit for bit."""
    slot = value.slot
    engine = module.engines[slot.engine]
    found = engine.read(slot.name) if isinstance(engine, SupportsReadback) else torch.empty(0)
    # A value of a file is compared by digests or in pieces, without memory for the whole.
    if is_value(found, value):
        return OutputMeasure(name=slot.name, ok=True)
    wanted = value.load().to(found.device)
    if slot.shape is None and wanted.numel() == found.numel():
        wanted = wanted.reshape(found.shape)  # the engine knows no shape of this slot
    if same_bits(found, wanted):
        return OutputMeasure(name=slot.name, ok=True)
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return OutputMeasure(name=slot.name, ok=False, note="dtype or shape is not the source's")
    kind = torch.complex128 if found.is_complex() else torch.float64
    error = float((found.to(kind) - wanted.to(kind)).abs().max())
    note = "bits differ from the source's"
    return OutputMeasure(name=slot.name, ok=False, max_abs_error=error, note=note)
