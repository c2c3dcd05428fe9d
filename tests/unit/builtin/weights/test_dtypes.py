"""Every dtype that torch has, in every kind of source: the same bits, or the same refusal."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

from refitkit.errors import NotRefittableError, SourceError, WeightMismatchError
from refitkit.model import ITEM_BYTES, TensorInfo
from refitkit.pipeline import Pipeline
from refitkit.program.facts import facts_of
from tests.fakes import FakeModule, Loaded, OpenEngine, bits, plan_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

NAMES = sorted(
    {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
)
NEVER_IN_FILES = (NotImplementedError, KeyError, checkpoint.api.CheckpointException)
"""torch and safetensors cannot write some dtypes themselves."""


def tensor(name: str) -> torch.Tensor:
    dtype = getattr(torch, name)
    raw = torch.arange(12 * dtype.itemsize, dtype=torch.uint8) % 2
    return raw.view(dtype).reshape(3, 4)


def as_module(value: torch.Tensor, _: Path) -> Any:
    module = torch.nn.Module()
    module.register_buffer("w", value)
    return module


def as_safetensors(value: torch.Tensor, folder: Path) -> Any:
    save_file({"w": value}, folder / "w.safetensors")
    return folder / "w.safetensors"


def as_torch_file(value: torch.Tensor, folder: Path) -> Any:
    torch.save({"w": value}, folder / "w.pt")
    return folder / "w.pt"


def as_checkpoint(value: torch.Tensor, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"w": value}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


IN_MEMORY: list[Callable[[torch.Tensor, Path], Any]] = [
    lambda value, _: {"w": value},
    as_module,
    lambda value, _: iter([("w", value)]),
]
IN_FILES = [as_safetensors, as_torch_file, as_checkpoint]


@pytest.mark.parametrize("name", NAMES)
def test_all_sources_give_it_alike(tmp_path: Path, name: str) -> None:
    value, known = tensor(name), name in ITEM_BYTES
    why = "" if known else f"a tensor of the dtype {name}, which refitkit cannot refit"
    wanted = TensorInfo(dtype=name, shape=(3, 4), unusable=why)
    written = 0
    for make in (*IN_MEMORY, *IN_FILES):
        try:
            weights = make(value, tmp_path)
        except NEVER_IN_FILES:
            assert make in IN_FILES
            continue
        written += 1
        source = Pipeline().open_weights(weights)
        if name.startswith("q"):  # files have them as what they are: quantized
            assert source.info("w").unusable
            continue
        assert source.info("w") == wanted, make
        if known:
            assert bits(source.get("w")) == bits(value)
        elif make in IN_FILES:
            with pytest.raises(SourceError, match=f"'w'.*{why}"):
                source.get("w")
        scene = Loaded(FakeModule([OpenEngine("e0", {"w": torch.zeros(3, 4)})]))
        scene.compiled.plan = plan_for(scene.module)
        kind = "unusable" if not known else "" if name == "float32" else "dtype"
        if kind:
            with pytest.raises(WeightMismatchError, match=f"w: {kind}"):
                scene.pipeline.refit(scene.compiled, make(value, tmp_path))
    assert written >= len(IN_MEMORY)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ITEM_BYTES])
def test_those_that_are_known_are_refitted(name: str) -> None:
    value = tensor(name)
    zeros = torch.zeros(value.nbytes, dtype=torch.uint8).view(value.dtype).reshape(3, 4)
    scene = Loaded(FakeModule([OpenEngine("e0", {"m.w": zeros})]), changes="exact")
    scene.compiled.plan = plan_for(scene.module)
    scene.pipeline.refit(scene.compiled, {"m.w": value.mT.contiguous().mT}, verify="weights")
    assert bits(scene.holds()["m.w"]) == bits(value)
    report = scene.pipeline.diff(scene.compiled, {"m.w": zeros})
    assert [row.state for row in report.rows] == ["changed"]
    scene.compiled.restore()
    assert bits(scene.holds()["m.w"]) == bits(zeros)


class Holding(torch.nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, tensor(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(buffer.view(torch.uint8)[0, 0] for buffer in self.buffers())


def test_a_program_that_holds_others_is_refused_with_all_of_them() -> None:
    names = [name for name in ("float4_e2m1fn_x2", "bits8") if name in NAMES]
    program = torch.export.export(Holding("uint8", *names), (torch.ones(2),))
    with pytest.raises(NotRefittableError) as info:
        facts_of(program)
    assert [problem.subject for problem in info.value.problems] == names
    for backend in ("aotinductor", "tensorrt_network"):
        with pytest.raises(NotRefittableError, match="dtypes that refitkit cannot refit"):
            Pipeline().compile(program, backend)
