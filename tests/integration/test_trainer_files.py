"""Checkpoints as trainers leave them: taken as they are, or refused with what makes them fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trainer_files import FILES, WRONG, gguf, lightning, model_of, state_of, under

import refitkit
from refitkit.errors import SourceError, WeightMismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from trainer_files import LM

IDS = torch.tensor([[1, 2, 3, 10]])
LIMIT = 1e-5
TAKEN = [name for name, file in FILES.items() if not file.flag]
REFUSED = [name for name, file in FILES.items() if file.flag]


class Engine:
    """The compiled model, back at its first weights for each test."""

    def __init__(self) -> None:
        self.first = model_of(0)
        self.compiled = refitkit.compile(torch.export.export(self.first, (IDS,)))
        self.before = self.compiled(IDS)

    def refit(self, weights: Any, **how: Any) -> Any:
        """The report of a refit under rules."""
        partial = how.pop("partial", False)
        pipeline = refitkit.Pipeline({"rules": how})
        return pipeline.refit(self.compiled, weights, partial=partial).report

    def require_equal(self, model: LM) -> None:
        with torch.no_grad():
            wanted = model(IDS)
        assert (self.compiled(IDS) - wanted).abs().max() < LIMIT

    def require_untouched(self) -> None:
        assert torch.equal(self.compiled(IDS), self.before)


@pytest.fixture(scope="module")
def shared() -> Engine:
    return Engine()


@pytest.fixture
def engine(shared: Engine) -> Engine:
    shared.refit(shared.first.state_dict())
    shared.require_untouched()
    return shared


def flags_in(error: WeightMismatchError) -> set[str]:
    return {flag for p in error.problems for flag in re.findall(r"--\w+ '[^']*'", p.hint)}


@pytest.mark.parametrize("name", TAKEN)
def test_it_is_taken_without_a_rule(engine: Engine, tmp_path: Path, name: str) -> None:
    file, model = FILES[name], model_of(1)
    report = engine.refit(file.make(model, tmp_path))
    engine.require_equal(model)
    said = " ".join(report.notes)
    assert file.note in said
    assert ("names: " in said) == bool(file.note)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_flag_that_makes_it_fit(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    file, model = FILES[name], model_of(1)
    weights = file.make(model, tmp_path)
    with pytest.raises(WeightMismatchError) as info:
        engine.refit(weights)
    engine.require_untouched()
    assert file.flag in " ".join(problem.hint for problem in info.value.problems)
    assert file.rules is not None
    report = engine.refit(weights, **file.rules)
    engine.require_equal(model.bfloat16().float() if file.of_bf16 else model)
    assert file.note in " ".join(report.notes)


def test_each_of_several_is_named_with_its_flag(engine: Engine, tmp_path: Path) -> None:
    beside = {
        "EMA beside the model": {"--subtree 'ema.'", "--subtree 'net.'"},
        "EMA beside a wrapped model": {"--subtree 'model_ema.module.'", "--subtree 'model.'"},
        "timm": {"--subtree 'state_dict.'", "--subtree 'state_dict_ema.'"},
        "EMA beside plain names": {r"--ignore 'ema\..*'", "--subtree 'ema.'"},
        "two wrapped models": {"--subtree 'model.'", "--subtree 'module.'"},
    }
    for name, flags in beside.items():
        with pytest.raises(WeightMismatchError) as info:
            engine.refit(FILES[name].make(model_of(1), tmp_path))
        assert flags_in(info.value) == flags, name
        assert len(info.value.problems) == len(flags)
    engine.require_untouched()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_never_taken(engine: Engine, tmp_path: Path, name: str) -> None:
    file = tmp_path / "wrong.pt"
    weights = WRONG[name](model_of(1))
    if name != "on the meta device":  # which a file cannot hold
        torch.save(weights, file)
        weights = file
    with pytest.raises(WeightMismatchError):
        engine.refit(weights)
    engine.require_untouched()


def test_shapes_are_named_of_the_only_model_with_all_names(engine: Engine) -> None:
    with pytest.raises(WeightMismatchError, match="it is another model") as info:
        engine.refit({"net": state_of(model_of(5, width=16))})
    kinds = {problem.kind for problem in info.value.problems}
    assert kinds == {"shape"}
    assert "net.model.layers.0.weight" in {problem.subject for problem in info.value.problems}


def test_in_part_nothing_is_guessed(engine: Engine) -> None:
    state = state_of(model_of(1))
    for given in (lightning(under("net.", state)), under("net.", state)):
        with pytest.raises(WeightMismatchError, match=r"rules\.subtree"):
            engine.refit(given, partial=True)
    engine.require_untouched()


def test_a_rule_wins(engine: Engine) -> None:
    """One subtree fits, and the user names another one."""
    given = {**under("net.", state_of(model_of(1))), "old.lm_head.weight": torch.ones(11, 8)}
    with pytest.raises(WeightMismatchError, match=r"model\.layers\.0\.weight: missing"):
        engine.refit(given, subtree="old.")
    engine.require_untouched()


def test_gguf_is_refused_clearly(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="GGUF") as info:
        engine.refit(gguf(model_of(1), tmp_path))
    assert "converted from" in info.value.hint
    engine.require_untouched()


def test_two_sources_are_compared_under_the_names_of_the_program(
    engine: Engine, tmp_path: Path
) -> None:
    """A file has one name of the tied weights, a live module both."""
    model = model_of(1)
    file = FILES["save_pretrained, tied"].make(model, tmp_path)
    report = refitkit.diff(
        file, lightning(under("net.", state_of(model))), plan=engine.compiled.plan
    )
    assert not report.differs
    assert "under 'state_dict.net.'" in " ".join(report.notes)
    report = refitkit.diff(file, model)
    assert not report.differs
    rows = {row.name: row.note for row in report.rows}
    assert rows["lm_head.weight"] == "A has it as 'model.embed_tokens.weight'"
    report = refitkit.diff(engine.compiled, {"net": state_of(model)})
    assert report.counts["changed"] == len(report.rows)
    assert "under 'net.'" in " ".join(report.notes)


def test_all_of_the_trainers_are_there() -> None:
    assert len(FILES) >= 40
