"""Values that plans keep and sources override: what is known of them outlives copies and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import PlanMismatchError, UnmappedSlotError
from refitkit.model import Leaf, LeafKind
from refitkit.pipeline import CompiledModule, Pipeline
from refitkit.pipeline.mapping import decode_overridden
from refitkit.pipeline.targets import OVERRIDDEN_MEMBER, PLAN_MEMBER
from tests.fakes import (
    FakeModule,
    FakePlugin,
    OpenEngine,
    call_row,
    make_plan,
    op_call,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

W = {"w": torch.full((2,), 3.0)}


class Saving(FakeModule):
    """It remembers what it was saved with, and can be opened again."""

    def reopen(self) -> Saving:
        engines = [OpenEngine(name, engine.live) for name, engine in self.engines.items()]
        return Saving(engines, self.attachments)

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        self.attachments = attachments


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline({"keep_base": True}, plugins=[FakePlugin()])


@pytest.fixture
def module() -> Saving:
    """One slot: a weight times a mask, which the plan keeps as ones."""
    engine = OpenEngine("e0", {"folded": torch.ones(2)})
    kinds = {"w": LeafKind.PARAMETER, "mask": LeafKind.NON_PERSISTENT_BUFFER}
    plan = make_plan(
        [call_row(engine.slots["folded"], 0, "w", "mask")],
        leaves=[Leaf(fqn=n, kind=kind, dtype="float32", shape=(2,)) for n, kind in kinds.items()],
        calls=[op_call("mul.Tensor", "@w", "@mask")],
        pinned={"mask": torch.ones(2)},
    )
    return Saving([engine], {PLAN_MEMBER: plan.to_bytes()})


@pytest.fixture
def compiled(pipeline: Pipeline, module: Saving) -> CompiledModule:
    """Its mask is not the plan's."""
    compiled = pipeline.load(module)
    pipeline.refit(compiled, {**W, "mask": torch.full((2,), 2.0)})
    return compiled


def require_refused(pipeline: Pipeline, compiled: CompiledModule) -> None:
    before = compiled()
    with pytest.raises(UnmappedSlotError, match="mask with it"):
        pipeline.refit(compiled, W, partial=True)
    assert torch.equal(compiled()["e0/folded"], before["e0/folded"])


@pytest.mark.parametrize("how", [{}, {"rollback": False}])
def test_a_copy_goes_back_to_what_was_overridden(
    how: dict[str, Any], pipeline: Pipeline, compiled: CompiledModule
) -> None:
    copy = pipeline.copy(compiled)
    require_refused(pipeline, copy)
    pipeline.refit(copy, W)
    if how:
        copy.base = {**W, "mask": torch.full((2,), 2.0)}
    pipeline.refit(copy, W, **how)
    pipeline.refit(copy, W, partial=True)  # the mask is the plan's now
    copy.restore()
    assert copy()["e0/folded"].tolist() == [6.0, 6.0]
    require_refused(pipeline, copy)


def test_a_saved_module_has_it_with_it(
    pipeline: Pipeline, compiled: CompiledModule, module: Saving, tmp_path: Path
) -> None:
    compiled.save(tmp_path / "saved")
    again = pipeline.load(module)
    require_refused(pipeline, again)
    pipeline.refit(again, W)
    pipeline.refit(again, W)
    again.restore()
    require_refused(pipeline, again)
    pipeline.refit(again, W)
    again.save(tmp_path / "saved")
    assert OVERRIDDEN_MEMBER not in module.attachments


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'"mask"', b"[" * 100_000])
def test_what_is_no_list_of_names_is_refused(content: bytes) -> None:
    with pytest.raises(PlanMismatchError, match="overridden"):
        decode_overridden(content)
