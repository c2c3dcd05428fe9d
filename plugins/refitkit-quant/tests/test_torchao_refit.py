"""Float checkpoints become torchao's quantization: slots and outputs, bit for bit."""

from __future__ import annotations

import pytest
import torch
from refitkit.errors import VerificationError

pytest.importorskip("torchao")

PARTS = [f"a.parametrizations.weight.original{i}" for i in range(3)]


def test_a_float_checkpoint_gives_what_torchao_makes_of_it(case, ids, same):
    new = case.floats(1)
    report = case.refit(new.state_dict(), inputs=(ids,))
    eager = case.eager(new)
    slots = case.slots()
    assert same(slots, {name: eager.state_dict()[name] for name in slots})
    assert report.verification is not None
    assert report.verification.ok
    assert {row.takes for row in report.transforms} == {
        ("a.weight",),
        ("b.weight",),
        ("head.weight",),
    }
    for row in report.transforms:
        (measure,) = row.measures
        assert measure.name == row.gives[0]
        assert 0 < measure.max_abs_error < measure.scale


@pytest.mark.parametrize("name", ["int8-row", "int8-group", "int4-group-8", "int4-row-asymmetric"])
def test_it_answers_like_the_quantized_model(made, name, ids):
    case = made(name)
    new = case.floats(2)
    case.refit(new.state_dict())
    assert torch.equal(case.compiled(ids), case.eager(new)(ids))


def test_it_answers_like_a_fresh_compile_where_the_compiler_rounds_otherwise(made, ids):
    case = made("int8-row-bf16")  # inductor's kernel for this rounds less often than eager torch
    new = case.floats(2)
    case.refit(new.state_dict())
    fresh = case.pipeline.compile(torch.export.export(case.eager(new), (ids,)), prove=False)
    assert torch.equal(case.compiled(ids), fresh(ids))


def test_a_to_b_to_a_is_bit_equal(case, ids, same):
    a, b = case.floats(0).state_dict(), case.floats(3).state_dict()
    case.refit(a)
    before, answer = case.slots(), case.compiled(ids)
    case.refit(b)
    assert not same(case.slots(), before)
    case.refit(a)
    assert same(case.slots(), before)
    assert torch.equal(case.compiled(ids), answer)


def test_one_layer_of_a_partial_refit(int8, same):
    before, new = int8.slots(), int8.floats(1)
    report = int8.refit({"a.weight": new.a.weight}, partial=True)
    quantized = int8.eager(new).state_dict()
    changed = {name: quantized[name] for name in PARTS[:2]}
    assert same(int8.slots(), {**before, **changed})
    assert report.slots_written == 2


def test_delta_writes_the_one_weight_that_changed(int8, same):
    new = int8.floats(1).state_dict()
    int8.refit(new, delta=True)
    new["b.weight"] = int8.floats(2).b.weight.detach()
    report = int8.refit(new, delta=True)
    written = {row.slot for row in report.ledger if row.strategy}
    assert written == {f"b.parametrizations.weight.original{i}" for i in range(2)}
    whole = int8.slots()
    int8.refit(new)
    assert same(int8.slots(), whole)


def test_the_name_of_a_tied_weight_is_enough(int8, same):
    """Checkpoints of tied models have the embedding only."""
    state = int8.floats(1).state_dict()
    int8.refit(state)
    whole = int8.slots()
    int8.refit(int8.floats(0).state_dict())
    del state["head.weight"]
    report = int8.refit(state)
    assert same(int8.slots(), whole)
    assert "emb.weight" in whole
    tied = next(row for row in report.transforms if row.takes == ("emb.weight",))
    assert "emb.weight" in tied.gives


def test_an_untied_checkpoint_has_two_weights(int8, same):
    new = int8.floats(1)
    state = {**new.state_dict(), "head.weight": int8.floats(2).emb.weight.detach()}
    int8.refit(state)
    slots, other = int8.slots(), int8.eager(int8.floats(2)).state_dict()
    assert same({"e": slots["emb.weight"]}, {"e": new.emb.weight.detach()})
    for i in range(2):
        name = f"head.parametrizations.weight.original{i}"
        assert same({name: slots[name]}, {name: other[name]})


def test_what_is_quantized_already_passes(int8, same):
    quantized = int8.eager(int8.floats(1)).state_dict()
    report = int8.refit(quantized)
    slots = int8.slots()
    assert same(slots, {name: quantized[name] for name in slots})
    assert report.transforms == ()


def test_zero_weights_keep_torchaos_least_scale(case, ids, same):
    new = case.floats(1)
    torch.nn.init.zeros_(new.a.weight)
    torch.nn.init.zeros_(new.b.weight[:5].data)
    report = case.refit(new.state_dict(), inputs=(ids,))
    slots, quantized = case.slots(), case.eager(new).state_dict()
    assert same(slots, {name: quantized[name] for name in slots})
    assert (slots[PARTS[1]] > 0).all()
    zero = next(row for row in report.transforms if row.takes == ("a.weight",))
    assert zero.measures[0].max_abs_error == 0


def test_outliers_are_measured_and_a_limit_refuses_them(int8, with_scheme, same):
    strict = with_scheme(int8.scheme, error_limit=0.02)
    weights = int8.floats(1).state_dict()
    strict.refit(int8.compiled, weights)
    before = int8.slots()
    with_limit = with_scheme(int8.scheme, error_limit=0.001)
    with pytest.raises(VerificationError) as info:
        with_limit.refit(int8.compiled, int8.floats(2).state_dict())
    assert same(int8.slots(), before)
    assert {p.subject for p in info.value.problems} == {
        f"{layer}.parametrizations.weight.original0" for layer in ("a", "b", "head")
    }
    report = info.value.report
    assert report.outcome == "rolled-back"
    (measure,) = next(row for row in report.transforms if row.takes == ("a.weight",)).measures
    assert measure.limit == pytest.approx(0.001 * measure.scale)
    assert measure.max_abs_error == pytest.approx(measure.scale / 255, rel=0.01)


def test_the_plan_alone_computes_the_same(int8, same):
    new = int8.floats(1).state_dict()
    values = int8.compiled.plan.materialize(new)["model"]
    int8.refit(new)
    assert same({name: value.clone() for name, value in values.items()}, int8.slots())


def test_verify_judges_against_the_quantized_checkpoint(int8):
    assert int8.pipeline.verify(int8.compiled, int8.floats(0)).ok
    with pytest.raises(VerificationError):
        int8.pipeline.verify(int8.compiled, int8.floats(1))


def test_a_scheme_beside_a_saved_module(int8, tmp_path, ids, with_scheme):
    int8.compiled.save(tmp_path / "net.pt2")
    int8.scheme.save(tmp_path / "net.quant.json")
    pipeline = with_scheme(str(tmp_path / "net.quant.json"))
    compiled = pipeline.load(tmp_path / "net.pt2")
    new = int8.floats(1)
    report = pipeline.refit(compiled, new.state_dict(), inputs=(ids,)).report
    assert report.verification.verifier == "outputs"
    assert torch.equal(compiled(ids), int8.eager(new)(ids))


def test_what_the_caller_gave_is_not_changed(int8, same):
    new = int8.floats(1).state_dict()
    before = {name: value.clone() for name, value in new.items()}
    int8.refit(new)
    assert same(new, before)
    assert all(value.requires_grad is False for value in new.values())
