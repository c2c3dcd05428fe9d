"""A few models of the zoo of AOTInductor (``make zoo-aoti`` runs all), and what it can see."""

from __future__ import annotations

import json
from typing import Any

import pytest

import refitkit
from scripts.zoo.check_aoti import check_aoti, there_and_back
from scripts.zoo.models import zoo_aoti
from scripts.zoo.result import FIRST_SEED, Result
from scripts.zoo.table import with_part
from scripts.zoo.table_aoti import part

FEW = [
    ("nn/cache in the state_dict", "float32"),
    ("nn/dict of inputs, dynamic batch", "float32"),
    ("nn/nested regions", "float32"),
    ("nn/several outputs", "float32"),
    ("nn/two parametrizations", "float32"),
    ("transformers/LlamaForCausalLM, strict", "float32"),
]


@pytest.mark.parametrize(("name", "dtype"), FEW)
def test_refits_give_the_outputs_of_the_other_model(name: str, dtype: str) -> None:
    result = check_aoti(zoo_aoti()[name], dtype)
    assert (result.status, result.reason) == ("ok", "")
    assert result.slots == sum(result.states.values())
    assert result.states["recipe"]
    assert result.errors.keys() == {"A", "B"}


def test_the_zoo_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo_aoti()["nn/embedding bag with offsets, sum"]
    model = entry.model("float32", FIRST_SEED)
    compiled = refitkit.compile(entry.program(model, "float32"), prove=False)
    reasons = {factors: _seen(monkeypatch, entry, compiled, *factors) for factors in FACTORS}
    for factors, reason in FACTORS.items():
        assert reasons[factors].startswith(reason)
    assert reasons[1.0, 1.0] == ""


FACTORS = {
    (1.0, 1.0): "",
    (1.01, 1.0): "B: output 0 differs",
    (1.0, 1 + 1e-6): "back at A, outputs are not bit-equal",
}
"""What the weights of the two refits are spoilt with, and what is said then."""


def _seen(monkeypatch: pytest.MonkeyPatch, entry: Any, compiled: Any, *factors: float) -> str:
    refit, left = refitkit.refit, list(factors)
    refit(compiled, entry.model("float32", FIRST_SEED).state_dict())

    def meddle(compiled: Any, weights: dict[str, Any], **options: Any) -> Any:
        spoilt = {"head.bias": weights["head.bias"] * left.pop(0)}
        return refit(compiled, {**weights, **spoilt}, **options)

    result = Result(entry.name, "float32")
    with monkeypatch.context() as patched:
        patched.setattr(refitkit, "refit", meddle)
        model = entry.model("float32", FIRST_SEED)
        there_and_back(entry, "float32", model, compiled, entry.calls("float32"), result)
    assert not left
    return result.reason


def test_there_are_at_least_sixty_models() -> None:
    names = zoo_aoti().keys()
    families = {name.partition("/")[0] for name in names}
    assert families == {"nn", "torchvision", "timm", "transformers"}
    assert len(names) >= 60


def test_the_part_counts_and_names_failures() -> None:
    good = Result("nn/good", "float32", slots=3, states={"recipe": 2, "pinned": 1})
    good.errors, good.notes = {"A": 0.0, "B": 2e-7}, ["a note"]
    bad = Result("timm/bad", "float32").fail("B: output 0 differs by 1")
    refused = Result("nn/no", "float32").fail("torch.export: why", "upstream")
    text = part([json.loads(json.dumps(vars(one))) for one in (good, bad, refused)])
    assert "| models | 2: 1 nn, 1 timm |" in text
    assert "| B equal to eager, A bit-equal again | 1 of 2 |" in text
    assert "| nn/good | float32 | 3 | 2/1 | ok | 2.0e-07 |" in text
    assert "- timm/bad, float32: B: output 0 differs by 1" in text
    assert "- nn/no, float32: torch.export: why" in text
    assert "- nn/good: a note" in text


def test_each_part_of_the_page_is_written_without_the_other() -> None:
    page = with_part("", "tensorrt_network", "# One\n")
    assert page == "# One\n"
    both = with_part(page, "aotinductor", "# Two\n")
    assert both.startswith("# One\n")
    assert both.endswith("# Two\n")
    again = with_part(with_part(both, "tensorrt_network", "# First\n"), "aotinductor", "# 2\n")
    assert again == both.replace("# One", "# First").replace("# Two", "# 2")
