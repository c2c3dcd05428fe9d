"""State that calls write: a refit keeps it unless the weights contain it, and reports which."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits
from safetensors.torch import save_file
from torch import nn

import refitkit
from refitkit.builtin.aotinductor.engine import SwappingEngine
from refitkit.builtin.aotinductor.native import SWITCH
from refitkit.cli.main import main
from refitkit.model import StageFinished
from refitkit.protocols import SlotValue

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fresh = Callable[[], refitkit.CompiledModule]

LIMIT = 1e-5
X, AT = torch.ones(1, 4), [torch.tensor([n]) for n in range(3)]
KEPT = "state that calls write was kept, as the weights do not contain it: cache"
RESET = "state that calls write was reset to its value at export: cache"


class Decoder(nn.Module):
    """A KV cache that no state_dict holds, a counter that it holds, and a table that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(3, 4), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0) + 0.3, persistent=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.index_copy_(0, at, self.k(x) * self.table)
        self.seen.add_(1)
        nothing = torch.tensor([[0.0] * 4] * 3)  # the bits of an empty cache
        return (self.cache + nothing).sum(0), self.seen.clone()


def model(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder().eval()


def program(seed: int) -> torch.export.ExportedProgram:
    return torch.export.export(model(seed), (X, AT[0]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved module with the weights of seed 0, which was never called."""
    path = tmp_path_factory.mktemp("state") / "decoder.refit"
    refitkit.compile(program(0)).save(path)
    return path


@pytest.fixture
def fresh(path: Path) -> Fresh:
    return lambda: refitkit.load(path)


def called(compiled: refitkit.CompiledModule) -> tuple[torch.Tensor, Decoder]:
    """What the cache holds after one call, and the eager model that has had the same call."""
    eager = model(0)
    with torch.no_grad():
        eager(X, AT[0])
    compiled(X, AT[0])
    held = compiled.read("cache").clone()
    assert held[0].abs().min() > 0
    assert torch.allclose(held, eager.cache, atol=LIMIT)
    return held, eager


def outcomes(report: refitkit.RefitReport) -> dict[str, str]:
    return {row.slot: row.outcome for row in report.state}


def notes_of(report: refitkit.RefitReport) -> list[str]:
    return [note.partition(" (")[0] for note in report.notes if note.startswith("state")]


class CallsOnceStaged:
    """A plugin that calls the module when a refit is staged, and fails after the commit if told."""

    name = "calls-once-staged"

    def __init__(self, call: Callable[[], Any], *, fails: bool = False) -> None:
        self._call, self._fails = call, fails

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        if isinstance(event, StageFinished) and (event.verb, event.stage) == ("refit", "stage"):
            self._call()

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        if self._fails and report.outcome == "committed":
            raise RuntimeError("no")


HOWS: dict[str, dict[str, Any]] = {
    "full": {},
    "delta": {"delta": True},
    "without a way back": {"rollback": False},
    "in part": {"partial": True},
    "judged by outputs": {"inputs": (X, AT[1])},
    "judged by outputs, in part": {"inputs": (X, AT[1]), "partial": True},
    "written over, judged by outputs": {"inputs": (X, AT[1]), "rollback": False},
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_state_is_kept_as_load_state_dict_keeps_it(how: dict[str, Any], fresh: Fresh) -> None:
    compiled, new = fresh(), model(1).state_dict()
    held, eager = called(compiled)
    for number, seed in enumerate((1, 2), 1):  # into either of the two buffers
        new = model(seed).state_dict()
        eager.load_state_dict(new)
        report = refitkit.refit(compiled, new, **how).report
        assert outcomes(report) == {"cache": "kept", "seen": "set"}
        assert notes_of(report) == [KEPT]
        assert bits(compiled.read("cache")[:number]) == bits(held[:number])
        with torch.no_grad():
            wanted, seen = eager(X, AT[number])
        found, counted = compiled(X, AT[number])
        assert torch.allclose(found, wanted, atol=LIMIT)
        assert counted == seen == 1
        held = compiled.read("cache").clone()


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_state_is_reset_when_asked(how: dict[str, Any], fresh: Fresh) -> None:
    compiled, new = fresh(), model(1).state_dict()
    called(compiled)
    refitkit.refit(compiled, model(2).state_dict())
    report = refitkit.refit(compiled, new, reset_state=True, **how).report
    assert outcomes(report) == {"cache": "reset", "seen": "set"}
    assert notes_of(report) == [RESET]
    assert not compiled.read("cache").any()


SOURCES: dict[str, Callable[[], Any]] = {
    "live module": lambda: model(1),
    "live module that was called": lambda: called_model(1),
    "program": lambda: program(1),
    "average of programs": lambda: refitkit.WeightedAverage([(program(1), 1), (program(1), 1)]),
}


def called_model(seed: int) -> Decoder:
    made = model(seed)
    with torch.no_grad():
        made(X, AT[2])
        made.seen.zero_()
    return made


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_state_of_modules_and_programs_is_no_weight(source: Any, fresh: Fresh) -> None:
    compiled = fresh()
    held, _ = called(compiled)
    report = refitkit.refit(compiled, source(), inputs=(X, AT[1])).report
    assert outcomes(report) == {"cache": "kept", "seen": "set"}
    assert bits(compiled.read("cache")) == bits(held)
    assert bits(compiled.read("k.weight")) == bits(model(1).k.weight)
    report = refitkit.refit(compiled, source(), reset_state=True).report
    assert outcomes(report)["cache"] == "reset"
    assert not compiled.read("cache").any()


def test_state_that_weights_name_is_set(fresh: Fresh) -> None:
    compiled = fresh()
    called(compiled)
    cache = torch.full((3, 4), 2.0)
    for options in ({}, {"partial": True}, {"reset_state": True}):
        weights = {**model(1).state_dict(), "cache": cache, "seen": torch.tensor(5)}
        report = refitkit.refit(compiled, weights, inputs=(X, AT[1]), **options).report
        assert outcomes(report) == {"cache": "set", "seen": "set"}
        assert not notes_of(report)
        assert bits(compiled.read("cache")) == bits(cache)
        assert compiled.read("seen") == 5
        compiled(X, AT[0])


def test_a_refit_in_part_without_the_counter_keeps_it(fresh: Fresh) -> None:
    compiled = fresh()
    called(compiled)
    part = {"k.bias": torch.ones(4)}
    report = refitkit.refit(compiled, part, partial=True, inputs=(X, AT[1])).report
    assert outcomes(report) == {"cache": "kept", "seen": "kept"}
    report = refitkit.refit(compiled, part, partial=True, reset_state=True).report
    assert outcomes(report) == {"cache": "reset", "seen": "kept"}  # no plan keeps weights
    assert compiled.read("seen") == 1


@pytest.mark.parametrize(
    "how", [{}, {"inputs": (X, AT[2])}, {"delta": True}, {"partial": True}, {"rollback": False}]
)
def test_calls_before_the_commit_are_not_forgotten(how: dict[str, Any], fresh: Fresh) -> None:
    """The outputs are judged from the state that the reference began with."""
    compiled = fresh()
    pipeline = refitkit.Pipeline(plugins=[CallsOnceStaged(lambda: compiled(X, AT[1]))])
    held, _ = called(compiled)
    part = {name: value for name, value in model(1).state_dict().items() if name != "seen"}
    weights = part if how.get("partial") else model(1).state_dict()
    pipeline.refit(compiled, weights, **how)
    cache = compiled.read("cache")
    assert bits(cache[0]) == bits(held[0])
    assert cache[1].abs().min() > 0  # with the weights from before
    assert compiled.read("seen") == (2 if how.get("partial") else 0)


@pytest.mark.parametrize("options", [{}, {"reset_state": True}])
def test_a_failed_refit_leaves_state_alone(options: dict[str, Any], fresh: Fresh) -> None:
    compiled = fresh()
    plugin = CallsOnceStaged(lambda: compiled(X, AT[1]), fails=True)
    held, _ = called(compiled)
    with pytest.raises(refitkit.PluginError):
        refitkit.Pipeline(plugins=[plugin]).refit(compiled, model(1).state_dict(), **options)
    with pytest.raises(refitkit.VerificationError):
        refitkit.refit(compiled, model(1), inputs=(X, AT[2]), reference=(X[0], AT[0]), **options)
    cache = compiled.read("cache")
    assert bits(cache[0]) == bits(held[0])
    assert cache[1].abs().min() > 0
    assert compiled.read("seen") == 2
    assert bits(compiled.read("k.weight")) == bits(model(0).k.weight)
    report = refitkit.refit(compiled, model(1)).report
    assert bits(compiled.read("cache")[0]) == bits(held[0])
    assert outcomes(report)["cache"] == "kept"


def test_undo_leaves_state_that_the_refit_kept(fresh: Fresh) -> None:
    compiled = fresh()
    called(compiled)
    keeping = refitkit.Pipeline({"keep_base": True})
    result = keeping.refit(compiled, model(1).state_dict())
    compiled(X, AT[1])
    held = compiled.read("cache").clone()
    report = result.undo().report
    assert outcomes(report) == {"cache": "kept", "seen": "set"}
    assert bits(compiled.read("cache")) == bits(held)
    assert compiled.read("seen") == 1
    report = keeping.restore(compiled).report
    assert bits(compiled.read("cache")) == bits(held)
    assert outcomes(report)["cache"] == "kept"


@pytest.mark.parametrize("depth", [1, 3])
def test_undo_brings_state_back_that_the_refit_reset(depth: int, fresh: Fresh) -> None:
    compiled = fresh()
    held, _ = called(compiled)
    pipeline = refitkit.Pipeline({"keep_versions": depth})
    result = pipeline.refit(compiled, model(1).state_dict(), reset_state=True)
    compiled(X, AT[1])
    result.undo()
    assert bits(compiled.read("cache")) == bits(held)
    assert compiled.read("seen") == 1


def test_saved_modules_and_copies_have_the_state(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh()
    held, _ = called(compiled)
    compiled.save(tmp_path / "called.refit")
    result = refitkit.refit(compiled, model(1).state_dict(), copy=True)
    again = refitkit.load(tmp_path / "called.refit")
    refitkit.refit(again, model(1).state_dict())
    for one in (compiled, result.module, again):
        assert bits(one.read("cache")) == bits(held)
    refitkit.refit(again, model(2).state_dict(), reset_state=True)
    again.restore()
    assert bits(again.read("cache")) == bits(held)


def test_several_modules_and_their_options(fresh: Fresh) -> None:
    modules = [fresh(), fresh()]
    held = [called(one)[0] for one in modules]
    new = model(1).state_dict()
    results = refitkit.refit_all(
        [(modules[0], new), (modules[1], new, {"reset_state": True})], verify="weights"
    )
    assert [outcomes(result.report)["cache"] for result in results] == ["kept", "reset"]
    assert bits(modules[0].read("cache")) == bits(held[0])
    assert not modules[1].read("cache").any()
    results.undo()
    assert [bits(one.read("cache")) for one in modules] == [bits(one) for one in held]


def test_state_is_not_compared_with_weights(fresh: Fresh) -> None:
    compiled = fresh()
    compiled(X, AT[0])
    same = {**model(0).state_dict(), "seen": torch.tensor(1)}
    assert refitkit.verify(compiled, same).ok
    assert refitkit.verify(compiled, same, inputs=(X, AT[1])).ok
    assert "cache" not in {row.name for row in refitkit.diff(compiled, same).rows}
    with pytest.raises(refitkit.VerificationError):
        refitkit.verify(compiled, {**same, "cache": torch.zeros(3, 4)})


def test_nobody_knows_the_state_of_an_engine_that_was_not_planned(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So all of what is live is carried over."""
    monkeypatch.setenv(SWITCH, "1")
    compiled = fresh()
    engine = SwappingEngine(compiled.engines["model"].runner)  # type: ignore[attr-defined]
    assert not any(slot.mutable for slot in engine.slots.values())
    value = SlotValue(engine.slots["k.bias"], "given", (), lambda: torch.ones(4))
    staged = engine.stage_partial([value])
    engine.runner.run([X, AT[0]])
    held = engine.read("cache").clone()
    staged.commit()
    assert bits(engine.read("cache")) == bits(held)
    assert held.any()


def test_a_constant_is_not_taken_for_an_empty_cache(fresh: Fresh) -> None:
    plan = fresh().plan
    assert plan is not None
    sources = {row.slot.name: row.sources for row in plan.ledger}
    (constant,) = sources.keys() - {"k.weight", "k.bias", "cache", "seen", "table"}
    assert sources[constant] == ("lifted_tensor_0",)


def test_the_command_line_keeps_and_resets(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh()
    held, _ = called(compiled)
    module, weights, out = (tmp_path / name for name in ("in.refit", "w.safetensors", "o.refit"))
    compiled.save(module)
    save_file(model(1).state_dict(), weights)
    command = ["refit", str(module), str(weights), "-o", str(out)]
    assert main(command) == 0
    assert bits(refitkit.load(out).read("cache")) == bits(held)
    assert main([*command, "--reset-state"]) == 0
    assert not refitkit.load(out).read("cache").any()


def test_a_model_in_training_takes_its_statistics_from_weights() -> None:
    """They are in the state_dict, so they are set, as load_state_dict does."""
    norm = nn.BatchNorm1d(4)
    exported = torch.export.export(copy.deepcopy(norm), (torch.randn(5, 4),))
    compiled = refitkit.compile(exported, prove=False)
    compiled(torch.randn(5, 4) + 3)
    assert compiled.read("running_mean").abs().min() > 0
    x = torch.randn(5, 4)
    report = refitkit.refit(compiled, norm, inputs=(x,)).report
    assert set(outcomes(report).values()) == {"set"}
    assert not compiled.read("running_mean").any()
    assert torch.allclose(compiled(x), norm(x), atol=LIMIT)
    assert torch.allclose(compiled.read("running_mean"), norm.running_mean, atol=LIMIT)


class Aliased(nn.Module):
    """A cache that two layers have, a weight that calls write, and another name of a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.table = nn.Linear(4, 4), nn.Embedding(5, 4, max_norm=1.0)
        self.writes, self.reads = nn.Module(), nn.Module()
        cache = torch.zeros(3, 4)
        for layer in (self.writes, self.reads):
            layer.register_buffer("cache", cache, persistent=False)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("count", self.seen, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.writes.cache.add_(self.k(x))
        self.count.add_(1)
        return self.reads.cache.sum(0) + self.table(torch.tensor(2)), self.count.clone()


def test_state_of_several_names_and_weights_that_calls_write() -> None:
    def made(seed: int) -> Aliased:
        torch.manual_seed(seed)
        return Aliased().eval()

    x = torch.ones(3, 4)
    compiled, eager = refitkit.compile(torch.export.export(made(0), (x,))), made(0)
    for seed in (1, 2):
        with torch.no_grad():
            for found, wanted in zip(compiled(x), eager(x), strict=True):
                assert torch.allclose(found, wanted, atol=LIMIT)
        new = made(seed).state_dict()
        report = refitkit.refit(compiled, new, inputs=(x,)).report
        eager.load_state_dict(new)
        assert sorted(outcomes(report).values()) == ["kept", "set", "set"]
    with torch.no_grad():
        for found, wanted in zip(compiled(x), eager(x), strict=True):
            assert torch.allclose(found, wanted, atol=LIMIT)
