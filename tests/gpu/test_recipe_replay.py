"""Recipes on a GPU: the bits that they give on a CPU, in few launches."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from refitkit.program.bits import same_bits
from tests.unit.recipe.recorder import Recording, record

NORMS = 24


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for number in range(NORMS):
        size = 16 + 8 * number
        found[f"scale{number}"] = torch.randn(size).to(dtype)
        found[f"bias{number}"] = torch.randn(size).to(dtype)
        found[f"mean{number}"] = torch.randn(size).to(dtype)
        found[f"var{number}"] = (torch.rand(size) + 0.01).to(dtype)
    return found


def folds(**leaves: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each BatchNorm as Torch-TensorRT 2.14 folds it, and ops that are exact nowhere else."""
    found: dict[str, torch.Tensor] = {}
    for number in range(NORMS):
        scale = leaves[f"scale{number}"] / torch.sqrt(leaves[f"var{number}"] + 1e-5)
        found[f"s{number}"] = scale
        found[f"t{number}"] = leaves[f"bias{number}"] - leaves[f"mean{number}"] * scale
    found["exp"] = torch.exp(leaves["bias0"])
    found["after"] = found["exp"] + leaves["bias0"]  # of two devices, where weights are elsewhere
    found["sum"] = leaves["bias1"].sum(0, keepdim=True)
    found["half"] = leaves["bias2"].half()
    found["turned"] = leaves["bias3"].reshape(2, -1).t()
    return found


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def recording(request: pytest.FixtureRequest) -> Recording:
    return record(folds, weights(0, request.param))


def test_the_bits_are_those_of_the_cpu(recording: Recording) -> None:
    dtype = recording.outputs["s0"].dtype
    new = weights(1, dtype)
    wanted = folds(**new)
    found = recording.values({name: value.cuda() for name, value in new.items()})
    assert not isinstance(found, str)
    assert found.keys() == wanted.keys()
    differing = [n for n, value in wanted.items() if not same_bits(value, found[n].cpu())]
    assert differing == []


def test_many_folds_take_few_launches() -> None:
    recording = record(folds, weights(0))
    new = {name: value.cuda() for name, value in weights(1).items()}
    recording.values(new)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        recording.values(new)
        torch.cuda.synchronize()
    launches = [event for event in found.events() if "LaunchKernel" in event.name]
    assert 0 < len(launches) < 2 * NORMS  # one by one: five for each norm
