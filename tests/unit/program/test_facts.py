"""Leaves, ties, what is changed in place, and the fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from refitkit.model import LeafKind
from refitkit.program import KeptProgram, facts_of
from refitkit.program.facts import tensors_of
from refitkit.recipe.sources import TensorMap
from tests.unit.program import models
from tests.unit.program.models import export, exported


def leaves_of(kind: type[nn.Module], **how: bool) -> dict[str, Any]:
    return {leaf.fqn: leaf for leaf in facts_of(exported(kind, **how)).leaves}


# -- leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_leaves_of_all_kinds(decomposed: bool) -> None:
    leaves = leaves_of(models.Plain, decomposed=decomposed)
    (constant,) = leaves.keys() - {"weight", "unused", "kept", "lost", "unused_lost"}
    assert {name: leaf.kind for name, leaf in leaves.items()} == {
        "weight": LeafKind.PARAMETER,
        "unused": LeafKind.PARAMETER,
        "kept": LeafKind.BUFFER,
        "lost": LeafKind.NON_PERSISTENT_BUFFER,
        "unused_lost": LeafKind.NON_PERSISTENT_BUFFER,
        constant: LeafKind.CONSTANT,
    }
    assert {n for n, leaf in leaves.items() if not leaf.used} == {"unused", "unused_lost"}
    assert {n for n, leaf in leaves.items() if leaf.persistent} == {"weight", "unused", "kept"}
    assert (leaves["weight"].dtype, leaves["weight"].shape) == ("float32", (2,))
    assert leaves["weight"].device == "cpu"
    assert not any(leaf.mutated for leaf in leaves.values())


def test_dtypes_and_shapes() -> None:
    leaves = leaves_of(models.Mixed)
    assert {n: (leaf.dtype, leaf.shape) for n, leaf in leaves.items()} == {
        "short": ("bfloat16", (2,)),
        "table": ("int64", (2,)),
        "wide": ("float64", (2,)),
        "turns": ("complex64", (2,)),
        "none": ("float32", (0, 2)),
    }


def test_parametrizations_have_the_names_of_the_state_dict() -> None:
    leaves = leaves_of(models.Normalized)
    assert leaves.keys() == models.Normalized().state_dict().keys()
    assert "conv.parametrizations.weight.original0" in leaves


def test_tensors_are_found_under_the_names_of_leaves() -> None:
    program = exported(models.Plain)
    tensors = tensors_of(program)
    assert tensors.keys() >= {leaf.fqn for leaf in facts_of(program).leaves}
    assert tensors["lost"].tolist() == [0.5, 0.25]


class Strict(nn.Module):
    """Names that the strict mode of export drops: of ties, and of what nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("other_name", self.scale)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x)) * self.scale


@pytest.mark.parametrize("strict", [False, True])
def test_the_strict_mode_of_export_loses_no_name(strict: bool) -> None:
    model = Strict()
    program = torch.export.export(model, (torch.tensor([0, 2]),), strict=strict)
    facts = facts_of(program)
    leaves = {leaf.fqn: leaf for leaf in facts.leaves}
    assert leaves.keys() == model.state_dict().keys()
    ties = {frozenset(tie) for tie in facts.ties}
    assert ties == {
        frozenset({"embedding.weight", "head.weight"}),
        frozenset({"scale", "other_name"}),
    }
    for tie in ties:
        assert any(leaves[name].used for name in tie)
    assert not any(leaves[name].used for name in ("unused.weight", "unused.bias", "steps"))
    assert leaves["unused.weight"].kind is LeafKind.PARAMETER
    assert leaves["steps"].kind is LeafKind.BUFFER
    kept = KeptProgram.of(program)
    assert kept is not None
    x, state = torch.tensor([1, 4]), Strict().state_dict()
    model.load_state_dict(state)
    for lacking in ("head.weight", "embedding.weight", "unused.weight"):
        given = TensorMap({name: value for name, value in state.items() if name != lacking})
        with torch.no_grad():
            assert kept.bind(given, {}.__getitem__)(x).equal(model(x))
            restored = kept.restore(given, {}.__getitem__)
            assert restored.module(check_guards=False)(x).equal(model(x))


def test_a_program_without_leaves() -> None:
    facts = facts_of(exported(models.Infinite))
    assert (facts.leaves, facts.ties) == ((), ())


# -- ties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_weight_under_two_names(decomposed: bool) -> None:
    facts = facts_of(exported(models.Tied, decomposed=decomposed))
    assert [set(tie) for tie in facts.ties] == [{"embedding.weight", "head.weight"}]


@pytest.mark.parametrize("kind", [models.Views, models.Plain, models.Mixed, models.Strided])
def test_sharing_memory_is_not_being_one_weight(kind: type[nn.Module]) -> None:
    assert facts_of(exported(kind)).ties == ()


