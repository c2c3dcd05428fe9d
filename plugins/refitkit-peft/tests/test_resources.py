"""System errors while an adapter is read are resource errors, not errors of the adapter."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from refitkit.errors import ResourceError
from safetensors.torch import save_file

from refitkit_peft import Base, Lora, reading

BASE = {"lin.weight": torch.ones(4, 3)}
FACTORS = {"lin.lora_A.weight": torch.ones(2, 3), "lin.lora_B.weight": torch.ones(4, 2)}


@pytest.fixture
def adapter(tmp_path):
    """An adapter file with an alpha in its header."""
    header = {"ss_network_alpha": "8", "ss_network_dim": "2"}
    save_file(FACTORS, tmp_path / "a.safetensors", metadata=header)
    return tmp_path / "a.safetensors"


def failing(code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    return fails


def weight(adapter):
    base = Base(BASE)
    return base.source(Lora(base, {str(adapter): 1.0})).get("lin.weight")[0, 0].item()


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_header_that_cannot_be_read_is_not_left_out(adapter, code, monkeypatch):
    assert weight(adapter) == 1 + 8 / 2 * 2
    monkeypatch.setattr(reading, "read_metadata", failing(code))
    with pytest.raises(ResourceError, match=rf"cannot be read: {os.strerror(code)}"):
        weight(adapter)


def test_metadata_of_torchs_files_is_not_left_out(adapter, tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    torch.save({**FACTORS, "lin.alpha": torch.tensor(8.0)}, file)
    assert weight(file) == 1 + 8 / 2 * 2

    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    with pytest.raises(ResourceError, match=r"a\.pt' cannot be read: Cannot allocate memory"):
        reading._loaded(file, "meta")


def test_a_file_that_cannot_be_looked_at_is_neither_missing_nor_changed(adapter, monkeypatch):
    base = Base(BASE)
    monkeypatch.setattr(Path, "stat", failing(errno.EIO))
    with pytest.raises(ResourceError, match="Input/output error"):
        base.add("a", adapter)


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_folder_for_temporary_files(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with pytest.raises(ResourceError, match="cannot be copied to a temporary file: No"):
        Base(BASE, "mapped")
