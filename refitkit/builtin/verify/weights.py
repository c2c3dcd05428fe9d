"""The verifier ``weights``: read every slot back and compare bits."""

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
    """Compares what the engines hold with the values that the strategies gave."""

    @property
    def name(self) -> str:
        """``weights``."""
        return NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Check that all engines can be read.

        Raises:
            NotRefittableError: Some cannot.
        """
        mute = [n for n, e in request.module.engines.items() if not isinstance(e, SupportsReadback)]
        if mute:
            raise NotRefittableError(
                "The verifier 'weights' reads slots back, which these engines cannot do.",
                problems=[Problem(name, "no readback") for name in mute],
                hint="Use verify='outputs' with inputs, or verify='none'.",
            )
        values = tuple(request.values.values())

        def judge(module: OpenedModule) -> VerificationResult:
            measures = tuple(_measure(module, value) for value in values)
            wrong = sum(not m.ok for m in measures)
            note = f"{len(measures)} slots read back, {wrong} differ"
            return VerificationResult(verifier=NAME, ok=not wrong, measures=measures, note=note)

        return judge


def _measure(module: OpenedModule, value: SlotValue) -> OutputMeasure:
    slot = value.slot
    engine = module.engines[slot.engine]
    found = engine.read(slot.name) if isinstance(engine, SupportsReadback) else torch.empty(0)
    if is_value(found, value):
        return OutputMeasure(name=slot.name, ok=True)
    wanted = value.load().to(found.device)
    if slot.shape is None and wanted.numel() == found.numel():
        wanted = wanted.reshape(found.shape)  # the engine knows no shape of it
    if same_bits(found, wanted):
        return OutputMeasure(name=slot.name, ok=True)
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return OutputMeasure(name=slot.name, ok=False, note="dtype or shape is not the source's")
    kind = torch.complex128 if found.is_complex() else torch.float64
    error = float((found.to(kind) - wanted.to(kind)).abs().max())
    note = "bits differ from the source's"
    return OutputMeasure(name=slot.name, ok=False, max_abs_error=error, note=note)
