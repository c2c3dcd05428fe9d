"""A refit of a saved module with its scheme in a process without other imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import refitkit_quant

CODE = """
import sys, torch, refitkit
settings = {"plugin_settings": {"quant": {"scheme": "scheme.json"}}}
pipeline = refitkit.Pipeline(settings if sys.argv[2:] else None)
compiled = pipeline.load("module")
inputs = (torch.load("inputs.pt"),) if sys.argv[1] == "outputs" else None
report = pipeline.refit(compiled, "weights.safetensors", inputs=inputs, verify=sys.argv[1]).report
print(report.verification.ok, len(report.transforms))
"""


def run(folder, verifier, *settings):
    command = [sys.executable, "-c", CODE, verifier, *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_quantized_values_of_torchao(made, ids, tmp_path):
    """No weight is quantized here, but the module's program has an op of torchao."""
    case = made("int4-group-8")
    case.compiled.save(tmp_path / "module")
    case.scheme.save(tmp_path / "scheme.json")
    torch.save(ids, tmp_path / "inputs.pt")
    state = case.eager(case.floats(1)).state_dict()
    save_file({n: v.clone() for n, v in state.items()}, tmp_path / "weights.safetensors")
    assert run(tmp_path, "outputs", "with settings") == "True 0"


def test_the_scheme_travels_with_the_saved_module(made, ids, tmp_path):
    """No settings: the plan has the scheme, and the float weights are quantized by it."""
    case = made("int4-group-8")
    case.compiled.save(tmp_path / "module")
    torch.save(ids, tmp_path / "inputs.pt")
    floats = {n: v.clone() for n, v in case.floats(1).state_dict().items()}
    save_file(floats, tmp_path / "weights.safetensors")
    assert run(tmp_path, "outputs") == "True 3"


def test_a_network_of_modelopt(modelopt, with_scheme, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    side = modelopt("fp8")
    model = side.quantized(0)
    scheme = refitkit_quant.scheme_of(model)
    compiled = with_scheme(scheme).compile(side.program(model), "tensorrt_network")
    compiled.save(tmp_path / "module")
    scheme.save(tmp_path / "scheme.json")
    save_file(side.calibrated(side.quantized(1)), tmp_path / "weights.safetensors")
    assert run(tmp_path, "engine-bytes", "with settings") == "True 2"
