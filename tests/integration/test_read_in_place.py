"""Files that are read straight into the memory of an AOTInductor engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits, slots_of
from safetensors.torch import save_file
from torch import nn

import refitkit
from refitkit.builtin.aotinductor.native import SWITCH
from refitkit.errors import SourceError, VerificationError, WeightMismatchError
from refitkit.pipeline.checks import FiniteCheck
from refitkit.program.ambient import WatchingMode

if TYPE_CHECKING:
    from pathlib import Path

    from refitkit.pipeline.stage import Staged

LARGE_ROWS = 2500
"""Rows of a weight that is read in several pieces, of which the last one is shorter."""


class Net(nn.Module):
    """A large weight, small ones, a buffer of integers, and a weight that lies channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.large = nn.Linear(512, LARGE_ROWS)
        self.head = nn.Linear(LARGE_ROWS, 3, bias=False)
        self.register_buffer("order", torch.randperm(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.large(self.conv(x).flatten(1)))[:, self.order]


X = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)


def model(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture(scope="module")
def saved_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.refit"
    refitkit.compile(torch.export.export(model(0), (X,))).save(path)
    return path


@pytest.fixture(params=["c-interface", "binding"])
def compiled(
    request: pytest.FixtureRequest, saved_net: Path, monkeypatch: pytest.MonkeyPatch
) -> refitkit.CompiledModule:
    monkeypatch.setenv(SWITCH, "1" if request.param == "binding" else "")
    loaded = refitkit.load(saved_net)
    engine = loaded.engines["model"]
    assert engine.route[0] == request.param
    assert engine.strides["conv.weight"] != model(0).conv.weight.contiguous().stride()
    return loaded


def file_of(folder: Path, state: dict[str, torch.Tensor], name: str = "w.safetensors") -> Path:
    state = {name: value.contiguous() for name, value in state.items()}
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder / name


def assert_holds(compiled: Any, state: dict[str, torch.Tensor]) -> None:
    held = slots_of(compiled)
    assert held == {name: bits(state[name]) for name in held}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("how", [{}, {"rollback": False}])
def test_slots_hold_the_bits_of_the_file(
    compiled: Any, tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    for seed in (1, 2, 3):  # the third one writes to the memory of the first
        state = model(seed).state_dict()
        refitkit.refit(compiled, file_of(tmp_path, state, name), **how)
        assert_holds(compiled, state)
        expected = model(seed)(X)
        assert (compiled(X) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_nothing_is_copied(compiled: Any, tmp_path: Path) -> None:
    paths = [file_of(tmp_path, model(s).state_dict(), f"{s}.safetensors") for s in (1, 2, 3)]
    for path in paths[:2]:
        refitkit.refit(compiled, path, verify="none")
    with Copies() as copies:
        refitkit.refit(compiled, paths[2], verify="none")
    assert copies.sizes == [model(3).conv.weight.numel()]  # which lies in another order
    assert_holds(compiled, model(3).state_dict())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_verified_refit_reads_each_byte_once(
    compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """But for the weight in another order, which only a second read can compare."""
    path, preadv = file_of(tmp_path, model(1).state_dict(), name), os.preadv
    size, counts = path.stat().st_size, []

    def counting(fd: int, buffers: Any, offset: int) -> int:
        counts.append(preadv(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    result = refitkit.refit(compiled, path, verify="weights")
    assert len(result.report.verification.measures) == len(compiled.slots)
    overhead = 20_000  # headers and pickles are read more than once
    assert size - overhead < sum(counts) < size + overhead


def test_a_slot_that_is_not_as_it_was_read_is_refused(
    compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, require = slots_of(compiled), FiniteCheck.require

    def spoiling(check: FiniteCheck, staged: Staged, values: Any) -> None:
        require(check, staged, values)
        ((_, one),) = staged.waiting()
        one.staged("large.weight").view(-1)[-1] += 1
        one.staged("head.weight").view(-1)[0] += 1

    monkeypatch.setattr(FiniteCheck, "require", spoiling)
    with pytest.raises(VerificationError) as info:
        refitkit.refit(compiled, file_of(tmp_path, model(1).state_dict()), verify="weights")
    assert {problem.subject for problem in info.value.problems} == {"large.weight", "head.weight"}
    assert slots_of(compiled) == before


class Copies(WatchingMode):
    """Notes how many elements each copy has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["cut", "written"])
def test_a_file_that_changes_while_it_is_read_changes_nothing(
    compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for seed in (1, 2):
        refitkit.refit(compiled, file_of(tmp_path, model(seed).state_dict(), f"{seed}.pt"))
    before, held = bits(compiled(X)), slots_of(compiled)
    path = file_of(tmp_path, model(3).state_dict())
    size, preadv = path.stat().st_size, os.preadv
    spoilt = []

    def spoiling(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        if len(buffers[0]) == 1 << 21 and not spoilt:  # the first piece of the large weight
            spoilt.append(offset)
            if how == "cut":
                os.truncate(path, size // 2)
            else:
                with path.open("r+b") as stream:
                    stream.seek(size // 2)
                    stream.write(bytes(64))
        return count

    monkeypatch.setattr(os, "preadv", spoiling)
    with pytest.raises(SourceError, match="changed since it was opened"):
        refitkit.refit(compiled, path)
    assert spoilt
    assert bits(compiled(X)) == before
    assert slots_of(compiled) == held
    monkeypatch.undo()
    refitkit.refit(compiled, file_of(tmp_path, model(4).state_dict()))
    assert_holds(compiled, model(4).state_dict())


@pytest.mark.parametrize("name", ["large.weight", "large.bias", "conv.weight"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_value_that_is_not_finite_is_refused(
    compiled: Any, tmp_path: Path, name: str, where: int
) -> None:
    before = slots_of(compiled)
    state = model(1).state_dict()
    state = {name: value.contiguous() for name, value in state.items()}
    state[name].view(-1)[where] = torch.nan
    state["head.weight"].view(-1)[where] = torch.inf
    with pytest.raises(WeightMismatchError) as info:
        refitkit.refit(compiled, file_of(tmp_path, state))
    found = {(problem.subject, problem.kind) for problem in info.value.problems}
    assert found == {(name, "non-finite"), ("head.weight", "non-finite")}
    assert slots_of(compiled) == before
