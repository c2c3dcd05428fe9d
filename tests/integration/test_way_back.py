"""Several modules at once, and back again, with real engines: bits, outputs, versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import digest, slots_of
from aoti_models import CASES

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

    Fresh = Callable[[str], refitkit.CompiledModule]

NAMES = ("transformer", "small", "convnet")


def state(name: str, seed: int) -> dict[str, torch.Tensor]:
    return CASES[name].model(seed).state_dict()


def answers(modules: list[refitkit.CompiledModule]) -> list[str]:
    return [digest(one(*CASES[name].args())) for name, one in zip(NAMES, modules, strict=True)]


@pytest.mark.parametrize("name", ["transformer", "convnet"])
def test_back_to_the_first_weights_from_anywhere(name: str, fresh: Fresh) -> None:
    compiled, args = fresh(name), CASES[name].args()
    keeping = refitkit.Pipeline({"keep_base": True})
    first = digest(compiled(*args))
    some = dict(list(state(name, 2).items())[:1])
    second = keeping.refit(compiled, state(name, 1), inputs=args)
    middle = digest(compiled(*args))
    third = keeping.refit(compiled, some, partial=True)
    assert len({first, middle, digest(compiled(*args))}) == 3
    third.undo()
    assert digest(compiled(*args)) == middle
    with pytest.raises(refitkit.NotRefittableError):
        compiled.restore(1)
    second.undo()  # to version 0, of which there are copies
    assert digest(compiled(*args)) == first
    keeping.refit(compiled, state(name, 1))
    report = keeping.restore(compiled).report
    assert digest(compiled(*args)) == first
    assert (report.version, report.verification is not None) == (6, True)


def test_undoing_the_last_copies_nothing(fresh: Fresh) -> None:
    """The engine stages its own spare buffer: values are in their place already."""
    compiled = fresh("small")
    result = refitkit.refit(compiled, state("small", 1))
    engine = compiled.engines["model"]
    spare = {n: t.data_ptr() for n, t in engine.previous().items()}  # type: ignore[attr-defined]
    result.undo()
    assert {n: engine.read(n).data_ptr() for n in spare} == spare  # type: ignore[attr-defined]


def test_three_models_as_one(fresh: Fresh) -> None:
    modules = [fresh(name) for name in NAMES]
    before = answers(modules)
    jobs: list[Any] = [
        (one, state(name, 1), {"inputs": CASES[name].args()})
        for name, one in zip(NAMES, modules, strict=True)
    ]
    results = refitkit.refit_all(jobs)
    assert [r.report.verification.verifier for r in results if r.report.verification] == [
        "outputs"
    ] * 3
    after = answers(modules)
    assert not set(before) & set(after)
    results.undo()
    assert answers(modules) == before
    refitkit.refit_all(jobs)
    assert answers(modules) == after


def spoil(state: dict[str, torch.Tensor], how: str) -> Any:
    """Weights of the last of three that cannot be used, in one way or another."""
    name = next(n for n, t in state.items() if t.is_floating_point())
    match how:
        case "missing":
            del state[name]
        case "shape":
            state[name] = state[name].flatten()[:-1]
        case "not finite":
            state[name] = torch.full_like(state[name], torch.nan)
        case "no file":
            return "no/such/model.safetensors.index.json"
    return state


@pytest.mark.parametrize("how", ["missing", "shape", "not finite", "no file", "verdict"])
def test_the_last_of_three_fails(how: str, fresh: Fresh) -> None:
    modules = [fresh(name) for name in NAMES]
    before, slots = answers(modules), [slots_of(one) for one in modules]
    jobs: list[Any] = [(one, state(n, 1)) for n, one in zip(NAMES, modules, strict=True)]
    last = (modules[2], spoil(state(NAMES[2], 1), how))
    if how == "verdict":
        args = CASES[NAMES[2]].args()
        last = (*last, {"inputs": args, "reference": torch.zeros(1)})  # type: ignore[assignment]
    with pytest.raises(refitkit.RefitError) as info:
        refitkit.refit_all([*jobs[:2], last])
    assert info.value.problems
    assert all(problem.subject.startswith("module 3") for problem in info.value.problems)
    assert "odule 3" in info.value.message
    assert answers(modules) == before
    assert [slots_of(one) for one in modules] == slots
    assert [one.version for one in modules] == [0, 0, 0]
    refitkit.refit_all(jobs)
    assert [one.version for one in modules] == [1, 1, 1]


def test_weights_that_are_given_up_need_no_second_set(fresh: Fresh) -> None:
    compiled, args = fresh("transformer"), CASES["transformer"].args()
    refitkit.refit(compiled, state("transformer", 2))
    report = refitkit.refit(compiled, state("transformer", 1), rollback=False, inputs=args).report
    assert [(row.kind, row.bytes) for row in report.memory] == [("none", 0)]
    assert report.verification is not None
    assert report.verification.ok
    assert compiled.free_spare() == 0
    expected = CASES["transformer"].model(1)(*args)
    assert torch.allclose(compiled(*args), expected, atol=1e-5)
    refitkit.refit(compiled, state("transformer", 0)).undo()
    assert torch.allclose(compiled(*args), expected, atol=1e-5)


def test_an_undoing_is_judged_by_what_the_weights_were(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the memory that is staged, which would be compared with itself."""
    compiled = fresh("small")
    result = refitkit.refit(compiled, state("small", 1))
    before = slots_of(compiled)
    engine: Any = compiled.engines["model"]
    stage = engine._stage

    def spoiling(values: Any) -> Any:
        staged = stage(values)
        staged.staged("b.bias").add_(1)
        return staged

    monkeypatch.setattr(engine, "_stage", spoiling)
    with pytest.raises(refitkit.VerificationError, match=r"b\.bias"):
        result.undo()
    assert slots_of(compiled) == before
