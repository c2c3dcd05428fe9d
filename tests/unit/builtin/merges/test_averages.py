"""Weighted averages: values, exactness, what does not fit together, revisions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit import WeightedAverage
from refitkit.errors import ConfigError, SourceError
from refitkit.protocols import KnowsRevisions, WeightSource
from refitkit.recipe import TensorMap
from tests.fakes import FakePlugin, make_module, weights_for
from tests.unit.builtin.merges.helpers import Known, opened, problems_of, same

if TYPE_CHECKING:
    from pathlib import Path

INF, NAN = math.inf, math.nan


def one(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=dtype)}


def average(*parts: tuple[Any, float], **how: Any) -> torch.Tensor:
    made: torch.Tensor = opened(WeightedAverage(parts, **how)).get("w")
    return made


# -- values -----------------------------------------------------------------------------------


def test_shares_are_divided_by_their_sum() -> None:
    assert average((one(1.0, 2.0), 1), (one(3.0, 6.0), 3)).tolist() == [2.5, 5.0]
    assert average((one(1.0), 0.25), (one(3.0), 0.75)).tolist() == [2.5]


def test_a_plain_sum_where_it_is_asked_for() -> None:
    assert average((one(1.0), 2), (one(3.0), -1), normalize=False).tolist() == [-1.0]


def test_shares_may_be_negative() -> None:
    assert average((one(1.0), 2), (one(3.0), -1)).tolist() == [-1.0]


def test_parts_by_path(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    save_file(one(1.0), paths[0])
    save_file(one(2.0), paths[1])
    source = opened(WeightedAverage({paths[0]: 0.5, paths[1]: 0.5}))
    assert source.get("w").tolist() == [1.5]
    assert all(path in source.description for path in paths)


def test_ten_tenths_are_one() -> None:
    """0.1 summed ten times is less than 1; what is averaged must not shrink."""
    merge = WeightedAverage([(one(float(n)), 0.1) for n in range(10)])
    assert math.fsum(share for _, share in merge.parts) == 1
    assert [share for _, share in merge.parts] == [0.1] * 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """Three quarters of steps of a half: rounded after each part they would come to nothing."""
    step = torch.finfo(dtype).eps
    parts = [
        (one(1 + step, dtype=dtype), 1),
        (one(1.0, dtype=dtype), 1),
        (one(1.0, dtype=dtype), 1),
    ]
    assert average(*parts).tolist() == [1.0]
    assert average(*parts[:1] * 2, *parts[:1], parts[1]).tolist() == [1 + step]
    assert average(*parts).dtype is dtype


def test_float64_is_summed_in_float64() -> None:
    tiny = 2.0**-50
    made = average((one(1 + tiny, dtype=torch.float64), 1), (one(1 - tiny, dtype=torch.float64), 3))
    assert made.tolist() == [1 - tiny / 2]


def test_half_precision_does_not_overflow_on_the_way() -> None:
    made = average((one(60000.0, dtype=torch.float16), 2), (one(64000.0, dtype=torch.float16), -1))
    assert made.tolist() == [56000.0]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_part_by_part(dtype: torch.dtype) -> None:
    a = {"w": torch.tensor([[1 + 2j, complex(INF, 1)]], dtype=dtype)}
    b = {"w": torch.tensor([[3 - 2j, complex(INF, 3)]], dtype=dtype).conj()}
    made = average((a, 1), (b, 1))
    assert made.tolist() == [[2 + 2j, complex(INF, -1)]]
    assert made.dtype is dtype


LAYOUTS = {
    "turned": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "negated lazily": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_layouts_do_not_matter(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = [torch.randn(37, 29, dtype=dtype) for _ in "abc"]
    odd = [LAYOUTS[layout](value) for value in plain]
    dense = [value.resolve_neg().clone(memory_format=torch.contiguous_format) for value in odd]
    for first, second in ((odd, dense), (dense, odd)):
        parts = ({"w": first[0]}, 1), ({"w": second[1]}, 2), ({"w": first[2]}, 4)
        wanted = [({"w": value}, share) for value, (_, share) in zip(dense, parts, strict=True)]
        assert same(average(*parts), average(*wanted))


def test_parts_are_neither_changed_nor_differentiated() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    kept = weight.detach().clone()
    made = average(({"w": weight}, 1), (one(1.0, 2.0, 3.0), 1))
    assert not made.requires_grad
    assert same(weight.detach(), kept)


# -- exactness --------------------------------------------------------------------------------

SPECIAL = (-0.0, 0.0, INF, -INF, NAN, 1e-45, 3.4e38, 0.1)


@pytest.mark.parametrize("share", [1, 0.3, 7])
def test_one_part_is_what_it_is(share: float) -> None:
    part = one(*SPECIAL)
    part["w"].view(torch.int32)[4] = 0x7FC12345  # a NaN with a message
    assert same(average((part, share)), part["w"])


def test_parts_without_a_share_have_no_say() -> None:
    part = one(*SPECIAL)
    other = one(*[NAN] * 8)
    assert same(average((other, 0), (part, 2), (other, 0)), part["w"])


def test_parts_without_a_share_are_not_read() -> None:
    class Silent(Known):
        def get(self, fqn: str) -> torch.Tensor:
            raise AssertionError("it was read")

    assert average((Silent(one(1.0)), 0), (one(2.0), 1), (one(4.0), 1)).tolist() == [3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_equal_in_all_parts_stays_what_it_is(dtype: torch.dtype) -> None:
    """With a share of 0.1 and 0.9 in float32, products do not sum to what they were made of."""
    torch.manual_seed(0)
    frozen = torch.cat([torch.tensor([-0.0, INF, -INF, 1e-45]), torch.randn(1000)]).to(dtype)
    made = average(*[({"w": frozen.clone()}, share) for share in (0.1, 0.7, 1.3)])
    assert same(made, frozen)


def test_infinities_and_nans_that_differ_go_the_way_of_floating_point() -> None:
    made = average((one(INF, INF, NAN, 1.0), 1), (one(1.0, -INF, 1.0, -INF), 1))
    assert made[0] == INF
    assert made[1].isnan()
    assert made[2].isnan()
    assert made[3] == -INF


def test_a_plain_sum_keeps_nothing() -> None:
    assert average((one(1.0), 1), (one(1.0), 1), normalize=False).tolist() == [2.0]


# -- integers and others that are no numbers ---------------------------------------------------

CODES = [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_no_number_is_taken_where_all_parts_agree(dtype: torch.dtype) -> None:
    part = one(1.0, 0.0, dtype=dtype)
    made = average((part, 1), ({"w": part["w"].clone()}, 3))
    assert same(made, part["w"])


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_no_number_is_unusable_where_parts_differ(dtype: torch.dtype) -> None:
    parts = [(one(1.0, 0.0, dtype=dtype), 1), (one(1.0, 1.0, dtype=dtype), 1)]
    source = opened(WeightedAverage(parts))
    assert source.info("w").unusable == f"{str(dtype)[6:]} that is not the same in all parts"
    with pytest.raises(SourceError, match="'w' is unusable"):
        source.get("w")


def test_only_what_is_no_number_is_read_to_be_described() -> None:
    class Reads(Known):
        def __init__(self, number: int) -> None:
            super().__init__({"f": torch.ones(2), "n": torch.tensor(number)})
            self.read: list[str] = []

        def get(self, fqn: str) -> torch.Tensor:
            self.read.append(fqn)
            return super().get(fqn)

        revision = None  # type: ignore[assignment]

    parts = Reads(1), Reads(1)
    source = opened(WeightedAverage([(part, 1) for part in parts]))
    assert [part.read for part in parts] == [[], []]
    for _ in range(3):
        for name in source.names():
            source.info(name)
    assert [part.read for part in parts] == [["n"], ["n"]]


# -- what does not fit together ---------------------------------------------------------------


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    first = {"a": torch.ones(2), "b.weight": torch.ones(2), "c": torch.ones(2), "d": torch.ones(1)}
    second = {**first, "b.wieght": torch.ones(2), "c": torch.ones(3), "d": torch.ones(1).half()}
    del second["b.weight"]
    third = {f"module.{name}": value for name, value in first.items()}
    merge = WeightedAverage([(first, 1), (second, 1), (third, 1)])
    with pytest.raises(SourceError, match="do not fit together") as info:
        opened(merge)
    assert problems_of(info) == {
        ("b.wieght", "unexpected"),
        ("b.weight", "missing"),
        ("c", "shape"),
        ("d", "dtype"),
        *((name, "unexpected") for name in third),
        *((name, "missing") for name in first),
    }
    hints = {problem.subject: problem.hint for problem in info.value.problems}
    assert hints["b.wieght"] == "did you mean 'b.weight'?"
    assert "no prefix 'module.'" in hints["module.a"]
    assert len({p.found for p in info.value.problems if p.subject == "b.weight"}) == 2
    assert "part 2 (a state_dict of 4 entries)" in str(info.value)


def test_parts_that_cannot_be_read_are_told_with_all_that_does_not_fit(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    merge = WeightedAverage([(broken, 1), (one(1.0), 1), ("no file", 1), (one(1.0, 2.0), 1)])
    with pytest.raises(SourceError, match="Parts of a merge cannot be read") as info:
        opened(merge)
    assert problems_of(info) == {("part 1", "unreadable"), ("part 3", "unreadable"), ("w", "shape")}
    hints = [problem.hint for problem in info.value.problems]
    assert "broken.safetensors" in hints[0]
    assert "no file" in hints[1]


def test_unusable_entries_are_told_with_their_part() -> None:
    source = opened(WeightedAverage([(one(1.0), 1), ({"w": torch.eye(2).to_sparse()}, 1)]))
    assert "sparse_coo" in source.info("w").unusable
    assert "in part 2" in source.info("w").unusable
    assert source.info("w").shape == (1,)


def test_what_a_state_dict_would_not_hold_need_not_be_everywhere() -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    program = TensorMap({**state, "mask": torch.ones(1)}, not_persistent=["mask"])
    both = [(program, 1), (program, 1)]
    assert set(opened(WeightedAverage(both)).names()) == {"weight", "bias", "mask"}
    assert not opened(WeightedAverage(both)).info("mask").persistent
    for parts in ([(program, 1), (state, 1)], [(state, 1), (program, 1)]):
        assert set(opened(WeightedAverage(parts)).names()) == {"weight", "bias"}


def test_a_part_that_changes_its_shape_meanwhile_is_not_broadcast() -> None:
    changing = one(1.0, 2.0)
    source = opened(WeightedAverage([(one(1.0, 2.0), 1), (changing, 1)]))
    changing["w"] = torch.ones(1)
    with pytest.raises(SourceError, match=r"float32 \(1,\), no longer float32 \(2,\)"):
        source.get("w")


ODD: dict[str, Any] = {
    "no parts": [],
    "text": "a.safetensors",
    "no list": 5,
    "no pairs": [one(1.0), one(1.0)],
    "no number": [(one(1.0), "0.3")],
    "a bool": [(one(1.0), True)],
    "not finite": [(one(1.0), INF), (one(1.0), 1)],
    "NaN": [(one(1.0), NAN)],
    "nothing at all": [(one(1.0), 0)],
    "nothing in sum": [(one(1.0), 1), (one(1.0), -1)],
    "too little in sum": [(one(1.0), 1e308), (one(1.0), -1e308), (one(1.0), 1e-320)],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_parts_are_refused_when_they_are_written(case: str) -> None:
    with pytest.raises(ConfigError):
        WeightedAverage(ODD[case])


def test_all_odd_parts_are_told() -> None:
    with pytest.raises(ConfigError) as info:
        WeightedAverage([(one(1.0), NAN), one(1.0), (one(1.0), None), (one(1.0), 1)])
    assert problems_of(info) == {
        ("part 1", "not finite"),
        ("part 2", "not a pair"),
        ("part 3", "no number"),
    }


def test_sums_without_normalizing_may_be_nothing_but_not_of_nothing() -> None:
    assert average((one(1.0), 1), (one(3.0), -1), normalize=False).tolist() == [-2.0]
    with pytest.raises(ConfigError):
        WeightedAverage([(one(1.0), 0)], normalize=False)


# -- nested, and revisions --------------------------------------------------------------------


def test_merges_are_parts_of_merges(tmp_path: Path) -> None:
    save_file(one(8.0), tmp_path / "model.safetensors")
    inner = WeightedAverage([(one(1.0), 1), (one(3.0), 1)])
    single = WeightedAverage([(one(4.0), 1)])
    tasks = refitkit.TaskVectors(tmp_path, [(single, 0.5)])
    assert average((inner, 1), (tasks, 1)).tolist() == [4.0]
    with pytest.raises(SourceError, match="do not fit") as info:
        opened(WeightedAverage([(WeightedAverage([(one(1.0), 1), (one(1.0, 2.0), 1)]), 1)]))
    assert problems_of(info) == {("part 1", "unreadable"), ("w", "shape")}


def revision(*parts: tuple[Any, float], **how: Any) -> Any:
    return opened(WeightedAverage(parts, **how)).revision("w")


def test_revisions_are_those_of_all_parts_that_count() -> None:
    a, b, silent = Known(one(1.0)), Known(one(2.0)), one(3.0)
    assert isinstance(opened(WeightedAverage([(a, 1)])), KnowsRevisions)
    assert isinstance(opened(WeightedAverage([(a, 1)])), WeightSource)
    assert revision((a, 1), (b, 1)) == revision((Known(one(1.0)), 0.5), (Known(one(2.0)), 0.5))
    assert revision((a, 1), (b, 1)) == revision((silent, 0), (a, 1), (b, 1))
    assert revision((a, 1), (silent, 1)) is None
    different = [
        revision((a, 1), (b, 1)),
        revision((b, 1), (a, 1)),
        revision((a, 1), (b, 2)),
        revision((a, 0.5), (b, 0.5), normalize=False),
        revision((a, 1), (a, 1), normalize=False),
        revision((a, 3), normalize=False),
        revision((a, 1)),
        revision((b, 1)),
    ]
    assert None not in different
    assert len(set(different)) == len(different)


def test_one_part_has_its_own_revision() -> None:
    a, b = Known(one(1.0)), Known(one(2.0))
    assert revision((a, 5)) == revision((a, 1), (b, 0)) == a.revision("w")


def test_parts_of_one_revision_are_what_they_are_nan_and_all() -> None:
    part = one(NAN)
    part["w"].view(torch.int32)[0] = 0x7FC12345
    parts = (Known(part), 1), (Known(part), 2)
    assert revision(*parts) == Known(part).revision("w")
    assert same(average(*parts), part["w"])


def test_revisions_of_what_is_no_number_are_of_all_parts() -> None:
    """Also of those that have no share: they decide whether it can be used."""
    one_, two = (Known({"w": torch.tensor(n)}) for n in (1, 2))
    assert revision((one_, 1), (one_, 1)) == one_.revision("w")
    assert revision((one_, 1), (two, 0)) not in {None, one_.revision("w"), two.revision("w")}
    assert revision((one_, 1), ({"w": torch.tensor(1)}, 0)) is None


def test_unknown_names_are_key_errors() -> None:
    source = opened(WeightedAverage([(Known(one(1.0)), 1), (Known(one(2.0)), 1)]))
    for ask in (source.info, source.get, source.revision):
        with pytest.raises(KeyError):
            ask("x")


def test_a_refit_with_delta_reads_no_part_again() -> None:
    """What is told by revisions is what a refit believes."""
    module = make_module(2)
    pipeline = refitkit.Pipeline(plugins=[FakePlugin()])
    compiled = pipeline.load(module)
    parts = [weights_for(module, fill) for fill in (1.0, 3.0)]
    merge = WeightedAverage([(Known(part), 1) for part in parts])
    pipeline.refit(compiled, merge, delta=True)
    report = pipeline.refit(compiled, merge, delta=True).report
    assert report.slots_unchanged == len(compiled.slots)
    (held,) = {float(v.flatten()[0]) - n for n, v in enumerate(module.engines["e0"].live.values())}
    assert held == 2.0


def test_merges_are_switched_off_by_name() -> None:
    pipeline = refitkit.Pipeline({"no_plugins": {"merges"}})
    with pytest.raises(SourceError, match="WeightedAverage"):
        pipeline.open_weights(WeightedAverage([(one(1.0), 1)]))
