"""The verifier ``engine-bytes``: a refitted network builds to the bytes of one made from scratch.

The judge is TensorRT's builder, which is deterministic: equal bytes mean that every name, layout,
dtype and value is right.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from refitkit.builtin.torch_tensorrt.network.module import JUDGE, NetworkModule
from refitkit.builtin.torch_tensorrt.rebuild import program_with
from refitkit.errors import NotRefittableError
from refitkit.model import OutputMeasure, VerificationResult
from refitkit.program.bits import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from refitkit.protocols import OpenedModule, VerifyRequest


class EngineBytesVerifier:
    """Builds from scratch what a refit should have made."""

    @property
    def name(self) -> str:
        """``engine-bytes``."""
        return JUDGE

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Build from scratch, before anything is written.

        Raises:
            NotRefittableError: The module has no networks, or there is no program with the new
                weights.
        """
        module = request.module
        if not isinstance(module, NetworkModule):
            raise NotRefittableError(
                "The verifier 'engine-bytes' is for modules of the backend 'tensorrt_network'.",
                hint="Use verify='outputs' with inputs, or verify='weights'.",
            )
        found = program_with(request.source, request.program, request.plan)
        if isinstance(found, str):
            raise NotRefittableError(
                f"Nothing can be built from scratch: {found}.",
                hint="Pass a program with the new weights, or use verify='weights'.",
            )
        built, torch_values = module.built_from(found(), request.tools)

        def judge(judged: OpenedModule) -> VerificationResult:
            measures = (
                *_engines(judged, built),
                *_torch_parts(judged, torch_values),
            )
            wrong = sum(not m.ok for m in measures)
            note = f"{len(built)} engines built from scratch, {wrong} parts differ"
            return VerificationResult(verifier=JUDGE, ok=not wrong, measures=measures, note=note)

        return judge


def _engines(module: OpenedModule, built: dict[str, bytes]) -> Iterator[OutputMeasure]:
    for name, wanted in built.items():
        found = module.engine_bytes(name) if isinstance(module, NetworkModule) else b""
        ok = found == wanted
        note = "" if ok else f"is {_shown(found)}, from scratch {_shown(wanted)}"
        yield OutputMeasure(name=name, ok=ok, note=note)


def _torch_parts(
    module: OpenedModule, wanted: dict[str, dict[str, torch.Tensor]]
) -> Iterator[OutputMeasure]:
    for name, values in wanted.items():
        engine = module.engines[name]
        for slot, value in values.items():
            found = engine.read(slot).reshape(-1) if hasattr(engine, "read") else None
            ok = found is not None and same_bits(found, value)
            yield OutputMeasure(name=f"{name}/{slot}", ok=ok, note="" if ok else "bits differ")


def _shown(content: bytes) -> str:
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}"
