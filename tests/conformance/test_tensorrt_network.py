"""The backend ``tensorrt_network`` and its engines, with TensorRT-RTX's own builder."""

from __future__ import annotations

import copy
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from refitkit.builtin.torch_tensorrt import LAYER_TYPES, refitkit_partition, upstream
from refitkit.builtin.torch_tensorrt.network.backend import NetworkBackend
from refitkit.builtin.torch_tensorrt.network.engine import NetworkEngine, ScratchFolder
from refitkit.protocols import Tools
from refitkit.testing import BackendSuite, EngineSuite, oracles

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed: refitkit[rtx]"
)

TOOLS = Tools(layer_types={kind.name: kind for kind in LAYER_TYPES})
OPTIONS = {"min_block_size": 1}


class Net(torch.nn.Module):
    """A convolution and a head: three kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.scale = torch.nn.Parameter(torch.randn(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.scale


@cache
def exported() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(1, 2, 4, 4),))


@cache
def compiled() -> Any:
    return NetworkBackend().compile(exported(), OPTIONS, TOOLS)


SEEN: dict[str, str] = {}


def held(engine: Any) -> dict[str, torch.Tensor]:
    """The bytes of the file with the live weights; checks that the engine was built from them.

    Builds are deterministic, so equal weights have equal engine bytes, and other weights have
    other bytes.
    """
    live = engine.live
    found: dict[str, torch.Tensor] = {}
    content = Path(live.region.path).read_bytes()
    for name, view in live.region.views.items():
        start = view.storage_offset() * view.itemsize
        raw = np.frombuffer(content, np.uint8, view.nbytes, start).copy()
        found[name] = torch.from_numpy(raw).view(view.dtype)
    weights = hashlib.sha256(repr(sorted(oracles.snapshot(found).items())).encode()).hexdigest()
    built = hashlib.sha256(live.engine.read_bytes()).hexdigest()
    assert SEEN.setdefault(weights, built) == built
    assert sum(other == built for other in SEEN.values()) == 1
    return found


class TestEngine(EngineSuite):
    def make_engine(self) -> Any:
        (made,) = compiled().engines.values()
        engine = NetworkEngine(
            made.structure, tuple(made.slots.values()), made._builder, ScratchFolder()
        )
        engine.adopt({name: made.read(name) for name in made.slots}, made.live.engine.read_bytes())
        return engine

    def held(self, engine: Any) -> Mapping[str, torch.Tensor]:
        return held(engine)


class TestBackend(BackendSuite):
    options = OPTIONS
    tools = TOOLS

    def make_backend(self) -> Any:
        return NetworkBackend()

    def make_program(self) -> Any:
        return copy.deepcopy(exported())

    def make_module(self) -> Any:
        return compiled().reopen()

    def inputs(self) -> Any:
        return (torch.ones(1, 2, 4, 4),)

    def make_parts(self, program: Any, module: Any) -> Any:
        return refitkit_partition(program, module, module.backend, {}, TOOLS)

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        (engine,) = module.engines.values()
        return held(engine)
