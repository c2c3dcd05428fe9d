"""A few small models of the zoo (``make zoo`` runs all), and what the zoo itself can see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.recipe import RefitPlan
from scripts.zoo import runner
from scripts.zoo.check import check
from scripts.zoo.models import zoo
from scripts.zoo.result import Result, raw
from scripts.zoo.table import page
from scripts.zoo.weights import fill
from tests.tensorrt.helpers import needs_torch_tensorrt

if TYPE_CHECKING:
    from pathlib import Path

FEW = [
    ("nn/batch norm with its own eps", "float16"),
    ("nn/channels last", "float16"),
    ("nn/complex rope", "float32"),
    ("nn/expanded parameters", "float32"),
    ("nn/flat parameter, dynamic batch", "bfloat16"),
    ("nn/folded weights", "float32"),
    ("nn/lifted constants", "float32"),
    ("nn/lora", "float32"),
    ("nn/orthogonal by cayley", "float32"),
    ("nn/orthogonal by householder", "float32"),
    ("nn/scalars and nothing", "float16"),
    ("nn/spectral norm of attention", "float32"),
    ("nn/tied weights in two engines", "bfloat16"),
    ("nn/transposed conv2d", "float32"),
    ("nn/weight norm", "bfloat16"),
]


@needs_torch_tensorrt
@pytest.mark.parametrize(("name", "dtype"), FEW)
def test_plans_give_what_the_reference_rebuilds(name: str, dtype: str) -> None:
    result = check(zoo()[name], dtype, engines=name.endswith("engines"))
    assert (result.status, result.reason) == ("ok", "")
    assert result.slots == sum(result.states.values())
    assert "unmapped" not in result.states
    assert result.states["recipe"]
    assert {one["differ"] for one in result.rounds.values()} == {0}
    if name.endswith("engines"):
        assert result.engines == 2
        assert result.bytes == "equal"


@needs_torch_tensorrt
def test_the_zoo_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    materialize = RefitPlan.materialize

    def meddle(self: RefitPlan, weights: Any, **options: Any) -> Any:
        (slots,) = materialize(self, weights, **options).values()
        bias, weight = sorted(slots, key=lambda name: slots[name].numel())
        slots[bias] = slots[bias].clone()
        slots[bias].reshape(-1)[-1].copysign_(-slots[bias].reshape(-1)[-1])
        slots[weight] = slots[weight][:-1]
        return {"_run_on_acc_0": slots}

    monkeypatch.setattr(RefitPlan, "materialize", meddle)
    result = check(zoo()["nn/lora"], "bfloat16", engines=False)
    assert (result.status, result.reason) == ("failed", "round C: 2 slots differ from the rebuild")
    whys = sorted(why for _, why in result.rounds["C"]["slots"])
    assert whys[0].startswith("1 of 8 elements")
    assert whys[1] == "torch.bfloat16 x 56, not torch.bfloat16 x 64"


def test_raw_bytes_tell_zeros_apart_and_know_a_nan() -> None:
    assert raw(torch.tensor([0.0])) != raw(torch.tensor([-0.0]))
    assert raw(torch.tensor([float("nan")])) == raw(torch.tensor([float("nan")]))
    assert raw(torch.arange(4.0).reshape(2, 2).t()) == raw(torch.tensor([0.0, 2.0, 1.0, 3.0]))


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("name", ["nn/tied weights", "nn/conv2d", "nn/relative position bias"])
def test_weights_of_a_round_move_and_keep_their_domain(name: str, outliers: bool) -> None:
    entry = zoo()[name]
    first = entry.model("float32", 1).state_dict()
    second = entry.model("float32", 2, outliers=outliers).state_dict()
    for fqn, value in second.items():
        if value.is_floating_point():
            moved = value != first[fqn]
            assert moved.all() or (outliers and moved.float().mean() > 0.9), fqn
        else:
            assert sorted(value.flatten().tolist()) == sorted(first[fqn].flatten().tolist()), fqn
        if fqn.endswith("running_var"):
            assert (value > 0).all()
    if name == "nn/tied weights":
        assert second["embed.weight"].data_ptr() == second["head.weight"].data_ptr()


def test_tensors_whose_elements_share_memory_are_filled() -> None:
    model = zoo()["nn/expanded parameters"].make()
    before = model.state_dict()["rows"].clone()
    fill(model, 3)
    after = model.state_dict()["rows"]
    assert after.stride() == (0, 1)
    assert (after != before).all()


def test_results_are_kept_and_a_process_that_dies_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    results = tmp_path / "results.jsonl"
    tasks = [("nn/lora", "float32"), ("nn/einsum", "float32")]
    runner.run(tasks, results, engines=False, workers=1)
    found = runner.read(results)
    assert list(found) == tasks
    assert {one["status"] for one in found.values()} == {"failed"}
    assert "ended with 1" in found["nn/lora", "float32"]["reason"]


def test_the_page_counts_and_names_failures() -> None:
    good = Result("good", "float32", slots=3, engines=2, states={"recipe": 2, "pinned": 1})
    good.rounds = {"B": {"outliers": False, "differ": 0, "slots": []}}
    good.seconds, good.bytes = {"plan": 1.0, "reference B": 2.0}, "equal"
    bad = Result("bad", "float16", slots=1, engines=1, states={"unmapped": 1})
    bad.fail("1 slots are unmapped")
    refused = Result("no", "float32").fail("torch.export: why", "upstream")
    text = page([json.loads(json.dumps(vars(one))) for one in (good, bad, refused)])
    assert "| all slots bit-equal, none unmapped | 1 of 2 |" in text
    assert "| good | float32 | 3 | 2 | 2/1/0/0 | 0 | 0 | equal | 1.0 |" in text
    assert "- bad, float16: 1 slots are unmapped" in text
    assert "- no, float32: torch.export: why" in text
