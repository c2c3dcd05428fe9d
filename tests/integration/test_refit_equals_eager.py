"""A module refitted from A to B answers like B; back at A, it answers bit for bit like A."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits, digest, max_error, slots_of
from aoti_models import CASES
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

import refitkit
from refitkit.model import StageFinished

if TYPE_CHECKING:
    from collections.abc import Callable

    Fresh = Callable[[str], refitkit.CompiledModule]

LIMITS = {"float16": 4e-3, "bfloat16": 3e-2, "transformer": 2e-5, "wide": 1e-4}
"""Largest absolute error against eager torch; outputs are of the order of 1."""
LIMIT = 2e-6


@pytest.mark.parametrize("name", CASES)
def test_a_to_b_answers_like_eager_b(name: str, fresh: Fresh) -> None:
    case, compiled = CASES[name], fresh(name)
    b = case.model(1)
    report = refitkit.refit(compiled, b, inputs=case.inputs()).report
    found, expected = compiled(*case.args(), **case.kwargs()), case.expected(b)
    error = max_error(found, expected)
    limit = LIMITS.get(name, LIMIT)
    assert error <= limit
    assert error < 0.01 * max_error(found, case.expected(case.model(0))), "A would do as well"
    assert report.outcome == "committed"
    assert report.changed
    assert report.verification is not None
    assert report.verification.ok
    assert report.verification.verifier == "outputs"
    assert len(report.verification.measures) == len(pytree.tree_leaves(expected))
    assert abs(report.verification.max_abs_error - error) <= limit


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_equal(name: str, fresh: Fresh) -> None:
    case, compiled = CASES[name], fresh(name)
    a, slots = case.model(0), slots_of(compiled)
    before = digest(compiled(*case.args(), **case.kwargs()))
    refitkit.refit(compiled, a)
    assert slots_of(compiled) == slots
    for seed in (1, 2):
        refitkit.refit(compiled, case.model(seed))
        assert digest(compiled(*case.args(), **case.kwargs())) != before
        refitkit.refit(compiled, a, inputs=case.inputs())
        assert slots_of(compiled) == slots
        assert digest(compiled(*case.args(), **case.kwargs())) == before


@pytest.mark.parametrize("name", CASES)
def test_slots_hold_the_bits_of_the_source(name: str, fresh: Fresh) -> None:
    case, compiled = CASES[name], fresh(name)
    b = case.model(1)
    refitkit.refit(compiled, b)
    state = {**dict(b.named_buffers()), **b.state_dict()}
    rows = [row for row in compiled.plan.ledger if row.slot.name in state]
    pinned = [row for row in compiled.plan.ledger if row.state == "pinned"]
    assert len(rows) + sum(row.slot.name not in state for row in pinned) == len(compiled.slots)
    for row in rows:
        held = compiled.read(row.slot.name)
        assert held.dtype == state[row.slot.name].dtype
        assert bits(held) == bits(state[row.slot.name])


def test_channels_last_weights_take_any_layout(fresh: Fresh) -> None:
    case, compiled = CASES["convnet"], fresh("convnet")
    state = case.model(1).state_dict()
    refitkit.refit(compiled, state)
    wanted = digest(compiled(*case.args()))
    for layout in (torch.contiguous_format, torch.channels_last):
        for name in ("stem.weight", "body.weight"):
            state[name] = state[name].contiguous(memory_format=layout)
        refitkit.refit(compiled, case.model(0))
        assert digest(compiled(*case.args())) != wanted
        refitkit.refit(compiled, state)
        assert digest(compiled(*case.args())) == wanted


def test_one_name_of_tied_weights_is_enough(fresh: Fresh) -> None:
    case, compiled = CASES["transformer"], fresh("transformer")
    b = case.model(1)
    expected = case.expected(b)
    for dropped in ("embed.weight", "out.weight"):
        refitkit.refit(compiled, case.model(0))
        state = b.state_dict()
        del state[dropped]
        refitkit.refit(compiled, state, inputs=case.inputs())
        assert max_error(compiled(*case.args()), expected) <= LIMITS["transformer"]


def test_a_broken_tie_is_refused(fresh: Fresh) -> None:
    case, compiled = CASES["transformer"], fresh("transformer")
    before = digest(compiled(*case.args()))
    state = case.model(1).state_dict()
    state["out.weight"] = state["out.weight"].clone()
    state["out.weight"][-1, -1] += 1e-3
    for partial in (False, True):
        with pytest.raises(refitkit.WeightMismatchError) as raised:
            refitkit.refit(compiled, state, partial=partial)
        (problem,) = raised.value.problems
        assert problem.kind == "tie broken"
        assert {"embed.weight", "out.weight"} == {problem.subject, *_names(problem.found)}
        assert digest(compiled(*case.args())) == before
    state["out.weight"][-1, -1] = state["embed.weight"][-1, -1]
    refitkit.refit(compiled, state, inputs=case.inputs())


def _names(text: str) -> set[str]:
    return {word.strip("'") for word in text.split() if word.startswith("'")}


def test_tied_weights_without_either_name_are_missing(fresh: Fresh) -> None:
    state = CASES["transformer"].model(1).state_dict()
    del state["out.weight"], state["embed.weight"]
    with pytest.raises(refitkit.WeightMismatchError) as raised:
        refitkit.refit(fresh("transformer"), state)
    (problem,) = raised.value.problems
    assert problem.kind == "missing"
    assert "embed.weight" in str(problem)
    assert "out.weight" in str(problem)


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 64])
def test_any_number_of_rows(rows: int, fresh: Fresh) -> None:
    case, compiled = CASES["batch"], fresh("batch")
    b = case.model(1)
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
    refitkit.refit(compiled, b.state_dict(), inputs=(x,))
    with torch.no_grad():
        assert max_error(compiled(x), b(x)) <= LIMIT


def test_what_no_state_dict_holds_stays_as_compiled(fresh: Fresh) -> None:
    case, compiled = CASES["mixed"], fresh("mixed")
    a, b = case.model(0), case.model(1)
    b.derived.mul_(2)
    refitkit.refit(compiled, {**b.state_dict(), "derived": b.derived}, inputs=case.inputs())
    assert bits(compiled.read("derived")) == bits(b.derived)
    for weights in (b, b.state_dict()):
        refitkit.refit(compiled, weights, inputs=case.inputs())
        assert bits(compiled.read("derived")) == bits(a.derived)
    refitkit.refit(compiled, torch.export.export(b, case.args()), inputs=case.inputs())
    assert bits(compiled.read("derived")) == bits(b.derived)
    refitkit.refit(compiled, b)
    b.derived.copy_(a.derived)
    assert max_error(compiled(*case.args()), case.expected(b)) <= LIMIT
    refitkit.refit(compiled, {"derived": b.derived + 1}, partial=True)
    assert bits(compiled.read("derived")) == bits(b.derived + 1)


def test_verifying_outputs_does_not_count_as_a_call(fresh: Fresh) -> None:
    case, compiled = CASES["mixed"], fresh("mixed")
    b = case.model(1)
    b.count.fill_(41)
    refitkit.refit(compiled, b, inputs=case.inputs())
    assert int(compiled.read("count")) == 41
    refitkit.verify(compiled, b, inputs=case.inputs())
    assert int(compiled.read("count")) == 41
    assert int(b.count) == 41
    for number in (42, 43):
        assert int(compiled(*case.args())[1]) == number
    refitkit.refit(compiled, {"kept": b.kept}, partial=True, inputs=case.inputs())
    assert int(compiled(*case.args())[1]) == 44
    with pytest.raises(refitkit.VerificationError):
        refitkit.refit(compiled, b, inputs=case.inputs(), reference=lambda x: (x, x))
    assert int(compiled.read("count")) == 44


class _CallsOnceStaged:
    """A plugin that calls the module when a refit is staged and not yet committed."""

    name = "calls-once-staged"

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        if isinstance(event, StageFinished) and (event.verb, event.stage) == ("refit", "stage"):
            self._call()


def test_calls_between_staging_and_commit_are_not_forgotten(fresh: Fresh) -> None:
    case, compiled = CASES["mixed"], fresh("mixed")
    pipeline = refitkit.Pipeline(plugins=[_CallsOnceStaged(lambda: compiled(*case.args()))])
    compiled(*case.args())
    pipeline.refit(compiled, {"kept": torch.ones(4)}, partial=True)
    assert int(compiled.read("count")) == 2
    pipeline.refit(compiled, {"kept": torch.zeros(4), "count": torch.tensor(7)}, partial=True)
    assert int(compiled.read("count")) == 7


def test_weights_in_awkward_storage_are_tensors_of_their_own(fresh: Fresh) -> None:
    case, compiled = CASES["storage"], fresh("storage")
    for slot in compiled.slots:
        held = compiled.read(slot.name)
        assert held.untyped_storage().nbytes() == held.nbytes
    plain = {name: t.contiguous().clone() for name, t in case.model(1).state_dict().items()}
    refitkit.refit(compiled, plain)
    wanted = digest(compiled(*case.args()))
    refitkit.refit(compiled, case.model(0))
    refitkit.refit(compiled, case.model(1).state_dict())
    assert digest(compiled(*case.args())) == wanted


def test_outputs_that_are_weights_survive_refits(fresh: Fresh) -> None:
    case, compiled = CASES["nested"], fresh("nested")
    outputs = compiled(*case.args(), **case.kwargs())
    kept = copy.deepcopy(outputs)
    for seed in (1, 2):
        refitkit.refit(compiled, case.model(seed))
    assert digest(outputs) == digest(kept)


def test_the_source_is_free_after_a_refit(fresh: Fresh) -> None:
    case, compiled = CASES["small"], fresh("small")
    state = case.model(1).state_dict()
    refitkit.refit(compiled, state)
    wanted = digest(compiled(*case.args()))
    for tensor in state.values():
        tensor.fill_(torch.nan)
    assert digest(compiled(*case.args())) == wanted


def test_a_refit_changes_nothing_of_the_source(fresh: Fresh) -> None:
    case, compiled = CASES["mixed"], fresh("mixed")
    b = case.model(1)
    (b.a.weight * 2).sum().backward()
    b.train()
    before = {n: (bits(t), t.data_ptr(), t.requires_grad) for n, t in _tensors(b).items()}
    gradient = bits(b.a.weight.grad)
    refitkit.refit(compiled, b, inputs=case.inputs())
    assert {n: (bits(t), t.data_ptr(), t.requires_grad) for n, t in _tensors(b).items()} == before
    assert bits(b.a.weight.grad) == gradient
    assert b.training
    assert torch.is_grad_enabled()


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "program", "module", "state_dict"])
def test_every_kind_of_source_gives_the_same_bits(kind: str, fresh: Fresh, tmp_path: Path) -> None:
    case, compiled = CASES["small"], fresh("small")
    b = case.model(1)
    source: Any = b
    if kind == "safetensors":
        source = tmp_path / "b.safetensors"
        save_file(b.state_dict(), source)
    elif kind == "torch.save":
        source = tmp_path / "b.pt"
        torch.save(b.state_dict(), source)
    elif kind == "program":
        source = case.program(1)
    elif kind == "state_dict":
        source = b.state_dict()
    refitkit.refit(compiled, source, inputs=case.inputs())
    assert slots_of(compiled) == {name: bits(t) for name, t in b.state_dict().items()}


def test_modes_of_the_caller_do_not_matter(fresh: Fresh) -> None:
    case, compiled = CASES["small"], fresh("small")
    b = case.model(1)
    refitkit.refit(compiled, b)
    wanted, slots = digest(compiled(*case.args())), slots_of(compiled)
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad]
    modes.append(lambda: torch.autocast("cpu", torch.bfloat16))
    for mode in modes:
        refitkit.refit(compiled, case.model(0))
        with mode():
            refitkit.refit(compiled, case.model(1), inputs=case.inputs())
            outputs = compiled(*case.args())
        assert digest(outputs) == wanted
        assert slots_of(compiled) == slots
        assert not outputs.requires_grad


def test_a_wrong_reference_rolls_back_and_reports(fresh: Fresh) -> None:
    case, compiled = CASES["convnet"], fresh("convnet")
    before = digest(compiled(*case.args()))
    with pytest.raises(refitkit.VerificationError) as raised:
        refitkit.refit(compiled, case.model(1), inputs=case.inputs(), reference=case.model(2))
    report = raised.value.report
    assert report.outcome == "rolled-back"
    assert not report.verification.ok
    with torch.no_grad():
        apart = max_error(case.expected(case.model(1)), case.expected(case.model(2)))
    assert report.verification.max_abs_error == pytest.approx(apart, abs=1e-5)
    assert digest(compiled(*case.args())) == before


def test_a_hundred_refits_keep_memory_bounded(fresh: Fresh) -> None:
    case, compiled = CASES["wide"], fresh("wide")
    states = [case.model(seed).state_dict() for seed in (0, 1)]
    size = sum(slot.nbytes for slot in compiled.slots)
    assert size > 16 * 2**20

    def refits(count: int) -> None:
        for number in range(count):
            state = states[number % 2]
            refitkit.refit(compiled, state, inputs=case.inputs() if number % 10 == 0 else None)
            if number % 10 == 3:
                some = {n: t for n, t in states[1].items() if n.endswith("bias")}
                refitkit.refit(compiled, some, partial=True)
            if number % 10 == 5:
                with pytest.raises(refitkit.VerificationError):
                    refitkit.refit(compiled, state, inputs=case.inputs(), reference=torch.zeros(1))
            if number % 25 == 7:
                assert compiled.free_spare() == size

    refits(10)
    before = _resident()
    refits(100)
    assert _resident() - before < 3 * size  # a leak of one set a refit would be a hundred
    assert digest(compiled(*case.args())) == digest(_refitted(fresh("wide"), states[1]))


def _refitted(compiled: refitkit.CompiledModule, state: dict[str, torch.Tensor]) -> Any:
    refitkit.refit(compiled, state)
    return compiled(*CASES["wide"].args())


def _resident() -> int:
    """Bytes of this process that are in memory (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
