"""Modules of fake TensorRT engines and a torch part, refitted by the real pipeline."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

import refitkit
from refitkit.builtin.torch_tensorrt.direct import known
from refitkit.builtin.torch_tensorrt.engine import EngineOptions, create_engine
from refitkit.builtin.torch_tensorrt.torch_part import TorchPartEngine
from refitkit.pipeline.pipeline import Pipeline
from refitkit.pipeline.targets import PLAN_MEMBER
from refitkit.protocols import SlotValue
from tests.fakes import Tripping, TrippingPlugin, Tripwire, make_plan, recipe_row, slot_for
from tests.unit.builtin.torch_tensorrt.fake_trt import (
    FakeCudaEngine,
    FakeHandle,
    TellingRefitter,
    engine_from,
    fake_trt,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.builtin.torch_tensorrt.engine import RefitterEngine
    from refitkit.model import Slot

CPU = torch.device("cpu")
Values = dict[str, torch.Tensor]


def values_of(engine: str, seed: int) -> Values:
    """Three weights of three types, one of them with bits that no comparison by value tells."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"[CONVOLUTION]-[{engine}] KERNEL": torch.randn(2, 3, generator=g),
        f"[SCALE]-[{engine}] SHIFT": torch.randn(5, generator=g).half(),
        f"{engine} CONSTANT": torch.tensor([-0.0, float(seed)]),
    }


def slot_values(engine: Any, values: Mapping[str, torch.Tensor]) -> list[SlotValue]:
    """Values as a strategy would give them."""
    slots = engine.slots
    return [
        SlotValue(
            slots.get(name) or slot_for(name, value, engine.name),
            "test",
            (name,),
            lambda value=value: value,
        )
        for name, value in values.items()
    ]


def options_for(values: Mapping[str, torch.Tensor], engine: str, **more: Any) -> EngineOptions:
    slots: dict[str, Slot] = {name: slot_for(name, v, engine) for name, v in values.items()}
    return EngineOptions(**{"device": CPU, "known": slots, "direct": False, **more})


def engine_of(
    name: str,
    values: Mapping[str, torch.Tensor],
    wire: Tripwire | None = None,
    *,
    runtime: str = "python",
    trt: Any = None,
    groups: Any = (),
    **more: Any,
) -> tuple[RefitterEngine, FakeHandle]:
    """An engine on a fake handle."""
    wire = wire or Tripwire()
    trt = trt or fake_trt(wire, TellingRefitter)
    is_direct = runtime == "direct"
    handle = FakeHandle(
        name,
        wire,
        FakeCudaEngine.of(values, wire, *groups),
        "python" if is_direct else runtime,
        trt=trt if is_direct else None,
    )
    options = options_for(values, name, **{"direct": is_direct, **more})
    return create_engine(handle, trt, options), handle


class TrtModule:
    """An opened module: two engines and a torch part. It answers with all weights."""

    backend = "fake"

    def __init__(self, runtimes: tuple[str, str], wire: Tripwire) -> None:
        self.wire = wire
        self.made = [
            engine_of(f"e{n}", values_of(f"e{n}", 0), wire, runtime=runtime)
            for n, runtime in enumerate(runtimes)
        ]
        self.part = TorchPartEngine("part", torch_module(0))
        self.engines: dict[str, Any] = {engine.name: engine for engine, _ in self.made}
        self.engines["part"] = self.part
        slots = [slot for engine in self.engines.values() for slot in engine.slots.values()]
        self.attachments = {PLAN_MEMBER: make_plan([recipe_row(slot) for slot in slots]).to_bytes()}

    def run(self, args: Any, kwargs: Any) -> Values:
        answers = {
            f"{handle.name}/{k}": v for _, handle in self.made for k, v in handle.call().items()
        }
        return {**answers, **{f"part/{k}": v.clone() for k, v in self.part.live.items()}}

    probe = run

    def save(self, _path: Any, _attachments: Any) -> None:
        raise NotImplementedError

    def reopen(self) -> TrtModule:
        raise NotImplementedError

    def synchronize(self) -> None:
        self.wire("synchronize")

    def ordered(self, do: Callable[[], Any]) -> Any:
        return do()

    def order(self) -> None:
        self.wire("order")

    def committed(self) -> None:
        self.wire("committed")

    def settle(self) -> None:
        pass

    def holds(self) -> Values:
        """What is live, past captured graphs."""
        found = {
            f"{handle.name}/{k}": v
            for _, handle in self.made
            for k, v in handle.engine.values().items()
        }
        return {**found, **{f"part/{k}": v.clone() for k, v in self.part.live.items()}}

    def stored(self) -> Values:
        """What a save would write."""
        return {
            f"{handle.name}/{k}": v
            for _, handle in self.made
            for k, v in engine_from(handle.engine_bytes(), self.wire).values().items()
        }


TRACED = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))


def torch_module(seed: int) -> torch.fx.GraphModule:
    module = copy.deepcopy(TRACED)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=g))
    return module


def weights_of(seed: int) -> Values:
    """A state_dict for a ``TrtModule``."""
    part = {name: v.detach().clone() for name, v in torch_module(seed).state_dict().items()}
    return {**values_of("e0", seed), **values_of("e1", seed), **part}


def expected(seed: int) -> Values:
    """What a module holds after a refit to ``weights_of(seed)``."""
    engines = {
        f"{e}/{k}": v.reshape(-1) for e in ("e0", "e1") for k, v in values_of(e, seed).items()
    }
    return {
        **engines,
        **{f"part/{k}": v.detach() for k, v in torch_module(seed).state_dict().items()},
    }


class Opener:
    """Opens ``TrtModule``."""

    name = "opener"

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> Any:
        return target if isinstance(target, TrtModule) else None


@cache
def made_pipeline() -> tuple[Pipeline, TrippingPlugin]:
    """One for all scenes: making it takes longer than a refit."""
    plugin = TrippingPlugin(Tripwire())
    return Pipeline({"changes": "sampled"}, plugins=[Opener(), plugin]), plugin


class Scene:
    """A module, prepared in one of several ways, to be refitted from weights 1 to weights 2.

    Args:
        runtimes: ``python``, ``direct`` (that runtime, past the refitter) or ``cpp``, of each.
        prepared: ``fresh``: nobody knows the live weights. ``refitted``: they come from a refit.
            ``adopted``: they were told. ``spoilt``: a refit was refused since the last good one.
    """

    def __init__(self, runtimes: tuple[str, str], prepared: str, *, verdict: bool = True) -> None:
        known._of_process.clear()  # so that each scene makes the same calls
        self.wire = Tripwire()
        self.module = TrtModule(runtimes, self.wire)
        self.pipeline, self.plugin = made_pipeline()
        self.plugin.verdict = True
        self.compiled = self.pipeline.load(self.module)
        self.seed = 0
        if prepared in {"refitted", "spoilt"}:
            self.refit(self.seed + 1)
        if prepared == "adopted":
            for engine, _ in self.module.made:
                engine.adopt(slot_values(engine, values_of(engine.name, 0)))
        if prepared == "spoilt":
            self.plugin.verdict = False
            try:
                self.refit(7)
            except refitkit.VerificationError:
                self.seed = 1
        self.compiled()  # captures
        self.plugin.verdict = verdict

    def refit(self, seed: int, faults: Mapping[int, BaseException] | None = None) -> None:
        self.wire.arm(faults)
        weights = Tripping(weights_of(seed))
        self.pipeline.refit(self.compiled, weights, verify="tripping-verifier")
        self.seed = seed
