"""Suites of the conformance kit for this plugin: ``refitkit plugins check peft`` runs them.

The expected sums are computed without this plugin's code, in float64.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from refitkit.recipe import TensorMap
from refitkit.testing import SourceSuite
from refitkit.testing.oracles import ReadRecorder

from refitkit_peft.base import Base
from refitkit_peft.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightSource

    from refitkit_peft.stores import MemoryKind

_SCALE = 0.5


class LoraSuite(SourceSuite):
    """A base used as given, with an adapter for two of its four weights."""

    memory: MemoryKind = "given"
    keep = 2

    def make_source(self) -> WeightSource:
        source: WeightSource = self._source(_weights())
        return source

    def _source(self, weights: Mapping[str, Any]) -> Any:
        recorder = ReadRecorder(TensorMap(weights))
        base = Base.with_opener(recorder, _opened, self.memory, keep=self.keep)
        base.add("a", _factors(), alpha="rank")
        source = base.source(Lora(base, {"a": _SCALE}))
        # A base with copies reads all data when it is made; only later reads count.
        self._before = len(recorder.read)
        self._recorder = recorder
        return source

    def truth(self) -> Mapping[str, torch.Tensor]:
        found = dict(_weights())
        for name in ("a", "b"):
            up, down = (_factors()[f"{name}.lora_{side}.weight"].double() for side in "BA")
            weight = found[f"{name}.weight"]
            total = weight.double() + _SCALE * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
            found[f"{name}.weight"] = total.to(weight.dtype)
        return found

    def make_unusable(self) -> tuple[WeightSource, str]:
        return self._source({**_weights(), "s": torch.eye(2).to_sparse()}), "s"


class CountedSuite(LoraSuite):
    """Checks of a base without a cache of sums, so that reads of its source can be counted."""

    keep = 0

    def reads(self, source: Any) -> int:  # noqa: ARG002 - the kit passes it
        return len(self._recorder.read) - self._before


class HostSuite(LoraSuite):
    """Checks of a base that is copied to host memory. Its entries have revisions."""

    memory: MemoryKind = "host"


class MappedSuite(LoraSuite):
    """Checks of a base that is copied to a temporary file."""

    memory: MemoryKind = "mapped"


def _opened(weights: Any) -> Any:
    return weights if isinstance(weights, ReadRecorder) else TensorMap(weights)


def _drawn(*shape: int) -> torch.Tensor:
    """Small integers as floats, so that sums of products are exact in any order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).float()


@cache
def _weights() -> Mapping[str, torch.Tensor]:
    return {
        "a.weight": _drawn(5, 4),
        "b.weight": _drawn(6, 3, 2, 2).half(),
        "c.weight": _drawn(3, 7),
        "d": torch.tensor([-0.0, float("inf")]),
    }


@cache
def _factors() -> Mapping[str, torch.Tensor]:
    return {
        "a.lora_A.weight": _drawn(2, 4),
        "a.lora_B.weight": _drawn(5, 2),
        "b.lora_A.weight": _drawn(2, 3, 2, 2),
        "b.lora_B.weight": _drawn(6, 2, 1, 1),
    }


def suites() -> list[type[SourceSuite]]:
    """All suites; they run on any machine."""
    return [LoraSuite, CountedSuite, HostSuite, MappedSuite]
