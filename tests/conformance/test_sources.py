"""The built-in sources pass the suite for sources."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit.builtin.weights import refitkit_load_weights
from refitkit.pipeline import Pipeline
from refitkit.recipe import TensorMap
from refitkit.testing import SourceSuite, oracles
from refitkit.testing.oracles import ReadRecorder
from tests.fakes import CountingMapping

if TYPE_CHECKING:
    from collections.abc import Mapping


class Net(torch.nn.Module):
    """Tied and non-contiguous parameters, and buffers, of which one is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.b = torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.scattered = torch.nn.Parameter(torch.randn(4, 2).t())
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("shift", torch.tensor([-0.0, float("nan")]), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))[:, self.order], self.scattered @ self.scattered.t() + self.shift


@cache
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def copies() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net().state_dict().items()}


def opened(thing: object) -> Any:
    source = refitkit_load_weights(thing)
    assert source is not None
    return source


class TestStateDict(SourceSuite):
    def make_source(self) -> Any:
        return opened(net().state_dict())

    def make_source_of(self, tensors: Any) -> Any:
        return opened(tensors)

    def truth(self) -> Mapping[str, torch.Tensor]:
        return copies()

    def make_unusable(self) -> Any:
        return opened({"s": torch.eye(2).to_sparse()}), "s"


class TestMetaTensors(TestStateDict):
    def make_unusable(self) -> Any:
        return opened({"m": torch.empty(2, device="meta")}), "m"


class TestNoTensors(TestStateDict):
    def make_unusable(self) -> Any:
        return opened({"n": 5}), "n"


class TestModule(SourceSuite):
    def make_source(self) -> Any:
        return opened(net())

    def truth(self) -> Mapping[str, torch.Tensor]:
        return copies()


class TestProgram(SourceSuite):
    def make_source(self) -> Any:
        return opened(torch.export.export(net(), (torch.ones(1, 3),)))

    def truth(self) -> Mapping[str, torch.Tensor]:
        return {**copies(), "shift": net().shift.clone()}


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="refitkit-"))


@pytest.fixture(scope="module", autouse=True)
def _folder_is_removed() -> Any:
    yield
    for path in folder().iterdir():
        path.unlink()
    folder().rmdir()
    folder.cache_clear()


class TestSafetensors(SourceSuite):
    def make_source(self) -> Any:
        path = folder() / "net.safetensors"
        if not path.exists():
            save_file({name: value.contiguous() for name, value in self.truth().items()}, path)
        return opened(path)

    def truth(self) -> Mapping[str, torch.Tensor]:
        return copies()

    def make_source_of(self, tensors: Any) -> Any:
        save_file(tensors, folder() / "any.safetensors")
        return opened(folder() / "any.safetensors")

    def make_rewritable(self) -> Any:
        return rewritable(folder() / "rewritten.safetensors", save_file)

    def reads(self, source: Any) -> int:
        """The number of data reads of the file."""
        if not isinstance(source._file, Counted):
            source._file = Counted(source._file)
        return source._file.reads


def rewritable(path: Path, save: Any) -> Any:
    """A source of a file with the weights, and a function that writes others into the same file."""
    weights = {name: value.contiguous() for name, value in copies().items()}
    save(weights, path)
    source, before = opened(path), path.stat()

    def rewrite() -> Any:
        other = folder() / "other"
        save({name: torch.ones_like(value) for name, value in weights.items()}, other)
        with path.open("r+b") as file:
            file.write(other.read_bytes())
        # The clock of the file system may not have ticked.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
        return opened(path)

    return source, rewrite


class Counted:
    """A safetensors file that counts reads of data."""

    def __init__(self, file: Any) -> None:
        self.file, self.reads = file, 0

    def read(self, start: int, nbytes: int) -> Any:
        self.reads += 1
        return self.file.read(start, nbytes)

    def pieces(self, *where: Any) -> Any:
        self.reads += 1
        return self.file.pieces(*where)


