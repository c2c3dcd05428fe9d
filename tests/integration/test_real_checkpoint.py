"""Real weights: ``docs/guides/real-checkpoint.md`` runs, and says what it says it prints.

Its engine is compiled once for all tests here, from a random model of all-MiniLM-L6-v2's
configuration behind a module that does not take the pooler's result.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import refitkit
from refitkit.errors import WeightMismatchError

PAGE = (Path(__file__).parents[2] / "docs/guides/real-checkpoint.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    """Names of the guide, once all of it ran; the text that it printed as ``said``."""
    assert PAGE.count("```python") == len(BLOCKS) == 2
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for name, code in BLOCKS.items():
            exec(compile(code, f"real-checkpoint.md:{name}", "exec"), names)  # noqa: S102
            if name == "compile":
                names["at_first"] = names["compiled"](*names["inputs"])
    return names | {"said": said.getvalue()}


@pytest.fixture(scope="module")
def eager(guide: dict[str, Any]) -> torch.Tensor:
    """What the real model answers, loaded by transformers."""
    from transformers import AutoModel

    real = AutoModel.from_pretrained(guide["folder"], attn_implementation="eager").eval()
    with torch.no_grad():
        answer: torch.Tensor = guide["Embedder"](real)(*guide["inputs"])
    return answer


@pytest.fixture(scope="module")
def weights(guide: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The real weights, by the names of the program."""
    from safetensors.torch import load_file

    found = load_file(guide["folder"] / "model.safetensors")
    return {f"encoder.{name}": value for name, value in found.items()}


def test_the_guide_says_what_it_prints(guide: dict[str, Any]) -> None:
    told = [line[2:] for line in BLOCKS["refit"].splitlines() if line.startswith("# ")]
    assert guide["said"].splitlines() == told


def test_the_real_weights_give_the_real_answers(guide: dict[str, Any], eager: torch.Tensor) -> None:
    verification = guide["report"].verification
    assert verification
    assert verification.ok
    answer = guide["compiled"](*guide["inputs"])
    assert float((answer - eager).abs().max()) < 1e-5
    assert float((answer - guide["at_first"]).abs().max()) > 0.1


def test_a_checkpoint_without_the_pooler_will_do(
    guide: dict[str, Any], weights: dict[str, torch.Tensor], eager: torch.Tensor
) -> None:
    kept = {name: value for name, value in weights.items() if ".pooler." not in name}
    assert len(kept) == len(weights) - 2
    moved = {name: value * 1.5 for name, value in weights.items() if value.is_floating_point()}
    refitkit.refit(guide["compiled"], moved)
    refitkit.refit(guide["compiled"], kept, inputs=guide["inputs"])
    answer = guide["compiled"](*guide["inputs"])
    assert float((answer - eager).abs().max()) < 1e-5


def test_a_checkpoint_of_another_size_is_refused_and_changes_nothing(
    guide: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    before = guide["compiled"](*guide["inputs"])
    wrong = ("encoder.embeddings.word_embeddings.weight", "encoder.pooler.dense.weight")
    cut = {name: value[1:] if name in wrong else value for name, value in weights.items()}
    with pytest.raises(WeightMismatchError) as caught:
        refitkit.refit(guide["compiled"], cut, inputs=guide["inputs"])
    assert {problem.subject for problem in caught.value.problems} == set(wrong)
    assert guide["compiled"](*guide["inputs"]).equal(before)
