"""The suites of refitkit's kit for this plugin; ``refitkit plugins check openvino`` runs them.

The model returns its weights, so the oracle reads them where OpenVINO has them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from refitkit.protocols import Tools
from refitkit.testing import BackendSuite, EngineSuite

from refitkit_openvino import refitkit_partition
from refitkit_openvino.backend import OpenVINOBackend
from refitkit_openvino.engine import ENGINE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch.export import ExportedProgram

    from refitkit_openvino.engine import OpenVINOEngine
    from refitkit_openvino.module import OpenVINOModule


class Net(torch.nn.Module):
    """Weights of several dtypes and a scalar. All of them are outputs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.small = torch.nn.Parameter(torch.randn(2).half())
        self.brief = torch.nn.Parameter(torch.randn(2).bfloat16())
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.order = torch.nn.Buffer(torch.tensor([1, 0]))
        self.mask = torch.nn.Buffer(torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """Return an answer, and all weights by their FQNs."""
        y = self.linear(x)[:, self.order] * self.scale + self.small + self.brief
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        # OpenVINO copies the weights in a kernel. It would pass plain ones on, as the engine does.
        twice = {name: torch.stack([tensor, tensor]) for name, tensor in tensors.items()}
        return {"y": torch.where(self.mask, y, -y), "held": twice}


INPUT = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


@cache
def program() -> ExportedProgram:
    """The program; it is exported once."""
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (INPUT,))


@cache
def compiled(weights: str = "constants") -> OpenVINOModule:
    """The module; it is compiled once, and suites get copies."""
    return OpenVINOBackend().compile(program(), {"weights": weights}, Tools())


def held(engine: OpenVINOEngine) -> dict[str, torch.Tensor]:
    """The weights that a call of OpenVINO reads."""
    call = compiled().with_staged({})
    call.engines = {ENGINE: engine}
    return {name: twice[0] for name, twice in call.run((INPUT,), {})["held"].items()}


class TestOpenVINOBackend(BackendSuite):
    """The contracts of backends and modules."""

    def make_backend(self) -> OpenVINOBackend:
        """A new backend."""
        return OpenVINOBackend()

    def make_program(self) -> ExportedProgram:
        """The program."""
        return program()

    def make_module(self) -> OpenVINOModule:
        """A copy of the module."""
        return compiled().reopen()

    def inputs(self) -> tuple[Any, ...]:
        """Inputs of the program."""
        return (INPUT,)

    def make_parts(self, program: ExportedProgram, module: Any) -> Mapping[str, Any]:  # noqa: ARG002
        """What the hook returns."""
        return refitkit_partition(program, "openvino") or {}

    def held(self, module: OpenVINOModule) -> Mapping[str, torch.Tensor]:
        """The live weights."""
        return held(module.engines[ENGINE])


class TestOpenVINOEngine(EngineSuite):
    """The contracts of engines."""

    weights = "constants"

    def make_engine(self) -> OpenVINOEngine:
        """A new engine."""
        return compiled(self.weights).reopen().engines[ENGINE]

    def held(self, engine: OpenVINOEngine) -> Mapping[str, torch.Tensor]:
        """The live weights."""
        return held(engine)

    def commit_fault(self, engine: OpenVINOEngine) -> AbstractContextManager[object]:  # noqa: ARG002
        """A context in which memory is short when a commit makes its new state."""
        return mock.patch("refitkit_openvino.engine.State", side_effect=MemoryError)


class TestEngineWithInputs(TestOpenVINOEngine):
    """The contracts of engines, for weights that stay inputs."""

    weights = "inputs"


SUITES = (TestOpenVINOBackend, TestOpenVINOEngine, TestEngineWithInputs)
