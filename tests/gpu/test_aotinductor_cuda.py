"""The backend ``aotinductor`` on CUDA: what the CPU tests show, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import refitkit

if TYPE_CHECKING:
    from pathlib import Path


class Net(torch.nn.Module):
    """Convolution, BatchNorm, tied weights, a buffer that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.up = torch.nn.Linear(8, 8, bias=False)
        self.down = torch.nn.Linear(8, 8, bias=False)
        self.down.weight = self.up.weight
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return {"a": self.down(self.up(h)), "b": h + self.shift}


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 1.5)
    return model.cuda()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    torch.manual_seed(9)
    return torch.randn(4, 3, 16, 16, device="cuda")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, x: torch.Tensor) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "net.refitkit"
    refitkit.compile(torch.export.export(net(0), (x,))).save(path)
    return path


@pytest.fixture
def compiled(saved: Path) -> refitkit.CompiledModule:
    return refitkit.load(saved)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("a", "b"))


def test_a_to_b_to_a(compiled: refitkit.CompiledModule, x: torch.Tensor) -> None:
    before = compiled(x)
    result = refitkit.refit(compiled, net(1).state_dict(), inputs=(x,))
    assert result.report.verification
    assert result.report.verification.ok
    assert result.report.changed
    assert not same(before, compiled(x))
    refitkit.refit(compiled, net(0), inputs=(x,))
    assert same(before, compiled(x))


def test_weights_of_the_host_are_copied_to_the_device(
    compiled: refitkit.CompiledModule, x: torch.Tensor
) -> None:
    on_host = {name: value.cpu() for name, value in net(1).state_dict().items()}
    refitkit.refit(compiled, on_host, verify="weights")
    for name, value in on_host.items():
        if name in {slot.name for slot in compiled.slots}:
            assert torch.equal(compiled.read(name).cpu(), value)
    assert torch.allclose(compiled(x)["a"], net(1)(x)["a"], atol=1e-3)


def test_a_refusal_changes_nothing(compiled: refitkit.CompiledModule, x: torch.Tensor) -> None:
    before = compiled(x)
    bad = net(1).state_dict()
    bad["conv.weight"] = bad["conv.weight"].half()
    with pytest.raises(refitkit.WeightMismatchError, match=r"conv\.weight: dtype"):
        refitkit.refit(compiled, bad)
    with pytest.raises(refitkit.VerificationError):
        refitkit.refit(compiled, net(1), inputs=(x,), reference=net(2))
    assert same(before, compiled(x))


def test_save_after_a_refit(
    compiled: refitkit.CompiledModule, x: torch.Tensor, tmp_path: Path
) -> None:
    refitkit.refit(compiled, net(1), inputs=(x,))
    compiled.save(tmp_path / "b.refitkit")
    assert same(refitkit.load(tmp_path / "b.refitkit")(x), compiled(x))


def test_partial_copy_and_free(compiled: refitkit.CompiledModule, x: torch.Tensor) -> None:
    before = compiled(x)
    new = {"conv.bias": torch.ones(8)}
    result = refitkit.refit(compiled, new, partial=True, copy=True, inputs=(x,))
    assert same(before, compiled(x))
    assert not same(before, result.module(x))
    free = torch.cuda.mem_get_info()[0]
    assert result.module.free_spare() > 0
    assert torch.cuda.mem_get_info()[0] >= free
    assert not same(before, result.module(x))


def test_wrong_inputs_are_refused(compiled: refitkit.CompiledModule, x: torch.Tensor) -> None:
    with pytest.raises(refitkit.InputMismatchError, match="device"):
        compiled(x.cpu())
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert same(compiled(strided), compiled(x))
