"""Merges of checkpoints in compiled modules: as eager torch with weights that were merged by hand.

By hand means: in float64, without refitkit, rounded at the end.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import digest, max_error, slots_of
from aoti_models import CASES
from safetensors.torch import save_file

import refitkit
from refitkit.protocols import KeepsMade
from refitkit.recipe import TensorMap
from refitkit.testing.oracles import NewMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fresh = Callable[[str], refitkit.CompiledModule]
    State = dict[str, torch.Tensor]

LIMIT = 2e-5
NAMES = ["small", "convnet", "transformer"]


def state(name: str, seed: int) -> State:
    return {n: t.detach().clone() for n, t in CASES[name].model(seed).state_dict().items()}


def floats(one: State) -> State:
    return {name: value for name, value in one.items() if value.is_floating_point()}


def averaged(name: str) -> tuple[Any, State]:
    a, b, c = (state(name, seed) for seed in (1, 2, 3))
    merge = refitkit.WeightedAverage([(a, 2), (b, 1), (c, 5)])
    wide = {n: (2 * a[n].double() + b[n].double() + 5 * c[n].double()) / 8 for n in floats(a)}
    return merge, wide


def with_tasks(name: str) -> tuple[Any, State]:
    base, b, c = (state(name, seed) for seed in (1, 2, 3))
    merge = refitkit.TaskVectors(base, [(b, 0.4), (c, -0.2)])
    wide = {
        n: base[n].double()
        + 0.4 * (b[n].double() - base[n].double())
        - 0.2 * (c[n].double() - base[n].double())
        for n in floats(base)
    }
    return merge, wide


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [averaged, with_tasks])
def test_a_merge_answers_like_eager_with_merged_weights(
    make: Callable[[str], tuple[Any, State]], name: str, fresh: Fresh
) -> None:
    case, compiled = CASES[name], fresh(name)
    merge, wide = make(name)
    model = case.model(0)
    with torch.no_grad():
        for n, value in model.state_dict().items():
            if n in wide:
                value.copy_(wide[n])
    report = refitkit.refit(compiled, merge, inputs=case.inputs()).report
    assert report.verification is not None
    assert report.verification.verifier == "outputs"
    expected = case.expected(model)
    error = max_error(compiled(*case.args()), expected)
    assert error <= LIMIT
    assert max_error(case.expected(case.model(1)), expected) > 100 * LIMIT, (
        "a part would do as well"
    )


def test_one_part_leaves_the_module_bit_for_bit_as_it_was(fresh: Fresh) -> None:
    case, compiled = CASES["convnet"], fresh("convnet")
    before, slots = digest(compiled(*case.args())), slots_of(compiled)
    base, other = state("convnet", 0), state("convnet", 1)
    for merge in (
        refitkit.WeightedAverage([(base, 0.3), (other, 0)]),
        refitkit.TaskVectors(base, [(other, 0)]),
        refitkit.TaskVectors(base, []),
    ):
        refitkit.refit(compiled, other)
        assert slots_of(compiled) != slots
        refitkit.refit(compiled, merge)
        assert slots_of(compiled) == slots
        assert digest(compiled(*case.args())) == before


def test_merges_of_files_of_other_names_and_dtypes(fresh: Fresh, tmp_path: Path) -> None:
    """Rules are followed after merging: all parts have the same other names, and float16."""
    paths, states = [], []
    for seed in (1, 2):
        states.append({n: value.half() for n, value in state("small", seed).items()})
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file({f"module.{n}": value for n, value in states[-1].items()}, paths[-1])
    pipeline = refitkit.Pipeline({"rules": {"cast": "lossless"}})
    compiled = fresh("small")
    merge = refitkit.WeightedAverage(dict.fromkeys(paths, 1))
    report = pipeline.refit(compiled, merge, verify="weights").report
    assert all(str(path) in report.source for path in paths)
    for name, one in states[0].items():
        wanted = ((one.double() + states[1][name].double()) / 2).half().float()
        assert torch.equal(compiled.read(name), wanted)


def test_parts_of_another_model_change_nothing(fresh: Fresh) -> None:
    case, compiled = CASES["small"], fresh("small")
    before, slots, version = digest(compiled(*case.args())), slots_of(compiled), compiled.version
    merge = refitkit.WeightedAverage([(state("small", 1), 1), (state("batch", 1), 1)])
    with pytest.raises(refitkit.SourceError) as info:
        refitkit.refit(compiled, merge)
    assert {(p.subject, p.kind) for p in info.value.problems} == {
        ("a.weight", "shape"),
        ("a.bias", "shape"),
        ("b.weight", "shape"),
    }
    assert digest(compiled(*case.args())) == before
    assert (slots_of(compiled), compiled.version) == (slots, version)


def test_counters_that_differ_do_not_matter_where_nobody_reads_them(fresh: Fresh) -> None:
    """``num_batches_tracked`` of checkpoints of different steps."""
    compiled, parts = fresh("convnet"), [state("convnet", seed) for seed in (1, 2)]
    for steps, part in enumerate(parts):
        part["norm.num_batches_tracked"] += steps
    refitkit.refit(compiled, refitkit.WeightedAverage([(part, 1) for part in parts]))
    wanted = (parts[0]["head.bias"].double() + parts[1]["head.bias"].double()) / 2
    assert torch.equal(compiled.read("head.bias"), wanted.float())


class Counted(TensorMap):
    """Weights that count how often each is read."""

    def __init__(self, tensors: State) -> None:
        super().__init__(tensors)
        self.reads: Counter[str] = Counter()

    def get(self, fqn: str) -> torch.Tensor:
        self.reads[fqn] += 1
        return super().get(fqn)


def reads_of(compiled: Any, seed: int, config: Any = None, **how: Any) -> set[int]:
    """How often a refit to an average reads each entry of a part."""
    part = Counted(state("small", seed))
    merge = refitkit.WeightedAverage([(part, 1), (state("small", seed + 1), 1)])
    refitkit.Pipeline(config).refit(compiled, merge, **how)
    assert part.reads.keys() == state("small", seed).keys()
    return set(part.reads.values())


def test_a_refit_makes_each_tensor_of_a_merge_once(fresh: Fresh) -> None:
    """However often it looks: for digests, what is staged, and what is there."""
    compiled = fresh("small")
    assert reads_of(compiled, 1) == {1}
    assert reads_of(compiled, 2, delta=True) == {1}
    assert reads_of(compiled, 3, inputs=CASES["small"].args()) == {1}
    assert reads_of(compiled, 4, {"keep_limit": 0}) == {2}
    assert reads_of(compiled, 5, {"keep_limit": 0}, delta=True) == {3}


def test_who_gives_up_the_way_back_keeps_nothing(fresh: Fresh) -> None:
    assert reads_of(fresh("small"), 1, rollback=False) == {3}


def test_what_was_made_is_kept_up_to_the_limit(fresh: Fresh) -> None:
    """What comes first is kept: of all others nothing would be there when it is looked at again."""
    compiled = fresh("small")
    part = Counted(state("small", 1))
    merge = refitkit.WeightedAverage([(part, 1), (state("small", 2), 1)])
    sizes = {name: value.nbytes for name, value in state("small", 1).items()}
    limit = sizes["a.weight"] + sizes["a.bias"]
    refitkit.Pipeline({"keep_limit": limit}).refit(compiled, merge)
    assert set(part.reads.values()) == {1, 2}
    kept = {name for name, times in part.reads.items() if times == 1}
    held = sum(sizes[name] for name in kept)
    assert held <= limit
    assert all(held + sizes[name] > limit for name in sizes.keys() - kept)


def test_a_merge_of_merges_is_kept_once(fresh: Fresh) -> None:
    """Of its parts nothing is kept: they are made as often as the whole, which is once."""
    compiled = fresh("small")
    part = Counted(state("small", 1))
    inner = refitkit.WeightedAverage([(part, 1), (state("small", 2), 1)])
    refitkit.refit(compiled, refitkit.WeightedAverage([(inner, 1), (state("small", 3), 1)]))
    assert set(part.reads.values()) == {1}


@pytest.mark.parametrize("name", ["small", "bfloat16"])
@pytest.mark.parametrize("make", [averaged, with_tasks])
def test_nothing_that_was_made_outlives_the_refit(
    make: Callable[[str], tuple[Any, State]], name: str, fresh: Fresh
) -> None:
    compiled = fresh(name)
    pipeline = refitkit.Pipeline({"changes": "off", "keep_base": False})
    merge, _ = make(name)
    pipeline.refit(compiled, merge, verify="none")  # what is allocated once is there
    with NewMemory() as memory:
        source = pipeline.open_weights(merge)
        opened = memory.kept()
        pipeline.refit(compiled, source, verify="none")
        assert memory.kept() == opened


def test_an_opened_merge_is_made_anew_for_the_next_refit(fresh: Fresh) -> None:
    """Of what changes in between the next refit has to know."""
    compiled, other = fresh("small"), state("small", 1)
    pipeline = refitkit.Pipeline()
    source = pipeline.open_weights(refitkit.WeightedAverage([(state("small", 2), 1), (other, 1)]))
    pipeline.refit(compiled, source)
    for value in other.values():
        value.add_(1)
    assert pipeline.refit(compiled, source).report.changed
    wanted = (state("small", 2)["scale"] + other["scale"]) / 2
    assert torch.allclose(compiled.read("scale"), wanted)


def test_an_average_in_lower_precision_is_rounded_once(fresh: Fresh) -> None:
    compiled = fresh("bfloat16")
    merge, _ = averaged("bfloat16")
    source = refitkit.Pipeline().open_weights(merge)
    assert isinstance(source, KeepsMade)
    kept = source.keeping(None)
    assert kept.get("scale").data_ptr() == kept.get("scale").data_ptr()
    assert source.get("scale").data_ptr() != kept.get("scale").data_ptr()
    refitkit.refit(compiled, source)
    assert torch.equal(compiled.read("scale"), kept.get("scale"))
