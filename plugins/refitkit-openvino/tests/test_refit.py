"""Refits through refitkit: a refitted module answers like a fresh one with the new weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("openvino")

import refitkit
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKEND = "openvino"


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("weights", ["constants", "inputs"])
def test_a_refit_answers_like_a_fresh_module(case: Any, weights: str) -> None:
    old, new = case.program(0), case.program(1)
    options = {"weights": weights}
    compiled = refitkit.compile(old, BACKEND, options)
    before = case.answers(compiled)
    for found, wanted in zip(before, case.answers(old.module()), strict=True):
        torch.testing.assert_close(found, wanted)
    refitkit.refit(compiled, new.state_dict)
    fresh = case.answers(refitkit.compile(new, BACKEND, options, prove=False))
    assert same(case.answers(compiled), fresh)
    assert not same(fresh, before)
    refitkit.refit(compiled, old)
    assert same(case.answers(compiled), before)


def test_each_slot_has_the_name_of_its_weight(case: Any) -> None:
    program = case.program(0)
    compiled = refitkit.compile(program, BACKEND, prove=False)
    states = {row.slot.name: row.state for row in compiled.plan.ledger}
    kept = {"places", "lifted_tensor_0"}
    counters = {name for name in program.state_dict if name.endswith("num_batches_tracked")}
    tied = {"embed.weight", "head.weight"} & program.state_dict.keys()
    wanted = program.state_dict.keys() - counters - tied
    assert wanted <= states.keys() <= wanted | tied | kept
    assert all(state == ("pinned" if name in kept else "recipe") for name, state in states.items())


def test_an_undo_brings_the_old_answers_back(case: Any) -> None:
    compiled = refitkit.compile(case.program(0), BACKEND, prove=False)
    before = case.answers(compiled)
    result = refitkit.refit(compiled, case.program(1).state_dict)
    assert not same(case.answers(compiled), before)
    result.undo()
    assert same(case.answers(compiled), before)


@pytest.mark.parametrize("weights", ["constants", "inputs"])
def test_an_answer_outlives_later_calls_and_refits(mlp: Any, weights: str) -> None:
    compiled = refitkit.compile(mlp.program(0), BACKEND, {"weights": weights}, prove=False)
    (x,) = mlp.args
    answer = compiled(x)
    kept = answer.clone()
    assert not torch.equal(compiled(x + 1), kept)
    refitkit.refit(compiled, mlp.program(1).state_dict)
    assert not torch.equal(compiled(x), kept)
    assert torch.equal(answer, kept)


def test_a_part_of_the_weights(mlp: Any) -> None:
    compiled = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    new = mlp.program(1).state_dict
    refitkit.refit(compiled, {"0.bias": new["0.bias"]}, partial=True)
    mixed = {**mlp.program(0).state_dict, "0.bias": new["0.bias"]}
    wanted = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    refitkit.refit(wanted, mixed)
    assert same(mlp.answers(compiled), mlp.answers(wanted))


def test_a_copy_leaves_the_first_module_alone(case: Any) -> None:
    compiled = refitkit.compile(case.program(0), BACKEND, prove=False)
    before, new = case.answers(compiled), case.program(1)
    copy = refitkit.refit(compiled, new.state_dict, copy=True).module
    assert same(case.answers(compiled), before)
    assert same(case.answers(copy), case.answers(refitkit.compile(new, BACKEND, prove=False)))


def test_refused_weights_change_nothing(mlp: Any) -> None:
    compiled = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    before, state = mlp.answers(compiled), mlp.program(1).state_dict
    with pytest.raises(refitkit.WeightMismatchError) as info:
        refitkit.refit(compiled, {**state, "2.bias": torch.zeros(9)})
    assert [problem.subject for problem in info.value.problems] == ["2.bias"]
    with pytest.raises(refitkit.WeightMismatchError):
        refitkit.refit(compiled, {**state, "2.bias": torch.full((4,), torch.nan)})
    assert same(mlp.answers(compiled), before)


def test_a_rejected_refit_changes_nothing(mlp: Any) -> None:
    class Rejects:
        @refitkit.hookimpl
        def refitkit_weights_changed(self, report: Any) -> None:
            if report.outcome != "rolled-back":
                raise ValueError("rejected")

    compiled = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    before = mlp.answers(compiled)
    with pytest.raises(refitkit.RefitError):
        refitkit.Pipeline(plugins=[Rejects()]).refit(compiled, mlp.program(1).state_dict)
    assert same(mlp.answers(compiled), before)


# -- files ------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, refitkit, torch
module = refitkit.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
answers = [module(*inputs["args"], **inputs["kwargs"])]
refitkit.refit(module, inputs["state"])
answers.append(module(*inputs["args"], **inputs["kwargs"]))
torch.save([torch.utils._pytree.tree_leaves(answer) for answer in answers], sys.argv[3])
"""


