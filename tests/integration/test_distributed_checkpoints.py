"""What four processes saved of a sharded model refits an engine of one process, bit for bit.

The judge is the plain state_dict of the same model, gathered by torch and saved by ``torch.save``.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import digest, slots_of, start_child
from torch.distributed.checkpoint import FileSystemReader

import refitkit
from tests.integration.children.train_distributed import HOW, WORLD, model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INPUTS = (torch.randn(5, 16, generator=torch.Generator().manual_seed(0)),)
OF_A_TRAINER = refitkit.Pipeline({"rules": {"subtree": "model."}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four processes wrote."""
    made = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = start_child("train_distributed.py", made, port)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def compiled() -> refitkit.CompiledModule:
    return refitkit.compile(torch.export.export(model(0).eval(), INPUTS))


@pytest.fixture
def refitted(compiled: refitkit.CompiledModule) -> Callable[..., tuple[str, dict[str, bytes]]]:
    """Outputs and slots after a refit, which begins with weights that nobody else has."""

    def refit(weights: object, pipeline: Any = refitkit) -> tuple[str, dict[str, bytes]]:
        refitkit.refit(compiled, model(99))
        pipeline.refit(compiled, weights, inputs=INPUTS)
        return digest(compiled(*INPUTS)), slots_of(compiled)

    return refit


@pytest.mark.parametrize("how", HOW)
def test_a_folder_is_the_plain_state_dict(
    how: str, folder: Path, refitted: Callable[..., tuple[str, dict[str, bytes]]]
) -> None:
    plain = torch.load(folder / f"{how}.pt", weights_only=True)
    wanted = refitted(plain)
    assert refitted(folder / f"{how}-flat") == wanted
    assert refitted(folder / how, OF_A_TRAINER) == wanted
    assert refitted(folder / f"{how}.pt") == wanted


def test_each_is_another_model(
    folder: Path, refitted: Callable[..., tuple[str, dict[str, bytes]]]
) -> None:
    """A reader that takes the wrong folder would not be seen otherwise."""
    assert len({refitted(folder / f"{how}-flat")[0] for how in HOW}) == len(HOW)


SHARDS = {
    "fully-sharded": {"a.weight": 4, "a.bias": 4, "b.weight": 4, "b.bias": 4, "scale": 1},
    "replicated": {"a.weight": 2, "a.bias": 2, "b.weight": 2, "b.bias": 2, "scale": 1},
    "two-dimensions": {"a.weight": 4, "a.bias": 4, "b.weight": 4, "b.bias": 2, "scale": 1},
}


@pytest.mark.parametrize("how", HOW)
def test_several_processes_did_save_pieces(how: str, folder: Path) -> None:
    """Otherwise nothing is shown above: pieces of each tensor, which processes wrote some."""
    metadata = FileSystemReader(folder / f"{how}-flat").read_metadata()
    entries: Any = metadata.state_dict_metadata
    assert {name: len(entry.chunks) for name, entry in entries.items()} == SHARDS[how]
    files = Counter(place.relative_path for place in metadata.storage_data.values())
    assert len(files) >= min(WORLD, SHARDS[how]["a.weight"])
    if how == "two-dimensions":
        sizes = {tuple(chunk.sizes) for chunk in entries["b.weight"].chunks}
        assert sizes == {(4, 11)}
        assert {tuple(c.sizes) for c in entries["a.weight"].chunks} == {(6, 16), (5, 16)}


def test_in_a_trainers_folder_the_optimizer_is_left_out_and_reported(
    folder: Path,
    compiled: refitkit.CompiledModule,
    refitted: Callable[..., tuple[str, dict[str, bytes]]],
) -> None:
    """The moments of an optimizer are no weights, though each looks like a whole model."""
    wanted = refitted(folder / "fully-sharded-flat")
    assert refitted(folder / "fully-sharded") == wanted
    report = refitkit.refit(compiled, folder / "fully-sharded").report
    (note,) = [note for note in report.notes if note.startswith("names:")]
    assert "'optim." in note
