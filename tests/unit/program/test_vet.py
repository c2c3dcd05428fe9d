"""A kept program comes from a file: what it names must not run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import PlanMismatchError
from refitkit.program import KeptProgram
from refitkit.program.keep import check_graph
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Sizes(torch.nn.Module):
    """Ops of many kinds, and sizes that are expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = y.shape[0]
        return (
            self.linear(x)[: size // 2 + 1],
            x.view(-1, 2),
            x[:, : size % 3 + max(size, 2)],
            torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,)),
            x.new_zeros(int(size / 4)),
        )


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    inputs = (torch.randn(6, 4), torch.randn(30, 4))
    return torch.export.export(Sizes(), inputs, dynamic_shapes=({0: auto}, {0: auto}))


@pytest.fixture
def graph(program: torch.export.ExportedProgram) -> dict[str, Any]:
    kept = KeptProgram.of(program)
    assert kept is not None
    found: dict[str, Any] = json.loads(kept.to_bytes())
    return found


def restored(
    program: torch.export.ExportedProgram, graph: dict[str, Any]
) -> torch.export.ExportedProgram:
    kept = KeptProgram.of(program)
    assert kept is not None
    other = KeptProgram(json.dumps(graph).encode(), kept._leaves, ())
    return other.restore(TensorMap(dict(program.state_dict)), program.state_dict.__getitem__)


def test_what_torch_writes_passes_and_guards_are_gone(
    program: torch.export.ExportedProgram, graph: dict[str, Any]
) -> None:
    assert graph["guards_code"]
    check_graph(graph)
    assert graph["guards_code"] == []
    found = restored(program, graph)
    x, y = torch.randn(6, 4), torch.randn(30, 4)
    module = found.module(check_guards=False)
    for one, other in zip(module(x, y), program.module()(x, y), strict=True):
        assert torch.equal(one, other)


def expressions(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for one in value for found in expressions(one)]
    if not isinstance(value, dict):
        return []
    inner = [found for one in value.values() for found in expressions(one)]
    return [value, *inner] if "expr_str" in value else inner


def run_system(graph: dict[str, Any], bait: str) -> None:
    graph["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system")


def run_by_other_prefix(graph: dict[str, Any], bait: str) -> None:
    graph["graph_module"]["graph"]["nodes"][0].update(target="torchish.os.system")


def run_call(graph: dict[str, Any], bait: str) -> None:
    graph["graph_module"]["graph"]["nodes"][0].update(target="_operator.methodcaller")


def run_load(graph: dict[str, Any], bait: str) -> None:
    graph["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.load_library")


def run_size(graph: dict[str, Any], bait: str) -> None:
    for one in expressions(graph):
        one["expr_str"] = f"open('{bait}', 'w').close() or Integer(4)"


def run_size_by_attributes(graph: dict[str, Any], bait: str) -> None:
    for one in expressions(graph):
        one["expr_str"] = "Symbol('s17').func.mro()"


HOSTILE: list[Callable[[dict[str, Any], str], None]] = [
    run_system,
    run_by_other_prefix,
    run_call,
    run_load,
    run_size,
    run_size_by_attributes,
]


@pytest.mark.parametrize("change", HOSTILE)
def test_what_would_run_is_refused(
    program: torch.export.ExportedProgram,
    graph: dict[str, Any],
    tmp_path: Path,
    change: Callable[[dict[str, Any], str], None],
) -> None:
    bait = tmp_path / "bait"
    change(graph, str(bait))
    with pytest.raises(PlanMismatchError, match="uses names that no exported program contains"):
        restored(program, graph)
    assert not bait.exists()


def test_the_bait_of_a_size_is_live(
    program: torch.export.ExportedProgram,
    graph: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the check it runs: should torch mend that, the check can go."""
    from refitkit.program import keep

    monkeypatch.setattr(keep, "check_graph", lambda _: None)
    bait = tmp_path / "bait"
    run_size(graph, str(bait))
    with pytest.raises(PlanMismatchError):
        restored(program, graph)
    assert bait.exists()
