"""Options as plain data, and those that come from a file. No torch_tensorrt is needed."""

from __future__ import annotations

import json
import operator
import sys

import pytest
import torch

from refitkit.builtin.torch_tensorrt.settings import options_from_file, plain_options
from refitkit.errors import ConfigError, UnsupportedTargetError


def test_options_become_what_json_can_hold() -> None:
    relu = torch.ops.aten.relu
    given = {
        "a": True,
        "b": torch.float16,
        "c": {relu.default, "torch.ops.aten.add.Tensor"},
        "d": [relu, operator.add],
        "e": None,
    }
    found = plain_options(given)
    assert found == {
        "a": True,
        "b": "torch.float16",
        "c": ["torch.ops.aten.add.Tensor", "torch.ops.aten.relu.default"],
        "d": ["_operator.add", "torch.ops.aten.relu"],
        "e": None,
    }
    assert plain_options(json.loads(json.dumps(found))) == found


def test_what_cannot_be_written_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as info:
        plain_options({"a": object(), "b": lambda: 0, "c": torch.nn.ReLU(), "d": 1, "e": {"f": 1}})
    assert {p.subject: p.found for p in info.value.problems} == {
        "a": "object",
        "b": "function",
        "c": "ReLU",
        "e": "dict",
    }


def nothing(_: str) -> bool:
    """``Tools.may_import`` without installed plugins."""
    return False


def test_a_file_may_name_modules_that_are_imported_already() -> None:
    options = {"imports": ["json", "refitkit.errors"], "min_block_size": 1}
    assert options_from_file(options, "file", nothing) == options


def test_a_file_may_name_modules_of_installed_plugins() -> None:
    options = {"imports": ["antigravity"]}
    assert options_from_file(options, "file", "antigravity".__eq__) == options
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("names", [["json", "antigravity"], "antigravity", [["json"]], {"x": 1}, 7])
def test_a_file_cannot_have_others_imported(names: object) -> None:
    with pytest.raises(UnsupportedTargetError, match="'file'") as info:
        options_from_file({"imports": names}, "file", nothing)
    assert info.value.problems
    assert "json" not in {p.subject for p in info.value.problems}
    assert "antigravity" not in sys.modules


def test_a_file_cannot_name_files() -> None:
    options = {"timing_cache_path": "/etc/passwd", "engine_cache_dir": "/", "min_block_size": 1}
    assert options_from_file(options, "file", nothing) == {"min_block_size": 1}
