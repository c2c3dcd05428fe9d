"""How far a refit moves each slot, as the report tells it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from refitkit.config import Config
from refitkit.errors import ConfigError, EngineError
from refitkit.model import RefitReport
from refitkit.pipeline import Pipeline
from refitkit.pipeline.changes import SAMPLE, measured, sample
from refitkit.pipeline.report import UNCHANGED
from refitkit.pipeline.stage import Staged
from refitkit.program.distance import distance
from refitkit.protocols import SlotValue
from tests.fakes import (
    FakeEngine,
    FakeModule,
    FakePlugin,
    OpenEngine,
    Tripwire,
    pipeline_with,
    with_plan,
)

State = dict[str, torch.Tensor]


class Remembering(FakeEngine):
    """Cannot be read; knows what it holds once something was given to it."""

    def remembered(self, slot: str) -> torch.Tensor | None:
        return self.live[slot] if len(self.staged) > 1 else None


def held(state: State, kind: type[FakeEngine] = OpenEngine) -> FakeModule:
    return with_plan(FakeModule([kind("e", state, Tripwire())]))


def refit(state: State, new: State, *, kind: type[FakeEngine] = OpenEngine, **config: Any) -> Any:
    pipeline = pipeline_with(**{"changes": "sampled", **config})
    compiled = pipeline.load(held(state, kind))
    return pipeline.refit(compiled, new, verify="none").report


def measure(engine: OpenEngine, values: State) -> Any:
    """Rows for values that are staged, without a whole refit."""
    opened = FakeModule([engine])
    staged = Staged(opened, lambda: "A module")
    written = {
        ("e", n): SlotValue(engine.slots[n], "t", (), lambda v=v: v) for n, v in values.items()
    }
    staged.fill("e", list(written.values()), partial=False)
    return measured(Config(changes="sampled"), opened, staged, written).rows


def big(seed: int, count: int = 100_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


STATE = {
    "weight": torch.tensor([3.0, 4.0]),
    "bias": torch.zeros(2),
    "order": torch.tensor([0, 1, 2, 3]),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("how", ["sampled", "exact"])
def test_a_row_for_each_slot(how: str) -> None:
    new = {
        "weight": torch.tensor([3.0, 6.0]),
        "bias": torch.tensor([0.0, -0.5]),
        "order": torch.tensor([0, 1, 3, 2]),
        "empty": torch.zeros(0),
    }
    report = refit(STATE, new, changes=how)
    rows = {row.slot: (row.relative, row.largest, row.sampled) for row in report.changes}
    assert rows == {
        "weight": (pytest.approx(0.4), 2, False),
        "bias": (math.inf, 0.5, False),
        "order": (0.5, 1, False),
        "empty": (0, 0, False),
    }
    assert {row.engine for row in report.changes} == {"e"}
    assert report.most_changed.slot == "bias"
    assert json.loads(report.model_dump_json())["changes"][1]["relative"] == "Infinity"
    assert RefitReport.model_validate_json(report.model_dump_json()) == report


def test_a_sample_of_a_large_slot() -> None:
    old, new = big(0), big(1)
    (row,) = refit({"w": old}, {"w": new}).changes
    (exact,) = refit({"w": old}, {"w": new}, changes="exact").changes
    assert (row.sampled, exact.sampled) == (True, False)
    assert exact.relative == pytest.approx(distance(old, new).relative)
    assert row.relative != exact.relative
    assert row.relative == pytest.approx(exact.relative, rel=0.1)


def test_a_sample_is_spread_over_all_of_it() -> None:
    """Of each thirtieth some elements are looked at, and never more than a sample."""
    for count in (SAMPLE + 1, SAMPLE + 777, 65 * SAMPLE, 100_000):
        old = torch.ones(count)
        seen = sample(torch.arange(count)).reshape(-1)
        assert len(seen.unique()) == SAMPLE
        assert seen.min() == 0
        assert seen.max() >= count - 1 - count // 30
        assert (seen * 30 // count).unique().numel() == 30
        (row,) = refit({"w": old}, {"w": old * 3}).changes
        assert (row.relative, row.largest) == (2, 2)


def test_many_slots_of_many_kinds_keep_their_places() -> None:
    kinds = [torch.float32, torch.float16, torch.float64, torch.complex64, torch.int8]
    kinds += [torch.float8_e4m3fn, torch.bool]
    state, new = {}, {}
    for number in range(70):
        dtype, count = kinds[number % 7], (7, 5000, 33)[number % 3]
        state[f"s{number}"] = torch.ones(count).to(dtype)
        new[f"s{number}"] = (torch.ones(count) * (1 + number % 3)).to(dtype)
    rows = refit(state, new).changes
    assert [row.slot for row in rows] == list(state)
    for number, row in enumerate(rows):
        kind, factor = kinds[number % 7], number % 3
        whole = 0 if kind is torch.bool else min(factor, 1)
        wanted = whole if kind in {torch.int8, torch.bool} else factor
        assert row.relative == pytest.approx(wanted, rel=1e-6), row


def test_values_of_any_layout() -> None:
    """What an engine shows may lie in memory as it likes."""
    old = big(0, 6 * 5000).reshape(6, 5000)
    engine = OpenEngine("e", {"w": old, "z": torch.complex(old, old)}, Tripwire())
    for live in (old.t().contiguous().t(), old[:, ::1], old.repeat(1, 2)[:, :5000]):
        engine.live["w"], engine.live["z"] = live, torch.complex(live, live).conj()
        w, z = measure(engine, {"w": live * 2, "z": torch.complex(live, live).conj()})
        assert w.relative == pytest.approx(1)
        assert z.relative == 0


def test_what_is_not_finite() -> None:
    """A mask of infinities that stays is no change; one that changes is without measure."""
    mask = torch.tensor([0.0, -math.inf])
    (same,) = refit({"m": mask}, {"m": mask}).changes
    assert (same.relative, same.largest) == (0, 0)
    turned = torch.complex(mask, mask).conj()
    engine = OpenEngine("e", {"z": turned}, Tripwire())
    engine.live["z"] = turned  # as it is, with a sign that was put off
    (row,) = measure(engine, {"z": turned})
    assert (row.relative, row.largest) == (0, 0)
    report = refit({"m": mask}, {"m": -mask}, check_finite=False)
    (row,) = report.changes
    assert (row.relative, row.largest) == (math.inf, math.inf)
    assert any("1 slot changed beyond reason" in note for note in report.notes)


# -- notes ------------------------------------------------------------------------------------


def notes_of(report: Any) -> list[str]:
    return [note for note in report.notes if "beyond reason" in note]


def test_beyond_reason_is_told() -> None:
    """The farthest first, and those that were zeros not at all."""
    old = {f"s{n}": torch.ones(4) for n in range(9)} | {"zeros": torch.zeros(4)}
    new = {f"s{n}": torch.full((4,), n * 4.0) for n in range(9)} | {"zeros": torch.ones(4)}
    assert notes_of(refit(old, new)) == [
        (
            "6 slots changed beyond reason, by more than 10 times the old length: "
            "e/s8 31 times, e/s7 27 times, e/s6 23 times, e/s5 19 times, e/s4 15 times, and 1 more"
        )
    ]
    assert notes_of(refit(old, new, change_limit=26.5)) == [
        (
            "2 slots changed beyond reason, by more than 26.5 times the old length: "
            "e/s8 31 times, e/s7 27 times"
        )
    ]
    assert notes_of(refit(old, new, change_limit=31)) == []
    assert notes_of(refit(old, new, change_limit=None)) == []
    assert notes_of(refit(old, new, changes="off")) == []


def test_nothing_changed_is_told() -> None:
    for how in ("sampled", "exact", "off"):
        report = refit(STATE, STATE, changes=how)
        assert report.changed is False
        assert UNCHANGED in report.notes
        assert all(row.relative == 0 for row in report.changes)
        assert len(report.changes) == (0 if how == "off" else 4)


# -- who is measured --------------------------------------------------------------------------


def test_engines_that_show_nothing_have_no_rows() -> None:
    """Without a live value, or without a staged one."""

    class Hiding(OpenEngine):
        def _stage(self, values: Any) -> Any:
            staged = super()._stage(values)
            staged.__class__ = type("Hidden", (type(staged),), {"staged": None})
            return staged

    assert refit(STATE, STATE, kind=FakeEngine).changes == ()
    report = refit(STATE, STATE, kind=Hiding)
    assert report.outcome == "committed"
    assert report.changes == ()


def test_an_engine_that_remembers() -> None:
    """Nothing is known before the first refit; at the second it is."""
    pipeline = Pipeline({"changes": "sampled"}, plugins=[FakePlugin()])
    compiled = pipeline.load(held({"w": torch.ones(3)}, Remembering))
    first = pipeline.refit(compiled, {"w": torch.full((3,), 2.0)}).report
    second = pipeline.refit(compiled, {"w": torch.full((3,), 8.0)}).report
    assert first.changes == ()
    assert [row.relative for row in second.changes] == [pytest.approx(3)]


def test_only_what_is_written() -> None:
    pipeline = Pipeline({"changes": "sampled"}, plugins=[FakePlugin()])
    compiled = pipeline.load(held(STATE))
    report = pipeline.refit(compiled, {"bias": torch.ones(2)}, partial=True).report
    assert [row.slot for row in report.changes] == ["bias"]


def test_an_engine_that_fails_to_show_leaves_all_as_it_was() -> None:
    """Nothing is live yet: what was staged is discarded, and the error names the setting."""
    settings = {"changes": "sampled", "keep_versions": 0, "check_finite": False}  # that looks, too
    pipeline = Pipeline(settings, plugins=[FakePlugin()])
    opened = held(STATE)
    compiled = pipeline.load(opened)
    engine = opened.engines["e"]
    new = {name: value + 1 for name, value in STATE.items()}
    engine.wire.arm()
    pipeline.refit(compiled, STATE, verify="none")
    calls = engine.wire.calls
    assert calls.count("e.show") == len(STATE)
    for number in (n for n, call in enumerate(calls) if call in {"e.show", "e.read"}):
        before = opened.holds()
        engine.wire.arm({number: RuntimeError("no such luck")})
        with pytest.raises(EngineError, match="cannot be measured: RuntimeError: no such") as info:
            pipeline.refit(compiled, new, verify="none")
        assert "changes" in info.value.hint
        assert all(opened.holds()[name].equal(value) for name, value in before.items())
        assert engine.staged[-1].did == ["discard"]
    engine.wire.arm()
    pipeline.refit(compiled, new, verify="none")
    assert engine.live["weight"].equal(new["weight"])


@pytest.mark.parametrize(
    ("how", "factor", "asked"), [("sampled", 2, False), ("sampled", 1, True), ("off", 2, True)]
)
def test_all_of_both_sets_is_compared_where_no_sample_differs(
    how: str, factor: int, asked: bool
) -> None:
    """A sample that differs says that something changed; one that does not says nothing."""
    pipeline = Pipeline({"changes": how}, plugins=[FakePlugin()])
    opened = held({"w": big(0)})
    compiled = pipeline.load(opened)
    wire = opened.engines["e"].wire
    wire.arm()
    report = pipeline.refit(compiled, {"w": big(0) * factor}, verify="none").report
    assert report.changed is (factor != 1)
    assert ("e.changed" in wire.calls) is asked


def test_what_changes_beside_the_samples_is_seen() -> None:
    new = big(0)
    beside = set(range(new.numel())) - set(sample(torch.arange(new.numel())).reshape(-1).tolist())
    new[min(beside)] += 1
    report = refit({"w": big(0)}, {"w": new})
    assert report.changed is True
    assert [row.relative for row in report.changes] == [0]


def test_an_interrupt_goes_through() -> None:
    pipeline = Pipeline({"changes": "sampled"}, plugins=[FakePlugin()])
    opened = held(STATE)
    compiled = pipeline.load(opened)
    opened.engines["e"].wire.arm()
    pipeline.refit(compiled, STATE, verify="none")
    number = opened.engines["e"].wire.calls.index("e.show")
    opened.engines["e"].wire.arm({number: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        pipeline.refit(compiled, STATE, verify="none")
    assert opened.engines["e"].staged[-1].did == ["discard"]


@pytest.mark.parametrize("wrong", [{"changes": "some"}, {"change_limit": 0}, {"change_limit": "x"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Pipeline(wrong)
