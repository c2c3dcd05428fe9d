"""Bases and adapters rewritten in place with the same sizes and modification times."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from refitkit import Pipeline
from refitkit.errors import SourceError
from refitkit.protocols import MayChange, SupportsReread
from safetensors.torch import save_file

from refitkit_peft.base import Base
from refitkit_peft.config import AdapterConfig
from refitkit_peft.lora import Lora

OLD, NEW = (struct.pack("<f", value) for value in (0.5, 0.75))
BASE = {"lin.weight": torch.full((4, 3), 0.5), "lin.bias": torch.full((4,), 0.5)}
FACTORS = {"lora_A": torch.full((2, 3), 0.5), "lora_B": torch.full((4, 2), 0.5)}


@pytest.fixture
def base(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapter(tmp_path):
    """A folder like peft's save_pretrained writes, with alpha 4 and rank 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lin"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {f"base_model.model.lin.{name}.weight": value for name, value in FACTORS.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def rewrite(file, old=OLD, new=NEW):
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(file.read_bytes().replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def opened(weights, keep=1, **settings):
    return Base.with_opener(
        weights, Pipeline(settings).open_weights, keep=keep, reread=bool(settings)
    )


def weight(one, adapter):
    return one.source(Lora(one, {str(adapter): 1.0})).get("lin.weight")[0, 0].item()


@pytest.mark.parametrize(
    "files",
    [
        ["adapter_config.json"],
        ["adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.safetensors"],
    ],
)
def test_config_and_tensors_are_of_one_adapter(files, base, adapter, monkeypatch):
    """Tensors are opened before the config is read; the error names all changed files."""
    load = AdapterConfig.load

    def and_rewrite(path):
        found = load(path)
        for file in files:
            old = (b'"lora_alpha": 4', b'"lora_alpha": 8') if file.endswith(".json") else ()
            rewrite(adapter / file, *old)
        return found

    monkeypatch.setattr(AdapterConfig, "load", and_rewrite)
    with pytest.raises(SourceError, match="was changed while it was read") as info:
        weight(opened(base), adapter)
    assert {problem.subject for problem in info.value.problems} == {
        str(adapter / file) for file in files
    }
    assert "os.replace" in info.value.hint


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_was_rewritten_is_read_again(file, base, adapter):
    one = opened(base)
    assert weight(one, adapter) == 0.5 + 2 * 2 * 0.5 * 0.5
    if file.endswith(".json"):
        rewrite(adapter / file, b'"lora_alpha": 4', b'"lora_alpha": 8')
    else:
        rewrite(adapter / file)
    expected = 0.5 + (4 * 2 * 0.5 * 0.5 if file.endswith(".json") else 2 * 2 * 0.75 * 0.75)
    assert weight(one, adapter) == expected


@pytest.mark.parametrize("keep", [0, 1])
def test_a_base_that_was_rewritten_is_another(keep, base, adapter):
    one = opened(base, keep)
    weight(one, adapter)
    rewrite(base)
    with pytest.raises(SourceError, match="is not the base that was opened") as info:
        weight(one, adapter)
    assert "time set back" in info.value.problems[0].found


def test_a_base_that_is_rewritten_while_it_is_read(base, adapter):
    one = opened(base)
    source = one.source(Lora(one, {str(adapter): 1.0}))
    assert isinstance(source, MayChange)
    assert isinstance(source, SupportsReread)
    source.get("lin.weight")
    source.require_unchanged()
    source.reread()
    rewrite(base)
    for ask in (lambda: source.get("lin.bias"), source.require_unchanged, source.reread):
        with pytest.raises(SourceError, match="was changed since it was opened"):
            ask()


def test_a_shard_of_the_base_that_is_replaced_meanwhile(tmp_path, adapter):
    home = {name: f"{name}.safetensors" for name in BASE}
    for name, file in home.items():
        save_file({name: BASE[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    one = opened(index)
    source = one.source(Lora(one, {str(adapter): 1.0}))
    source.get("lin.weight")
    other = tmp_path / "other"
    other.write_bytes((tmp_path / home["lin.bias"]).read_bytes())
    other.replace(tmp_path / home["lin.bias"])
    with pytest.raises(SourceError, match="was changed since it was opened"):
        source.require_unchanged()


def test_a_file_that_is_replaced_meanwhile_is_read_to_its_end(base, adapter):
    one = opened(base)
    source = one.source(Lora(one, {str(adapter): 1.0}))
    other = base.with_name("other")
    other.write_bytes(base.read_bytes().replace(OLD, NEW))
    other.replace(base)
    assert source.get("lin.bias").eq(0.5).all()
    source.require_unchanged()


def test_adapters_are_read_twice_on_request(base, adapter, monkeypatch):
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: reads.append(a[2]) or preadv(*a))
    counts = []
    for settings in ({}, {"reread": True}):
        one = opened(base, **settings)
        reads.clear()
        one.add("x", adapter)
        counts.append(len(reads))
    assert counts[1] == 2 * counts[0]
