"""The drop-in on a backend in memory: what it plans, and what it does not plan again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit import compat
from refitkit.config import PLAN_CACHE_VARIABLE
from refitkit.pipeline import Pipeline
from tests.fakes import BACKEND, FakeModule, KeyedPlugin, same_state

if TYPE_CHECKING:
    from pathlib import Path


def program_of(seed: int) -> torch.export.ExportedProgram:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).eval()
    return torch.export.export(model, (torch.zeros(2, 3),))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> KeyedPlugin:
    monkeypatch.delenv(PLAN_CACHE_VARIABLE, raising=False)
    found = KeyedPlugin()
    monkeypatch.setattr(compat, "Pipeline", lambda config: Pipeline(config, plugins=[found]))
    monkeypatch.setattr(FakeModule, "module", property(lambda self: self), raising=False)
    return found


def compiled_by_somebody() -> FakeModule:
    """A module without a plan."""
    module: Any = Pipeline(plugins=[KeyedPlugin()]).compile(program_of(0), BACKEND, prove=False)
    return module.opened  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", [True, False])
def test_the_second_refit_of_a_module_plans_nothing(plugin: KeyedPlugin, in_place: bool) -> None:
    module = compiled_by_somebody()
    before = module.by_slot()
    for seed in (1, 2):
        found = compat._refit(module, program_of(seed), in_place=in_place)
        assert (found is module) == in_place
        assert same_state(found.by_slot(), dict(program_of(seed).state_dict))
    assert plugin.keyed.drafts == 1
    assert same_state(module.by_slot(), before) != in_place


def test_another_module_finds_the_plan_in_the_folder(
    plugin: KeyedPlugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modules = [compiled_by_somebody(), compiled_by_somebody()]
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, str(tmp_path))
    for seed, module in enumerate(modules):
        found = compat._refit(module, program_of(seed))
        assert same_state(found.by_slot(), dict(program_of(seed).state_dict))
    assert plugin.keyed.drafts == 1
    assert len(list(tmp_path.iterdir())) == 1
