"""Task vectors: a base and scaled differences, and what none of them changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from refitkit import TaskVectors
from refitkit.errors import ConfigError, SourceError
from tests.unit.builtin.merges.helpers import Known, opened, problems_of, same

INF, NAN = math.inf, math.nan
SPECIAL = (-0.0, 0.0, INF, -INF, NAN, 1e-45, 3.4e38, 0.1)


def one(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=dtype)}


def merged(base: Any, *tasks: tuple[Any, float]) -> torch.Tensor:
    made: torch.Tensor = opened(TaskVectors(base, tasks)).get("w")
    return made


def test_scaled_differences_are_added_to_the_base() -> None:
    base, added, halved = one(1.0, 4.0), one(3.0, 4.0), one(1.0, 2.0)
    assert merged(base, (added, 0.5), (halved, 2)).tolist() == [2.0, 0.0]
    assert merged(base, (added, -1)).tolist() == [-1.0, 4.0]
    assert opened(TaskVectors(base, [(added, 0.25)])).description == (
        "a state_dict of 1 entries with tasks of (0.25 x a state_dict of 1 entries)"
    )


def test_no_task_is_the_base() -> None:
    base = one(*SPECIAL)
    base["w"].view(torch.int32)[4] = 0x7FC12345
    assert same(merged(base), base["w"])
    assert opened(TaskVectors(base, [])).description == "a state_dict of 1 entries"


def test_tasks_without_a_scale_are_not_read() -> None:
    class Silent(Known):
        def get(self, fqn: str) -> torch.Tensor:
            raise AssertionError("it was read")

    base = one(*SPECIAL)
    silent = Silent(one(*[0.0] * 8))
    assert same(merged(base, (silent, 0), (silent, 0.0)), base["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elements_that_no_task_changes_keep_their_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.cat([torch.tensor([-0.0, INF, -INF, 1e-45, 3.0e38]), torch.randn(1000)]).to(dtype)
    tuned = base.clone()
    tuned[5::2] += 1
    made = merged({"w": base}, ({"w": tuned}, 0.3), ({"w": base.clone()}, 7.7))
    kept = tuned == base
    assert same(made[kept], base[kept])
    assert (made[~kept] != base[~kept]).all()


def test_tasks_that_undo_one_another_leave_the_base() -> None:
    base, tuned = one(-0.0, 0.1), one(1.0, 0.7)
    assert same(merged(base, (tuned, 0.3), (tuned, -0.3)), base["w"])


def test_infinities_and_nans_go_the_way_of_floating_point() -> None:
    made = merged(one(1.0, -INF, NAN, INF), (one(INF, 1.0, NAN, -INF), 0.5))
    assert made[0] == INF
    assert made[1:].isnan().all()


def test_differences_are_rounded_once() -> None:
    """Each half a step of bfloat16: two of them are one, and none of them is."""
    step = torch.finfo(torch.bfloat16).eps
    base, tuned = one(1.0, dtype=torch.bfloat16), one(1 + step, dtype=torch.bfloat16)
    made = merged(base, (tuned, 0.5), (tuned, 0.5))
    assert made.tolist() == [1 + step]
    assert made.dtype is torch.bfloat16


def test_complex_numbers_part_by_part() -> None:
    base = {"w": torch.tensor([1 + 2j, complex(INF, 1)])}
    tuned = {"w": torch.tensor([3 + 2j, complex(INF, 3)])}
    assert merged(base, (tuned, 0.5)).tolist() == [2 + 2j, complex(INF, 2)]


def test_float64_is_summed_in_float64() -> None:
    tiny = 2.0**-50
    made = merged(one(1.0, dtype=torch.float64), (one(1 + tiny, dtype=torch.float64), 0.5))
    assert made.tolist() == [1 + tiny / 2]


def test_integers_have_to_be_the_same() -> None:
    base = {"n": torch.tensor(1)}
    same_one, other = {"n": torch.tensor(1)}, {"n": torch.tensor(2)}
    assert opened(TaskVectors(base, [(same_one, 0.5)])).get("n").tolist() == 1
    assert "not the same" in opened(TaskVectors(base, [(other, 0)])).info("n").unusable


def test_tasks_have_to_fit_the_base() -> None:
    with pytest.raises(SourceError, match="do not fit together") as info:
        opened(TaskVectors(one(1.0), [(one(1.0, 2.0), 0), ({"v": torch.ones(1)}, 1)]))
    assert problems_of(info) == {("w", "shape"), ("v", "unexpected"), ("w", "missing")}
    assert "part 3" in str(info.value)


@pytest.mark.parametrize("tasks", [[(one(1.0), INF)], [one(1.0)], 3, "ab"])
def test_odd_tasks_are_refused_when_they_are_written(tasks: Any) -> None:
    with pytest.raises(ConfigError, match="task vectors"):
        TaskVectors(one(1.0), tasks)


def revision(base: Any, *tasks: tuple[Any, float]) -> Any:
    return opened(TaskVectors(base, tasks)).revision("w")


def test_revisions() -> None:
    base, tuned, silent = Known(one(1.0)), Known(one(2.0)), one(3.0)
    assert revision(base) == revision(base, (tuned, 0)) == base.revision("w")
    assert revision(base, (base, 0.3)) == base.revision("w")
    assert revision(base, (silent, 0)) == base.revision("w")
    assert revision(base, (silent, 1)) is None
    assert revision(base, (tuned, 1), (silent, 0)) == revision(base, (tuned, 1))
    different = [
        revision(base),
        revision(base, (tuned, 1)),
        revision(base, (tuned, 0.5)),
        revision(tuned, (base, 1)),
        revision(base, (tuned, 1), (tuned, 1)),
    ]
    assert None not in different
    assert len(set(different)) == len(different)