class TestTorchFile(SourceSuite):
    def make_source(self) -> Any:
        path = folder() / "net.pt"
        if not path.exists():
            torch.save(net().state_dict(), path)
        return opened(path)

    def truth(self) -> Mapping[str, torch.Tensor]:
        return copies()

    def make_source_of(self, tensors: Any) -> Any:
        torch.save(tensors, folder() / "any.pt")
        return opened(folder() / "any.pt")

    def make_rewritable(self) -> Any:
        return rewritable(folder() / "rewritten.pt", torch.save)


class TestTensorMap(TestStateDict):
    """The base class of plugins' sources, over a mapping that makes tensors on demand."""

    def make_source(self) -> Any:
        return TensorMap(CountingMapping(copies()))

    def make_source_of(self, tensors: Any) -> Any:
        return TensorMap(CountingMapping(tensors))


class TestReadRecorder(TestStateDict):
    """The recorder of the kit."""

    def make_source(self) -> Any:
        return ReadRecorder(TensorMap(copies()))

    def make_source_of(self, tensors: Any) -> Any:
        return ReadRecorder(TensorMap(tensors))

    def reads(self, source: Any) -> int:
        return len(source.read)


class Asked(TensorMap):
    """A state_dict that counts reads of tensors."""

    gets = 0

    def get(self, fqn: str) -> torch.Tensor:
        self.gets += 1
        return super().get(fqn)


class Revised(TensorMap):
    """A state_dict with revisions for most of its tensors."""

    def revision(self, fqn: str) -> Any:
        return None if fqn == "order" else (self.info(fqn), oracles.bits(self._tensors[fqn]))


class TestAverage(SourceSuite):
    """An average of small integers, whose exact result is known."""

    shift = 4

    def make_source(self) -> Any:
        return Pipeline().open_weights(refitkit.WeightedAverage(self.parts()))

    def parts(self) -> list[Any]:
        low = {name: other for name, (other, _) in self.numbers().items()}
        high = {name: other for name, (_, other) in self.numbers().items()}
        return [(self.part(low), 1), (self.part(high), 3)]

    def part(self, tensors: dict[str, torch.Tensor]) -> Any:
        return Asked(tensors)

    def numbers(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """By name: the tensors of the two parts."""
        whole = torch.arange(12.0).reshape(3, 4)
        return {
            **{
                str(dtype): (whole.to(dtype), (whole + self.shift).to(dtype))
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            },
            "turned": (whole.t(), (whole.t() + self.shift)),
            "complex": (whole + 1j, whole + self.shift + 1j),
            "kept": (torch.tensor([-0.0, float("inf")]), torch.tensor([-0.0, float("inf")])),
            "none": (torch.ones(0, 3), torch.ones(0, 3)),
        }

    def truth(self) -> Mapping[str, torch.Tensor]:
        same = {"kept", "none"}
        by = 0.75 * self.shift
        return {n: low if n in same else low + by for n, (low, _) in self.numbers().items()}

    def reads(self, source: Any) -> int | None:
        return sum(part.gets for part in source._parts)

    def make_unusable(self) -> Any:
        parts = [({"n": torch.tensor(number)}, 1) for number in (1, 2)]
        return Pipeline().open_weights(refitkit.WeightedAverage(parts)), "n"


class TestTaskVectors(TestAverage):
    def make_source(self) -> Any:
        (base, _), (tuned, _) = self.parts()
        return Pipeline().open_weights(refitkit.TaskVectors(base, [(tuned, 0.75)]))


class TestAverageOfRevisions(TestAverage):
    def part(self, tensors: dict[str, torch.Tensor]) -> Any:
        return Revised({**tensors, "order": torch.tensor([2, 0, 1])})

    def truth(self) -> Mapping[str, torch.Tensor]:
        return {**super().truth(), "order": torch.tensor([2, 0, 1])}

    def reads(self, source: Any) -> int | None:
        return None

    def make_rewritable(self) -> Any:
        """Another average, of other tensors under the same names."""

        def rewrite() -> Any:
            tensors = {name: torch.ones_like(value) for name, value in self.truth().items()}
            parts = [(Revised(tensors), 1), (Revised(tensors), 3)]
            return Pipeline().open_weights(refitkit.WeightedAverage(parts))

        return self.make_source(), rewrite