class Two(nn.Module):
    """Two layers of one shape."""

    inputs = (torch.ones(2),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_weights_without_data_are_not_one_weight() -> None:
    """All of them have the address 0."""
    with torch.device("meta"):
        model = Two()
        model.inputs = (torch.ones(2),)
    assert facts_of(export(model)).ties == ()
    with FakeTensorMode():
        model = Two()
        model.inputs = (torch.ones(2),)
        program = export(model)
    assert facts_of(program).ties == ()


def test_a_tie_without_data_is_still_a_tie() -> None:
    with torch.device("meta"):
        model = Two()
        model.inputs = (torch.ones(2),)
        model.b.weight = model.a.weight
    assert [set(tie) for tie in facts_of(export(model)).ties] == [{"a.weight", "b.weight"}]


# -- changed in place -------------------------------------------------------------------------


def forms_of(kinds: list[type[nn.Module]]) -> Any:
    """Parametrize with those models, decomposed too where that is tested."""
    forms = [form for form in models.FORMS if form[0] in kinds]
    return pytest.mark.parametrize(("kind", "decomposed"), forms, ids=models.form_name)


@forms_of(models.CHANGING)
def test_a_changed_buffer_is_seen(kind: type[nn.Module], decomposed: bool) -> None:
    leaves = leaves_of(kind, decomposed=decomposed)
    assert leaves["state"].mutated
    assert not leaves["calm"].mutated


@forms_of(models.CHANGING_PARAMETERS)
def test_a_changed_parameter_is_seen(kind: type[nn.Module], decomposed: bool) -> None:
    leaves = leaves_of(kind, decomposed=decomposed)
    assert leaves["weight"].mutated
    assert not leaves["calm"].mutated


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_counter_is_seen(decomposed: bool) -> None:
    assert leaves_of(models.Counter, decomposed=decomposed)["calls"].mutated


CALM = [
    models.OnlyReads,
    models.InPlaceActivations,
    models.Normalized,
    models.Attention,
    models.Branches,
    models.Region,
]


@forms_of(CALM)
def test_what_only_reads_changes_nothing(kind: type[nn.Module], decomposed: bool) -> None:
    assert not any(leaf.mutated for leaf in leaves_of(kind, decomposed=decomposed).values())


@pytest.mark.parametrize("decomposed", [False, True])
def test_statistics_that_training_updates_are_seen(decomposed: bool) -> None:
    leaves = leaves_of(models.Training, decomposed=decomposed)
    assert {n for n, leaf in leaves.items() if leaf.mutated} == {
        "norm.num_batches_tracked",
        *(f"{layer}.running_{what}" for layer in ("norm", "instance") for what in ("mean", "var")),
    }


def test_looking_changes_nothing() -> None:
    program = export(models.Directly())
    before = {k: v.clone() for k, v in program.state_dict.items()}
    text = program.graph.python_code("self").src
    facts_of(program)
    assert program.graph.python_code("self").src == text
    assert all(program.state_dict[k].equal(v) for k, v in before.items())


# -- fingerprint ------------------------------------------------------------------------------


class Op(nn.Module):
    """``x * weight`` with much that can be said otherwise."""

    def __init__(
        self,
        *,
        op: Any = torch.mul,
        name: str = "weight",
        size: int = 2,
        dtype: torch.dtype = torch.float32,
        factor: float = 2.0,
        kind: str = "parameter",
        fill: float = 1.0,
    ) -> None:
        super().__init__()
        self.inputs = (torch.ones(size, dtype=dtype),)
        self.op, self.factor, self.name = op, factor, name
        value = torch.full((size,), fill, dtype=dtype)
        if kind == "parameter":
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value, persistent=kind == "buffer")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x, getattr(self, self.name)) * self.factor


def fingerprint(model: nn.Module) -> str:
    return facts_of(export(model)).graph


def test_other_weights_have_the_same_fingerprint() -> None:
    assert fingerprint(Op(fill=1.0)) == fingerprint(Op(fill=5.0))
    torch.manual_seed(1)
    one = fingerprint(models.Normalized().eval())
    assert one == fingerprint(models.Normalized().eval())
    assert len(one) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"op": torch.add},
        {"op": torch.div},
        {"op": lambda x, w: torch.mul(w, x)},
        {"name": "renamed"},
        {"size": 3},
        {"dtype": torch.float64},
        {"factor": 3.0},
        {"kind": "buffer"},
        {"kind": "lost"},
    ],
    ids=["add", "div", "other order", "name", "size", "dtype", "factor", "buffer", "lost"],
)
def test_another_program_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert fingerprint(Op(**other)) != fingerprint(Op())


def test_what_is_inside_a_region_counts() -> None:
    assert fingerprint(models.Region(sine=True)) != fingerprint(models.Region(sine=False))
    assert fingerprint(models.Region()) == fingerprint(models.Region())


def test_what_is_inside_a_branch_counts() -> None:
    assert fingerprint(models.Branches(2.0)) != fingerprint(models.Branches(3.0))
    assert fingerprint(models.Branches(2.0)) == fingerprint(models.Branches(2.0))


def test_dynamic_shapes_count() -> None:
    model = models.Attention()
    fixed = export(model)
    free = torch.export.export(
        model, model.inputs, dynamic_shapes={"x": {1: torch.export.Dim("n", min=2, max=8)}}
    )
    assert facts_of(fixed).graph != facts_of(free).graph
    assert facts_of(free).graph == facts_of(free).graph


def test_a_fingerprint_is_the_same_in_every_process(pytestconfig: pytest.Config) -> None:
    """Whatever the hash seed: a plan is made in one process and used in another."""
    code = (
        "from tests.unit.program.models import *; from refitkit.program import facts_of;"
        "print(*[facts_of(exported(k)).graph for k in (Plain, WithoutGradients)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=pytestconfig.rootpath,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONWARNINGS": "ignore"},
    )
    kinds = (models.Plain, models.WithoutGradients)
    assert done.stdout.split() == [facts_of(exported(kind)).graph for kind in kinds]


@pytest.mark.parametrize("strict", [False, True])
def test_names_that_a_strict_export_leaves_out_are_leaves_all_the_same(strict: bool) -> None:
    model = models.Tied().eval()
    model.register_buffer("counter", torch.zeros(2))
    facts = facts_of(torch.export.export(model, models.Tied.inputs, strict=strict))
    assert {leaf.fqn for leaf in facts.leaves} == model.state_dict().keys()
    assert {"counter"} <= {leaf.fqn for leaf in facts.leaves if not leaf.used}
    assert {frozenset(tie) for tie in facts.ties} == {
        frozenset({"embedding.weight", "head.weight"})
    }
