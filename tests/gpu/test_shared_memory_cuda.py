"""Tensors that share memory with weights follow a refit on a GPU, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt import upstream
from tests.gpu.trt_helpers import PIPELINE, close, options_for
from tests.shared_memory import MODELS

BACKENDS = ["aotinductor", "python", "cpp"]


def model_on_gpu(name: str, seed: int = 0) -> Any:
    """Made on the GPU: moving a module there would separate what shares memory."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        return MODELS[name]().eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["turned", "packed", "views only"])
def test_a_refit_answers_as_the_model_after_load_state_dict(name: str, backend: str) -> None:
    if backend != "aotinductor" and not upstream.is_installed():
        pytest.skip("torch_tensorrt is not installed")
    inputs = tuple(one.cuda() for one in MODELS[name].inputs)
    model = model_on_gpu(name)
    program = torch.export.export(model, inputs, strict=False)
    if backend == "aotinductor":
        compiled = refitkit.compile(program)
    else:
        compiled = PIPELINE.compile(program, "torch_tensorrt", options_for(backend))
    state = copy.deepcopy(model_on_gpu(name, seed=1).state_dict())
    before = compiled(*inputs)
    report = PIPELINE.refit(compiled, state, inputs=inputs).report
    assert report.verification is not None
    assert report.verification.ok
    with torch.no_grad():
        model.load_state_dict(state)
        assert close(compiled(*inputs), model(*inputs))
        assert not close(compiled(*inputs), before)
