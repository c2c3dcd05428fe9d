"""The conformance kit's suite for sources, run against this plugin: ``refitkit plugins check``.

What is expected is made without this plugin's code, by plain arithmetic in float64.
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

    from refitkit_peft.memory import Kind

_SCALE = 0.5


class LoraSuite(SourceSuite):
    """A base as it was given, with an adapter for two of its four weights."""

    memory: Kind = "given"
    keep = 2

    def make_source(self) -> WeightSource:
        source: WeightSource = self._source(_weights())
        return source

    def _source(self, weights: Mapping[str, Any]) -> Any:
        watched = ReadRecorder(TensorMap(weights))
        base = Base.with_opener(watched, _opened, self.memory, keep=self.keep)
        base.add("a", _factors(), alpha="rank")
        source = base.source(Lora(base, {"a": _SCALE}))
        self._before = len(watched.read)  # copies are made when a base is, and no data is read then
        self._watched = watched
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
    """Where reads of the base can be counted beneath it: nothing is kept."""

    keep = 0

    def reads(self, source: Any) -> int:  # noqa: ARG002 - the kit passes it
        return len(self._watched.read) - self._before


class HostSuite(LoraSuite):
    """A copy in memory: entries have revisions."""

    memory: Kind = "host"


class MappedSuite(LoraSuite):
    """A copy in a temporary file."""

    memory: Kind = "mapped"


def _opened(weights: Any) -> Any:
    return weights if isinstance(weights, ReadRecorder) else TensorMap(weights)


def _drawn(*shape: int) -> torch.Tensor:
    """Whole numbers, so that sums of products are exact in whatever order they are made."""
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
    """All of them run anywhere."""
    return [LoraSuite, CountedSuite, HostSuite, MappedSuite]
