"""Schemes as files, settings, and names of weights and scales."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import refitkit
from refitkit.errors import ConfigError, ResourceError

from refitkit_quant import QuantSettings, Scheme
from refitkit_quant.pairs import incomplete_pairs
from refitkit_quant.scheme import Int8WeightOnly, ModeloptWeight, TensorSpec, TorchaoWeight

SCHEME = Scheme(
    versions={"torchao": "0.18.0"},
    weights=(
        TorchaoWeight(
            weight=TensorSpec(name="a.weight", dtype="float32", shape=(4, 8)),
            rule=Int8WeightOnly(granularity="row"),
            parts=(TensorSpec(name="a.q", dtype="int8", shape=(4, 8)),),
        ),
        ModeloptWeight(
            weight=TensorSpec(name="b.weight", dtype="float32", shape=(4, 8)),
            format="fp8",
            amax=TensorSpec(name="b.weight_quantizer._amax", dtype="float32", shape=()),
        ),
    ),
)


def pipeline(settings):
    return refitkit.Pipeline({"plugin_settings": {"quant": settings}})


def settings_of(settings):
    return QuantSettings.of(pipeline(settings).config)


def test_a_scheme_is_the_same_after_its_file(tmp_path):
    SCHEME.save(tmp_path / "s.json")
    assert Scheme.load(tmp_path / "s.json") == SCHEME
    assert Scheme.model_validate(json.loads(SCHEME.model_dump_json())) == SCHEME


@pytest.mark.parametrize("content", ["{", "[]", '{"weights": [{"tool": "x"}]}', '{"format": "2"}'])
def test_what_is_no_scheme(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ConfigError, match=r"s\.json' is not a quantization scheme") as info:
        Scheme.load(tmp_path / "s.json")
    assert info.value.problems


def test_a_scheme_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Scheme.load(tmp_path / "s.json")


def test_a_scheme_that_the_system_does_not_let_be_read(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(ResourceError, match="Input/output error"):
        Scheme.load(tmp_path / "s.json")


@pytest.mark.parametrize("form", ["value", "data", "text", "path"])
def test_every_form_of_a_scheme_in_settings(tmp_path, form):
    SCHEME.save(tmp_path / "s.json")
    path = tmp_path / "s.json"
    forms = {
        "value": SCHEME,
        "data": SCHEME.model_dump(mode="json"),
        "text": str(path),
        "path": path,
    }
    assert settings_of({"scheme": forms[form]}).scheme == SCHEME


def test_settings_may_be_absent():
    assert QuantSettings.of(refitkit.Config()) == QuantSettings()


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({"shceme": 1}, "plugin_settings.quant.shceme"),
        ({"scheme": 3}, "plugin_settings.quant.scheme"),
        ({"error_limit": -1}, "plugin_settings.quant.error_limit"),
        ({"error_limit": float("nan")}, "plugin_settings.quant.error_limit"),
        ({"scheme": {"weights": [{"tool": "torchao"}]}}, "plugin_settings.quant.scheme.weights.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings, subject):
    with pytest.raises(ConfigError) as info:
        settings_of(settings)
    assert info.value.problems[0].subject.startswith(subject)


def test_settings_are_found_wrong_by_a_refit():
    from refitkit_quant import plugin

    with pytest.raises(ConfigError):
        plugin.refitkit_weight_transforms(pipeline({"error_limit": "much"}).config)


LEAVES = (
    "a.weight",
    "a.weight_quantizer._amax",
    "a.input_quantizer._amax",
    "pool.input_quantizer._amax",
)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"a.weight", "a.weight_quantizer._amax"}, []),
        ({"a.weight", "a.weight_quantizer._amax", "a.input_quantizer._amax"}, []),
        ({"pool.input_quantizer._amax", "z.weight_quantizer._amax"}, []),
        (set(), []),
        ({"a.weight_quantizer._amax"}, [("a.weight_quantizer._amax", "a.weight")]),
        ({"a.input_quantizer._amax"}, [("a.input_quantizer._amax", "a.weight")]),
        ({"a.weight"}, [("a.weight", "a.weight_quantizer._amax")]),
    ],
)
def test_weights_and_scales_that_were_torn_apart(names, found):
    assert [(p.subject, p.wanted) for p in incomplete_pairs(LEAVES, names)] == found


@pytest.mark.parametrize("what", ["refitkit_quant", "refitkit_quant.plugin"])
def test_importing_it_imports_nothing_heavy(what):
    code = (
        f"import sys, {what}; print({{'torch', 'torchao', 'modelopt', 'numpy'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