def test_a_saved_module_in_a_new_process(case: Any, tmp_path: Path) -> None:
    compiled = refitkit.compile(case.program(0), BACKEND, {"threads": 1}, prove=False)
    refitkit.refit(compiled, case.program(1).state_dict)
    compiled.save(tmp_path / "module")
    state = {name: value.detach() for name, value in case.program(2).state_dict.items()}
    inputs = {"args": case.args, "kwargs": case.kwargs, "state": state}
    torch.save(inputs, tmp_path / "inputs.pt")
    names = [str(tmp_path / name) for name in ("module", "inputs.pt", "answers.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *names], check=True)
    loaded, refitted = torch.load(tmp_path / "answers.pt")
    assert same(loaded, case.answers(compiled))
    refitkit.refit(compiled, state)
    assert same(refitted, case.answers(compiled))
    described = refitkit.inspect(tmp_path / "module")
    assert described["options"]["threads"] == 1


def test_a_damaged_file_is_refused(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "module"
    refitkit.compile(mlp.program(0), BACKEND, prove=False).save(path)
    content = path.read_bytes()
    place = content.index(b'"format"')
    path.write_bytes(content[:place] + b"!" + content[place + 1 :])
    with pytest.raises(refitkit.UnsupportedTargetError, match="Save or copy the file again"):
        refitkit.load(path)


# -- what is refused --------------------------------------------------------------------------


def test_a_wrong_option_is_refused(mlp: Any) -> None:
    options = {"thread": 1, "precision": "int8", "threads": 0, "weights": "none"}
    with pytest.raises(refitkit.ConfigError, match="Options are: weights, threads") as info:
        refitkit.compile(mlp.program(0), BACKEND, options)
    assert {problem.subject for problem in info.value.problems} == options.keys()


def test_an_unknown_input_is_refused(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenVINO that renames an input: which weight it is would be a guess."""

    def renaming(model: Any) -> None:
        model.get_parameters()[1].set_friendly_name("other")

    _convert_and(renaming, monkeypatch)
    with pytest.raises(refitkit.NotRefittableError, match="cannot be matched") as info:
        refitkit.compile(mlp.program(0), BACKEND)
    assert [problem.subject for problem in info.value.problems] == ["other"]


def test_a_weight_that_became_a_constant_is_refused(
    mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OpenVINO that folds a weight: a refit could not change it."""
    import openvino

    def folding(model: Any) -> None:
        weight = model.get_parameters()[1]
        bias = mlp.program(0).state_dict["0.bias"].detach().numpy()
        weight.output(0).replace(openvino.opset13.constant(bias).output(0))
        model.remove_parameter(weight)

    _convert_and(folding, monkeypatch)
    with pytest.raises(refitkit.NotRefittableError, match="reach no slot") as info:
        refitkit.compile(mlp.program(0), BACKEND)
    assert [problem.subject for problem in info.value.problems] == ["0.bias"]


def _convert_and(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    convert = openvino.convert_model

    def converting(program: Any) -> Any:
        model = convert(program)
        change(model)
        return model

    monkeypatch.setattr(openvino, "convert_model", converting)


def test_an_input_that_is_not_read_is_accepted() -> None:
    class First(torch.nn.Linear):
        def forward(self, x: torch.Tensor, unread: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    program = torch.export.export(First(3, 2), (torch.ones(1, 3), torch.ones(2)))
    compiled = refitkit.compile(program, BACKEND)
    assert compiled(torch.ones(1, 3), torch.zeros(2)).shape == (1, 2)


def test_another_program_is_refused(mlp: Any) -> None:
    compiled = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    other = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
    program = torch.export.export(other, mlp.args)
    with pytest.raises(refitkit.PlanMismatchError):
        refitkit.plan(program, target=compiled)


def test_a_buffer_that_calls_write_is_refused() -> None:
    program = torch.export.export(torch.nn.BatchNorm1d(4).train(), (torch.randn(3, 4),))
    with pytest.raises(refitkit.CompileError, match="written by calls"):
        refitkit.compile(program, BACKEND)


def test_sizes_that_vary_are_refused(mlp: Any) -> None:
    sizes = ({0: torch.export.Dim("rows", min=2)},)
    program = torch.export.export(mlp.model().eval(), mlp.args, dynamic_shapes=sizes)
    with pytest.raises(refitkit.CompileError, match="size that varies"):
        refitkit.compile(program, BACKEND)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda model, x: model(x)[x.sum(1).nonzero()[:, 0]], "size that varies"),
        (lambda model, x: (model(x), 3), "output 1: USER_OUTPUT"),
        (lambda model, x: model(x.add_(1)), "written by calls"),
        (lambda model, x: torch.nn.functional.dropout(model(x), 0.5), "another shape"),
    ],
    ids=["sizes", "numbers", "writes", "shapes"],
)
def test_a_program_that_openvino_cannot_call_is_refused(mlp: Any, call: Any, match: str) -> None:
    class Calls(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp.model()

        def forward(self, x: torch.Tensor) -> Any:
            return call(self.model, x)

    program = torch.export.export(Calls().eval(), (mlp.args[0].clone(),))
    with pytest.raises(refitkit.CompileError, match=match):
        refitkit.compile(program, BACKEND)


def test_numbers_that_openvino_would_cut_are_refused() -> None:
    class Shifts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = torch.nn.Buffer(torch.tensor([1, 2]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.by

    model = Shifts()
    program = torch.export.export(model, (torch.tensor([1, 2]),))
    compiled = refitkit.compile(program, BACKEND)
    with pytest.raises(refitkit.WeightMismatchError, match="32 bits"):
        refitkit.refit(compiled, {"by": torch.tensor([1, 1 << 40])})
    model.by.fill_(1 << 40)
    with pytest.raises(refitkit.CompileError, match="32 bits"):
        refitkit.compile(torch.export.export(model, (torch.tensor([1, 2]),)), BACKEND)
    assert compiled(torch.tensor([1, 2])).tolist() == [2, 4]


def test_wrong_inputs_are_refused(mlp: Any) -> None:
    compiled = refitkit.compile(mlp.program(0), BACKEND, prove=False)
    (x,) = mlp.args
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    for wrong in ((), (x, x), (x.double(),), (x[:2],), (x.tolist(),), (freed,), (x.to_sparse(),)):
        with pytest.raises(refitkit.InputMismatchError):
            compiled(*wrong)
    with pytest.raises(refitkit.InputMismatchError):
        compiled(x, mask=x)


# -- threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"weights": "inputs"}, {"weights": "inputs", "hint": "throughput", "threads": 2}],
    ids=["constants", "inputs", "throughput"],
)
def test_calls_during_refits_are_old_or_new(case: Any, options: dict[str, Any]) -> None:
    programs = [case.program(seed) for seed in (0, 1)]
    compiled = refitkit.compile(programs[0], BACKEND, options, prove=False)
    right = []
    for program in reversed(programs):
        refitkit.refit(compiled, program.state_dict)
        right.append(case.answers(compiled))
    wrong, counts, done = list[Any](), [0, 0], threading.Event()

    def calls() -> None:
        while not done.is_set():
            found = case.answers(compiled)
            matches = [same(found, answer) for answer in right]
            if sum(matches) != 1:
                wrong.append(found)
                return
            counts[matches.index(True)] += 1

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        number = 0
        while not wrong and (number < 30 or not all(counts)) and number < 10_000:
            refitkit.refit(compiled, programs[number % 2].state_dict)
            number += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(counts)
