"""docs/guides/plans.md: its code runs, and what it says of plans is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.model import SlotState

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "plans.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: ([\w-]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_every_python_block_runs_below_and_every_state_is_told() -> None:
    assert PAGE.count("```python") == len(BLOCKS)
    for state in SlotState:
        assert f"| `{state}` |" in PAGE


@pytest.mark.skipif(not upstream.is_installed(), reason="torch_tensorrt is not installed")
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for name, code in BLOCKS.items():
        exec(compile(code, f"plans.md:{name}", "exec"), names)  # noqa: S102
    plan = names["plan"]
    assert {row.state for row in plan.ledger} == {SlotState.RECIPE}
    assert (tmp_path / "model.refitplan").stat().st_size
    weight = names["later"].state_dict()["conv.weight"]
    given = [value for slots in names["values"].values() for value in slots.values()]
    assert weight.data_ptr() in {value.data_ptr() for value in given}  # no copy, as it says
