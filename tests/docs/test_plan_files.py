"""docs/reference/plan-files.md says of the format what the schema and the reader say."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import torch

from refitkit.model import FORMAT, LedgerRow, OpCall, PlanData, SlotState
from refitkit.recipe import ops
from refitkit.recipe.store import DIGEST, MANIFEST, PINNED
from tests.fakes import make_module, plan_for

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "plan-files.md").read_text()


def first_column(heading: str) -> list[str]:
    """Names in the first column of the table whose heading starts so."""
    table = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].partition("\n")[2]
    return re.findall(r"^\| `([\w./]+)`", table, re.MULTILINE)


def test_members() -> None:
    file = io.BytesIO(plan_for(make_module(1)).to_bytes())
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == sorted(first_column("member"))
    assert sorted(first_column("member")) == sorted([MANIFEST, PINNED, DIGEST])


def test_fields_of_the_manifest() -> None:
    assert first_column("field") == list(PlanData.model_fields)
    assert f"`{FORMAT}`" in PAGE
    rows = re.search(r"one row for every slot: (.*) \|", PAGE)
    assert rows is not None
    assert re.findall(r"`(\w+)`", rows[1]) == list(LedgerRow.model_fields)


def test_states() -> None:
    assert first_column("`state`") == [str(state) for state in SlotState]


def test_the_call_that_is_shown_is_one() -> None:
    [shown] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    call = OpCall.model_validate(json.loads(shown))
    assert ops.is_allowed(call.op)
    assert list(json.loads(shown)) == list(OpCall.model_fields)


def test_about_so_many_overloads_are_allowed() -> None:
    names = torch._C._dispatch_get_all_op_names()
    split = [n.removeprefix("aten::").partition(".") for n in names if n.startswith("aten::")]
    count = sum(ops.is_allowed(f"aten.{packet}.{rest or 'default'}") for packet, _, rest in split)
    said = re.search(r"about (\d+) overloads", PAGE)
    assert said is not None
    assert abs(count - int(said[1])) < 100
