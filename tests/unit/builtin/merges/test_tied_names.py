"""Tied weights in merges: a file has one name of them, a state_dict both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from refitkit import Pipeline, TaskVectors, WeightedAverage
from refitkit.errors import SourceError
from refitkit.protocols import KnowsTies

if TYPE_CHECKING:
    from pathlib import Path

EMBED, HEAD = "embed.weight", "head.weight"
ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
MEAN = torch.tensor([2.0, 4.0])


def tied(value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {EMBED: value, HEAD: value}


def file_of(folder: Path, state: dict[str, torch.Tensor], name: str = "a") -> str:
    path = folder / f"{name}.safetensors"
    save_file({n: value.clone() for n, value in state.items()}, path)
    return str(path)


def torch_file(folder: Path, state: dict[str, torch.Tensor]) -> str:
    path = folder / "both.pt"
    torch.save(state, path)
    return str(path)


def opened(weights: Any) -> Any:
    return Pipeline().open_weights(weights)


@pytest.mark.parametrize("one", [EMBED, HEAD])
def test_a_part_may_have_one_of_the_names(tmp_path: Path, one: str) -> None:
    file, both = file_of(tmp_path, {one: TWO}), torch_file(tmp_path, tied(ONE))
    for parts in ([tied(ONE), file], [file, tied(ONE)], [both, file], [file, both]):
        found = opened(WeightedAverage([(part, 1) for part in parts]))
        assert set(found.names()) == ({one} if parts[0] == file else {EMBED, HEAD})
        for name in found.names():
            assert found.get(name).equal(MEAN)
            assert found.revision(name) is None


def test_tasks_and_merges_of_merges(tmp_path: Path) -> None:
    file = file_of(tmp_path, {EMBED: TWO})
    found = opened(TaskVectors(file, [(tied(ONE), 0.5)]))
    assert found.get(EMBED).equal(MEAN)
    inner = WeightedAverage([(tied(ONE), 1), (file, 1)])
    assert opened(inner).ties() == [(EMBED, HEAD)]
    found = opened(WeightedAverage([(inner, 1), (file_of(tmp_path, {HEAD: MEAN}, "b"), 1)]))
    assert found.get(HEAD).equal(MEAN)


def test_parts_with_one_name_each_need_one_that_shows_the_tie(tmp_path: Path) -> None:
    a, b = file_of(tmp_path, {EMBED: ONE}, "a"), file_of(tmp_path, {HEAD: TWO}, "b")
    with pytest.raises(SourceError, match=r"head\.weight: unexpected"):
        opened(WeightedAverage([(a, 1), (b, 1)]))
    found = opened(WeightedAverage([(a, 1), (b, 1), (tied(MEAN), 2)]))
    assert found.get(EMBED).equal(MEAN)


def test_names_that_only_look_alike_are_not_tied(tmp_path: Path) -> None:
    file = file_of(tmp_path, {EMBED: TWO})
    for other in ({EMBED: ONE, HEAD: ONE.clone()}, {EMBED: ONE, HEAD: TWO}):
        with pytest.raises(SourceError, match=r"head\.weight: missing"):
            opened(WeightedAverage([(other, 1), (file, 1)]))


def test_a_part_with_several_tensors_for_one_is_refused(tmp_path: Path) -> None:
    file, split = file_of(tmp_path, {EMBED: TWO}), {EMBED: ONE, HEAD: TWO}
    with pytest.raises(SourceError, match=r"head\.weight: tie broken"):
        opened(WeightedAverage([(tied(ONE), 1), (file, 1), (split, 1)]))


def test_a_twin_of_another_shape_is_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path, {EMBED: torch.ones(3)})
    with pytest.raises(SourceError, match=r"embed\.weight: shape"):
        opened(WeightedAverage([(tied(ONE), 1), (file, 1)]))


def test_sources_show_what_shares_all_of_its_memory(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    state = {
        "a": base,
        "b": base,
        "same memory": base[:],
        "half": base[:4],
        "turned": base.reshape(2, 4),
        "copy": base.clone(),
        "none": base[:0],
        "nothing": base[:0],
    }
    for source in (opened(state), opened(torch_file(tmp_path, state))):
        assert isinstance(source, KnowsTies)
        assert list(source.ties()) == [("a", "b", "same memory")]
