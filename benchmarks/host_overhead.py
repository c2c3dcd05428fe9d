"""What a refit takes beside TensorRT and bytes: the real pipeline with a refitter that is idle.

A narrow MobileNet has as many weights as a wide one and hardly any bytes, so nearly all that is
left is Python. Needs no GPU; engines are the fakes of the tests.

usage: python benchmarks/host_overhead.py [--runs 200]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from gpu_models import Model, exported
from gpu_raw import yardstick

import refitkit
from refitkit.builtin.torch_tensorrt.engine import EngineOptions, create_engine
from refitkit.pipeline.targets import PLAN_MEMBER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.fakes import Tripwire
from tests.unit.builtin.torch_tensorrt.fake_trt import (
    FakeCudaEngine,
    FakeHandle,
    TellingRefitter,
    fake_trt,
)

CPU = torch.device("cpu")


def narrow() -> torch.nn.Module:
    """As many layers as a MobileNet has, with few channels."""
    module: torch.nn.Module = torchvision.models.mobilenet_v3_small(
        weights=None, width_mult=0.1, num_classes=10
    )
    return module


class Quick(TellingRefitter):
    """A refitter that has nothing to do."""

    def refit_cuda_engine(self) -> bool:
        """Done."""
        return True


class Opened:
    """A module with fake engines for a plan's slots; it answers nothing."""

    def __init__(self, plan: refitkit.RefitPlan, state: dict[str, torch.Tensor]) -> None:
        wire = Tripwire()
        self.backend, self.attachments = plan.backend, {PLAN_MEMBER: plan.to_bytes()}
        self.engines = {}
        for name, values in plan.materialize(state).items():
            known = {row.slot.name: row.slot for row in plan.ledger if row.slot.engine == name}
            handle: Any = FakeHandle(name, wire, FakeCudaEngine.of(values, wire))
            options = EngineOptions(device=CPU, known=known)
            self.engines[name] = create_engine(handle, fake_trt(wire, Quick), options)

    def run(self, _args: Any, _kwargs: Any) -> None:
        """Nothing."""

    probe = run

    def synchronize(self) -> None:
        """Nothing is pending."""


class Opener:
    """Opens ``Opened``."""

    name = "opener"

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> Any:
        """It is opened already."""
        return target if isinstance(target, Opened) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    kind = Model(narrow)
    models = [kind.new(seed, torch.float32, "cpu") for seed in (0, 1)]
    inputs = kind.inputs(torch.float32, "cpu")
    options = {"min_block_size": 1}
    plan = refitkit.plan(exported(models[0], inputs), backend="torch_tensorrt", options=options)
    states = [model.state_dict() for model in models]
    pipeline = refitkit.Pipeline(plugins=[Opener()])
    compiled = pipeline.load(Opened(plan, states[0]))
    whole, stages = [], defaultdict(list)
    for number in range(runs + 4):
        start = time.perf_counter()
        result = pipeline.refit(compiled, states[number % 2], verify="none")
        if number < 4:
            continue
        whole.append(time.perf_counter() - start)
        for one in result.report.stages:
            stages[one.stage].append(one.seconds)
    print(f"{len(plan.ledger)} slots, {len(states[0])} entries; medians of {runs}, ms")
    for name, times in {"whole": whole, **stages}.items():
        print(f"{name:<8} {statistics.median(times) * 1e3:.3f}")
    print(f"plain Python, for comparison: {yardstick():.3f}")


if __name__ == "__main__":
    main()
