"""Checkpoints that others cut or overwrite while a refit reads them: an error, and no signal.

Every case runs in a process of its own, which a page that is gone from a mapped file would end.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from aoti_helpers import answer_of, start_child

import refitkit

WIDTH = 1024
FILES = ["safetensors", "zipped", "sharded", "distributed", "merged"]

BEFORE_THE_COMMIT = ["StageFinished load", "StageStarted check", "StageFinished check"]
BEFORE_THE_COMMIT += ["StageStarted stage"]
OVER = '{"rollback": false}'  # then there is no place where values are staged: a check reads them


def case(kind: str, how: str, when: str, options: str = "{}") -> str:
    return f"{kind} | {how} | {when} | {options}"


REFUSED = [case(*one) for one in product(FILES, ["cut", "overwrite"], BEFORE_THE_COMMIT)]
REFUSED += [case(kind, "rewrite", when) for kind in FILES for when in BEFORE_THE_COMMIT[::2]]
REFUSED += [
    case(kind, how, "2 reads of stage")
    for kind, how in product(FILES, ["cut", "overwrite", "rewrite"])
]
REFUSED += [
    case(kind, how, "2 reads of check", OVER)
    for kind, how in product(FILES, ["cut", "overwrite"])
    if kind != "distributed"
]
REFUSED += [  # of shards, the one that is written to is the second one
    case(kind, "rewrite_mapped", f"{3 if kind == 'sharded' else 2} reads of stage")
    for kind in FILES
    if kind != "distributed"  # those have checksums of their own, which no longer match
]
REFUSED += [
    case(kind, "cut", when, '{"delta": true}')
    for kind in FILES
    for when in ("StageStarted compare", "StageFinished compare")
]
REFUSED += [  # nothing is read before the commit, which has no way back
    case(kind, "cut", "StageStarted stage", '{"rollback": false, "verify": "none"}')
    for kind in FILES
]
REFUSED += [  # files that were opened could be of two checkpoints
    case(kind, how, "StageStarted stage")
    for kind in ("sharded", "distributed")
    for how in ("replace", "remove")
]
TAKEN = [
    case(kind, how, "StageStarted check")
    for kind in ("safetensors", "zipped", "merged")
    for how in ("replace", "remove")
]
TAKEN += [case(kind, "link", "2 reads of stage") for kind in FILES]
TAKEN += [case(kind, "cut", "StageFinished stage", '{"verify": "none"}') for kind in FILES]
TAKEN += [  # what was staged is verified before the commit
    case(kind, how, "StageFinished commit") for kind, how in product(FILES, ["cut", "rewrite"])
]
LOST = [
    case(kind, "cut", "StageFinished stage", '{"rollback": false, "verify": "none"}')
    for kind in FILES
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("spoilt")
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    program = torch.export.export(model.eval(), (torch.ones(1, WIDTH),))
    refitkit.compile(program).save(folder / "model.refit")
    done = start_child("spoiling.py", folder / "model.refit", folder, *REFUSED, *TAKEN, *LOST)
    return answer_of(done)


@pytest.mark.parametrize("name", REFUSED)
def test_a_spoilt_checkpoint_is_refused_and_nothing_has_changed(
    name: str, found: dict[str, Any]
) -> None:
    told = found[name]
    assert "died" not in told, told
    assert (told["error"], told["answers"], told["holds"]) == ("SourceError", "as before", "other")
    assert told["spoilt"]
    assert f"{told['file']}: changed" in told["message"]
    assert "os.replace" in told["message"]


@pytest.mark.parametrize("name", TAKEN)
def test_what_was_read_whole_is_taken_whole(name: str, found: dict[str, Any]) -> None:
    """A file that is renamed over or removed is still there for who has it open."""
    told = found[name]
    assert "died" not in told, told
    assert (told["error"], told["answers"], told["holds"]) == ("", "anew", "new")
    assert told["spoilt"]


@pytest.mark.parametrize("name", LOST)
def test_a_commit_without_a_way_back_loses_the_module_and_not_the_process(
    name: str, found: dict[str, Any]
) -> None:
    told = found[name]
    assert "died" not in told, told
    assert (told["error"], told["answers"]) == ("ModuleLostError", "never")
    assert told["spoilt"]
    assert "SourceError" in told["message"]
    assert "changed since it was opened" in told["message"]
