"""Moving averages: torch's own as judge, copies, whole updates or none, snapshots."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import refitkit
from refitkit import Ema
from refitkit.errors import ConfigError, SourceError, WeightMismatchError
from tests.unit.builtin.merges.helpers import opened, problems_of, same


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(37, 29)
        self.norm = torch.nn.BatchNorm1d(29)
        self.phase = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.wide = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(2), persistent=False)


def train(model: Net, steps: int) -> Any:
    """Models after each step, the same object each time."""
    for step in range(steps):
        torch.manual_seed(step)
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point() or value.is_complex():
                    value.add_(torch.randn_like(value) * 0.1)
            model.norm.num_batches_tracked += 1
        yield model


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("as_module", [True, False])
def test_it_is_the_average_of_swa_utils_bit_for_bit(decay: float, as_module: bool) -> None:
    torch.manual_seed(9)
    model = Net()
    judge = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    judge.update_parameters(model)
    ema = Ema(decay, model if as_module else model.state_dict())
    for number, now in enumerate(train(model, 5), 1):
        judge.update_parameters(now)
        ema.update(now if as_module else now.state_dict())
        assert ema.updates == number
    source = opened(ema)
    wanted = judge.module.state_dict()
    assert set(source.names()) == wanted.keys()
    for name, value in wanted.items():
        if name == "norm.num_batches_tracked":  # an average of counts is no count
            assert source.get(name).tolist() == 5
        elif name == "phase":  # real and imaginary parts each, here
            assert torch.allclose(source.get(name), value, rtol=1e-5, atol=1e-6)
        else:
            assert same(source.get(name), value), name


def test_low_precision_is_averaged_in_float32() -> None:
    """In bfloat16 a step of a thousandth is lost each time."""
    ema = Ema(0.999, {"w": torch.ones(3, dtype=torch.bfloat16)})
    wanted = torch.ones(3)
    for _ in range(1000):
        ema.update({"w": torch.full((3,), 2.0, dtype=torch.bfloat16)})
        wanted = torch.lerp(wanted, torch.full((3,), 2.0), 1 - 0.999)
    made = opened(ema).get("w")
    assert 1.6 < made[0] < 1.7
    assert same(made, wanted.bfloat16())


def test_infinities_that_stay_are_kept() -> None:
    mask = torch.tensor([-math.inf, -0.0, 1.0])
    ema = Ema(0.9, {"mask": mask.clone()})
    ema.update({"mask": mask.clone()})
    assert same(opened(ema).get("mask"), mask)


def test_what_is_no_number_is_that_of_the_last_update() -> None:
    state = {
        "n": torch.tensor([1, 2]),
        "b": torch.tensor([True]),
        "f8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    ema = Ema(0.9, state)
    later = {"n": torch.tensor([5, 6]), "b": torch.tensor([False]), "f8": state["f8"].clone()}
    ema.update(later)
    assert all(same(opened(ema).get(name), value) for name, value in later.items())


def test_nobody_shares_its_tensors() -> None:
    """Neither those at the start, nor those of an update, nor what was opened."""
    state = {"w": torch.ones(2), "n": torch.tensor(1), "d": torch.ones(2, dtype=torch.float64)}
    ema = Ema(0.5, state)
    for value in state.values():
        value.fill_(9)
    first = opened(ema)
    assert [first.get(name).flatten()[0].item() for name in state] == [1, 1, 1]
    update = {name: torch.full_like(value, 3) for name, value in state.items()}
    ema.update(update)
    for value in update.values():
        value.fill_(9)
    second = opened(ema)
    assert [second.get(name).flatten()[0].item() for name in state] == [2, 3, 2]
    assert [first.get(name).flatten()[0].item() for name in state] == [1, 1, 1]


def test_what_was_read_stays_what_it_is() -> None:
    ema = Ema(0.5, {"w": torch.ones(2)})
    held = opened(ema).get("w")
    ema.update({"w": torch.zeros(2)})
    assert held.tolist() == [1, 1]


def test_a_mismatching_update_changes_nothing_and_tells_all() -> None:
    state = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)}
    ema = Ema(0.5, state)
    before = opened(ema)
    update = {
        "a": torch.zeros(2),
        "b": torch.zeros(3),
        "c": torch.zeros(2).double(),
        "e": torch.zeros(1),
    }
    with pytest.raises(WeightMismatchError, match="nothing was updated") as info:
        ema.update(update)
    assert problems_of(info) == {
        ("b", "shape"),
        ("c", "dtype"),
        ("d", "missing"),
        ("e", "unexpected"),
    }
    with pytest.raises(WeightMismatchError) as info:
        ema.update({**state, "a": torch.eye(2).to_sparse(), "b": 5})
    assert problems_of(info) == {("a", "unusable"), ("b", "unusable")}
    assert ema.updates == 0
    after = opened(ema)
    assert all(same(after.get(name), value) for name, value in state.items())
    assert after.revision("a") == before.revision("a")


def test_an_update_that_breaks_off_changes_nothing() -> None:
    class Failing(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.reads += 1
            if self.reads > 4:
                raise OSError("the disk is gone")
            return super().__getitem__(name)

    ema = Ema(0.5, {name: torch.ones(2) for name in "abc"})
    with pytest.raises(OSError, match="gone"):
        ema.update(Failing({name: torch.zeros(2) for name in "abc"}))
    assert ema.updates == 0
    assert [opened(ema).get(name)[0].item() for name in "abc"] == [1, 1, 1]
    ema.update({name: torch.zeros(2) for name in "abc"})
    assert [opened(ema).get(name)[0].item() for name in "abc"] == [0.5, 0.5, 0.5]


def test_an_update_that_changes_its_shape_meanwhile_is_not_broadcast() -> None:
    class Shifty(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.reads += 1
            return super().__getitem__(name)[: 2 if self.reads == 1 else 1]

    ema = Ema(0.5, {"w": torch.ones(2)})
    with pytest.raises(SourceError, match="no longer"):
        ema.update(Shifty(w=torch.zeros(2)))


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf, "0.9", None])
def test_a_decay_is_a_number_from_0_to_1(decay: Any) -> None:
    with pytest.raises(ConfigError, match="0 to 1"):
        Ema(decay, {"w": torch.ones(1)})


@pytest.mark.parametrize("thing", ["a.safetensors", 5, {3: torch.ones(1)}, None])
def test_what_cannot_be_opened_without_a_pipeline_is_refused(thing: Any) -> None:
    with pytest.raises(SourceError, match="open_weights"):
        Ema(0.9, thing)
    with pytest.raises(SourceError, match="open_weights"):
        Ema(0.9, {"w": torch.ones(1)}).update(thing)


def test_unusable_entries_at_the_start_are_all_told() -> None:
    with pytest.raises(SourceError, match="cannot be averaged") as info:
        Ema(0.9, {"a": torch.eye(2).to_sparse(), "b": torch.ones(1, device="meta"), "c": "text"})
    assert problems_of(info) == {(name, "unusable") for name in "abc"}


def test_extra_state_is_no_weight() -> None:
    ema = Ema(0.9, {"w": torch.ones(1), "child._extra_state": {"any": "thing"}})
    ema.update({"w": torch.ones(1), "child._extra_state": {"other": "thing"}})
    assert list(opened(ema).names()) == ["w"]


def test_it_begins_with_merges_and_opened_sources() -> None:
    parts = [({"w": torch.tensor([value])}, 1) for value in (1.0, 3.0)]
    merge = refitkit.WeightedAverage(parts)
    for start in (merge, opened(merge), Ema(0.1, {"w": torch.tensor([2.0])})):
        assert opened(Ema(0.9, start)).get("w").tolist() == [2.0]


def test_gradients_are_left_behind() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    ema = Ema(0.5, {"w": weight})
    ema.update({"w": weight * 2})
    made = opened(ema).get("w")
    assert not made.requires_grad
    assert made.tolist() == [1.5, 1.5]
    assert weight.grad is None


def test_revisions_count_updates() -> None:
    state = {"a": torch.ones(1), "b": torch.zeros(1)}
    ema, other = Ema(0.5, state), Ema(0.5, state)
    known = [opened(one).revision(name) for one in (ema, other) for name in "ab"]
    again = opened(ema)
    assert again.revision("a") == known[0]
    ema.update(state)
    known.append(opened(ema).revision("a"))
    assert len(set(known)) == 5
    assert again.revision("a") == known[0]
    with pytest.raises(KeyError):
        again.revision("c")


def test_no_update_of_several_threads_is_lost() -> None:
    ema = Ema(0.5, {"w": torch.ones(1000)})

    def work() -> None:
        for _ in range(50):
            ema.update({"w": torch.zeros(1000)})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ema.updates == 200
    assert same(opened(ema).get("w"), expected(200))


def expected(updates: int) -> torch.Tensor:
    value = torch.ones(1000)
    for _ in range(updates):
        value = torch.lerp(value, torch.zeros(1000), 0.5)
    return value
