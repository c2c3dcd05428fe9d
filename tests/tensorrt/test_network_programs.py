"""Programs of odd kinds: a refit is a build from scratch, or the compile says why not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import refitkit
from refitkit import CompileError, ConfigError
from tests.tensorrt.helpers import BACKEND, bytes_of, needs_torch_tensorrt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_torch_tensorrt


class Views(nn.Module):
    """Parameters that are parts of one memory, and one that is all of it."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(40)
        self.whole = nn.Parameter(memory)
        self.w, self.v = nn.Parameter(memory[4:20].view(4, 4)), nn.Parameter(memory[20:24])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w + self.v + self.whole.sum()


class TwoShapes(nn.Module):
    """One memory under two shapes."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(16)
        self.w, self.v = nn.Parameter(memory.view(4, 4)), nn.Parameter(memory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w).sum() * self.v


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 1).expand(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.none, self.w = nn.Parameter(torch.randn(0, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ self.w, self.none])


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.randn(())), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.randn(4, dtype=torch.complex64))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.view_as_real(self.turns).sum(-1)


class Indices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.register_buffer("order", torch.tensor([1, 2, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(x))[:, self.order]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * mask


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@dataclass(frozen=True)
class Odd:
    """A model and how it is exported and compiled."""

    make: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...] = (torch.ones(2, 4),)
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def program(self, seed: int) -> torch.export.ExportedProgram:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                self.make().eval(), self.inputs, self.kwargs, dynamic_shapes=self.dynamic
            )

    def compiled(self, seed: int) -> refitkit.CompiledModule:
        options = {"min_block_size": 1, **self.options}
        return refitkit.compile(self.program(seed), BACKEND, options, prove=False)


DOUBLE = (torch.ones(2, 4, dtype=torch.float64),)
BATCH = ({0: torch.export.Dim("batch", min=2, max=8)},)
ODD = {
    "views": Odd(Views),
    "one memory, two shapes": Odd(TwoShapes),
    "expanded": Odd(Expanded),
    "empty": Odd(Empty),
    "scalar": Odd(Scalar),
    "complex": Odd(Complex),
    "indices": Odd(Indices, (torch.tensor([[1, 2, 3]]),)),
    "keywords": Odd(Keywords, kwargs={"mask": torch.ones(2, 4)}),
    "dynamic": Odd(plain, (torch.ones(4, 4),), dynamic=BATCH),
    "truncated": Odd(lambda: plain().double(), DOUBLE, options={"truncate_double": True}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_refit_is_a_build_from_scratch_here_and_after_a_load(name: str, tmp_path: Path) -> None:
    odd = ODD[name]
    compiled, wanted = odd.compiled(0), bytes_of(odd.compiled(1))
    compiled.save(tmp_path / "model")
    assert bytes_of(compiled) != wanted
    weights = odd.program(1).state_dict
    for one in (compiled, refitkit.load(tmp_path / "model")):
        refitkit.refit(one, weights, verify="weights")
        assert bytes_of(one) == wanted


def test_doubles_need_an_option_that_the_message_names() -> None:
    with pytest.raises(CompileError, match="truncate_double=True"):
        Odd(lambda: plain().double(), DOUBLE).compiled(0)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_program_without_data_is_refused(where: str) -> None:
    if where == "meta":
        with torch.device("meta"):
            model = plain().eval()
        program = torch.export.export(model, (torch.ones(2, 4, device="meta"),))
    else:
        with FakeTensorMode() as mode:
            model = plain().eval()
            program = torch.export.export(model, (mode.from_tensor(torch.ones(2, 4)),))
    with pytest.raises(CompileError):
        refitkit.compile(program, BACKEND, {"min_block_size": 1})


# -- options --------------------------------------------------------------------------------------


def test_all_wrong_options_are_told_at_once() -> None:
    options = {
        "min_blok_size": 1,
        "nonsense": 1,
        "device": "cuda:0",
        "immutable_weights": False,
        "optimization_level": "high",
        "truncate_double": 1.5,
        "torch_executed_ops": 7,
    }
    with pytest.raises(ConfigError) as info:
        Odd(plain, options=options).compiled(0)
    found = {p.subject: p.kind for p in info.value.problems}
    assert found == {
        "min_blok_size": "no such option",
        "nonsense": "no such option",
        "device": "reserved by the backend",
        "immutable_weights": "reserved by the backend",
        "optimization_level": "type",
        "truncate_double": "type",
        "torch_executed_ops": "type",
    }
    assert "min_block_size" in str(info.value)


def test_options_that_cannot_be_written_are_told_at_once() -> None:
    options = {"a": object(), "b": [object()], "c": lambda: 0, "d": plain(), "e": {"f": 1}}
    with pytest.raises(ConfigError) as info:
        Odd(plain, options=options).compiled(0)
    assert {p.subject for p in info.value.problems} == set(options)


def test_imports_have_to_be_names() -> None:
    with pytest.raises(ConfigError, match="names of modules"):
        Odd(plain, options={"imports": "os"}).compiled(0)


@pytest.mark.parametrize(
    "op", [torch.ops.aten.relu.default, "torch.ops.aten.relu.default"], ids=["op", "text"]
)
def test_ops_for_torch_as_ops_and_as_text(op: Any) -> None:
    compiled = Odd(plain, options={"torch_executed_ops": [op]}).compiled(0)
    assert sum(bool(content) for content in bytes_of(compiled).values()) == 2


# -- plans without a GPU --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [BACKEND, "torch_tensorrt"])
def test_a_plan_offline_lists_every_slot(backend: str) -> None:
    odd = ODD["scalar"]
    plan = refitkit.plan(odd.program(0), backend=backend, options={"min_block_size": 1})
    compiled = odd.compiled(0)
    assert {row.slot.key for row in plan.data.ledger} == {slot.key for slot in compiled.slots}
    assert {row.slot for row in plan.data.ledger} == set(compiled.slots)
    assert {leaf.fqn for leaf in plan.data.leaves} == set(odd.program(0).state_dict)


def test_verifying_without_a_change() -> None:
    odd = ODD["scalar"]
    compiled = odd.compiled(0)
    before = bytes_of(compiled)
    for verifier in ("weights", "engine-bytes"):
        assert refitkit.verify(compiled, odd.program(0), with_=verifier).ok
        with pytest.raises(refitkit.VerificationError):
            refitkit.verify(compiled, odd.program(1), with_=verifier)
    assert bytes_of(compiled) == before
