"""Leaves that share memory: which are found, and their values after weights were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from refitkit.model import Leaf, LeafKind, Overlap
from refitkit.program import KeptProgram, facts_of
from refitkit.program.facts import tensors_of
from refitkit.program.views import derived_value, lost_views, overlap_problems, with_overlaps
from refitkit.recipe import TensorMap
from tests.shared_memory import MODELS, after_load, exported, model_of, through_a_file

if TYPE_CHECKING:
    from collections.abc import Mapping


def leaf(name: str, tensor: torch.Tensor, kind: LeafKind = LeafKind.CONSTANT) -> Leaf:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Leaf(fqn=name, kind=kind, dtype=dtype, shape=tuple(tensor.shape))


def shared(**tensors: torch.Tensor) -> tuple[dict[str, Leaf], list[str]]:
    """Leaves by name, and what is refused; names in upper case are parameters."""
    kinds = {True: LeafKind.PARAMETER, False: LeafKind.CONSTANT}
    leaves = [leaf(name, value, kinds[name.isupper()]) for name, value in tensors.items()]
    found, problems = with_overlaps(leaves, tensors)
    return {one.fqn: one for one in found}, [problem.subject for problem in problems]


def follows(leaves: Mapping[str, Leaf], before: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether a leaf has the value that is in memory after all parameters were written to."""
    kept = {n: t.clone() for n, t in before.items()}
    new = {n: torch.randn(t.shape) for n, t in before.items() if n.isupper()}
    for one, value in new.items():
        before[one].copy_(value)

    def value_of(fqn: str) -> torch.Tensor:
        if fqn in new:
            return new[fqn]
        return derived_value(leaves[fqn], leaves, value_of, kept.__getitem__)

    return torch.equal(value_of(name), before[name])


class Draws:
    """Random views, each made by a few steps."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)

    def below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._random))

    def memory(self) -> torch.Tensor:
        order = torch.randperm(3, generator=self._random).tolist()
        return torch.randn(4, 6, 5).permute(*order)

    def view(self, of: torch.Tensor) -> torch.Tensor:
        for _ in range(1 + self.below(4)):
            of = self._step(of) if of.dim() else of
        return of

    def _step(self, of: torch.Tensor) -> torch.Tensor:
        dim, step = self.below(of.dim()), self.below(4)
        if step == 0:
            start = self.below(of.shape[dim])
            return of.narrow(dim, start, 1 + self.below(of.shape[dim] - start))
        if step == 1:
            return of.select(dim, self.below(of.shape[dim]))
        if step == 2:
            return of.transpose(dim, self.below(of.dim()))
        return of.unsqueeze(dim).expand(*of.shape[:dim], 2, *of.shape[dim:])


def test_random_views_have_what_is_in_memory_after_a_write() -> None:
    draws, followed = Draws(), set()
    for _ in range(300):
        memory = draws.memory()
        view = draws.view(memory)
        if (view.shape, view.stride()) == (memory.shape, memory.stride()):
            continue  # another name of it: a tie
        tensors = {"W": memory, "v": view}
        leaves, problems = shared(**tensors)
        assert not problems
        assert leaves["v"].view is not None
        assert follows(leaves, tensors, "v")
        followed.add((view.dim(), view.is_contiguous()))
    assert len(followed) > 8


def test_a_whole_follows_its_parts_and_keeps_what_lies_between() -> None:
    memory = torch.arange(24.0).view(4, 6).t()
    tensors = {"A": memory[:2], "B": memory[3:5], "m": memory, "v": memory[1:4]}
    leaves, problems = shared(**tensors)
    assert not problems
    assert {part.fqn for part in leaves["m"].parts} == {"A", "B"}
    assert leaves["v"].view is not None
    assert leaves["v"].view.fqn == "m"
    assert follows(leaves, tensors, "m")
    assert follows(leaves, tensors, "v")


def test_neighbours_in_one_storage_share_nothing() -> None:
    memory = torch.randn(6, 8)
    leaves, problems = shared(
        A=memory[:, :4], b=memory[:, 4:], C=torch.randn(3), d=memory.new_empty(0), E=memory[:0]
    )
    assert not problems
    assert not any(one.derived for one in leaves.values())


def test_storages_that_lie_in_one_memory_are_one_memory() -> None:
    array = torch.randn(12, 4).numpy()
    leaves, problems = shared(W=torch.from_numpy(array), v=torch.from_numpy(array[3:5]))
    assert not problems
    assert leaves["v"].view == Overlap(fqn="W", order=(0, 1), stride=(4, 1), offset=12)


def test_programs_without_data_are_followed_too() -> None:
    with FakeTensorMode():
        memory = torch.randn(12, 4)
        leaves, problems = shared(W=memory, v=memory[3:5], o=torch.randn(12, 4))
    assert not problems
    assert leaves["v"].view == Overlap(fqn="W", order=(0, 1), stride=(4, 1), offset=12)
    assert not leaves["o"].derived


@pytest.mark.parametrize(
    ("tensors", "refused"),
    [
        (lambda m: {"A": m[:4], "B": m[4:], "v": m[2:6]}, "v"),
        (lambda m: {"A": m[:, :2], "v": m[:4]}, "v"),
        (lambda m: {"A": m[:, :3], "v": m[:4, 1:3]}, "v"),
        (lambda m: {"A": m[:5], "v": m[:0], "B": m[4:]}, "B"),
        (lambda m: {"A": torch.view_as_complex(m.view(-1, 2)), "v": m.view(torch.int16)}, ""),
        (
            lambda m: {
                "A": torch.view_as_complex(m.view(-1, 2)),
                "v": torch.view_as_complex(m.view(-1, 2))[3:].conj(),
            },
            "v",
        ),
    ],
    ids=[
        "across two",
        "more rows of fewer columns",
        "part of one with gaps",
        "two weights",
        "other bits",
        "conjugate",
    ],
)
def test_what_no_recipe_can_follow_is_refused(tensors: Any, refused: str) -> None:
    leaves, problems = shared(**tensors(torch.randn(8, 4)))
    assert problems == ([refused] if refused else [])
    assert leaves["v"].derived == (not refused)


def test_a_weight_that_is_read_through_a_view_of_its_whole_counts_as_read() -> None:
    memory = torch.randn(8, 4)
    tensors = {"A": memory[:3], "B": memory[4:], "m": memory, "v": memory[2:6]}
    kinds = {True: LeafKind.PARAMETER, False: LeafKind.CONSTANT}
    leaves = [
        leaf(name, value, kinds[name.isupper()]).model_copy(update={"used": name == "v"})
        for name, value in tensors.items()
    ]
    found, problems = with_overlaps(leaves, tensors)
    assert not problems
    assert all(one.used for one in found)


def test_an_unused_leaf_is_never_refused() -> None:
    memory = torch.randn(8, 4)
    leaves = [
        leaf("a", memory[:, :2], LeafKind.PARAMETER),
        leaf("v", memory[:4]).model_copy(update={"used": False}),
    ]
    found, problems = with_overlaps(leaves, {"a": memory[:, :2], "v": memory[:4]})
    assert not problems
    assert not any(one.derived for one in found)


def test_what_calls_change_cannot_be_followed() -> None:
    memory = torch.zeros(8, 4)
    leaves = [
        leaf("cache", memory, LeafKind.BUFFER).model_copy(update={"mutated": True}),
        leaf("row", memory[2]),
    ]
    _, problems = with_overlaps(leaves, {"cache": memory, "row": memory[2]})
    assert [(one.subject, one.found) for one in problems] == [("row", "cache")]


def test_a_weight_that_is_read_through_views_only_counts_as_read() -> None:
    leaves = {one.fqn: one for one in facts_of(exported(model_of("views only"))).leaves}
    assert leaves["qkv"].used
    assert {n for n, one in leaves.items() if one.view} == {"q", "k", "v"}


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_program_answers_as_the_model_after_load_state_dict(name: str) -> None:
    program = exported(model_of(name))
    kept = KeptProgram.of(program)
    assert kept is not None
    old = {one: value.clone() for one, value in tensors_of(program).items()}
    state = model_of(name, seed=1).state_dict()
    found = kept.bind(TensorMap(state), old.__getitem__)(*MODELS[name].inputs)
    torch.testing.assert_close(found, after_load(name, state), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_restored_program_shares_memory_as_the_first_one_did(name: str) -> None:
    program = exported(model_of(name))
    facts, tensors = facts_of(program), tensors_of(program)
    apart = {one: value.detach().clone() for one, value in tensors.items()}
    kept = KeptProgram.of(program)
    assert kept is not None
    again = facts_of(kept.restore(TensorMap(apart), apart.__getitem__))
    bases = {one.fqn: set(one.bases) for one in facts.leaves}
    assert {one.fqn: set(one.bases) for one in again.leaves} == bases
    restored = tensors_of(kept.restore(TensorMap(apart), apart.__getitem__))
    assert all(torch.equal(restored[one].cpu(), tensors[one]) for one in tensors)


# -- files ------------------------------------------------------------------------------------


class Held(nn.Module):
    """A parameter and a tensor made of it, by kind."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.v = make(self.w.data)
        self.register_buffer("zeros", torch.zeros(4, 4), persistent=False)
        self.register_buffer("weights_zeros", torch.zeros(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w + self.v.sum() + self.zeros.sum() + self.weights_zeros.sum()


@pytest.mark.parametrize(
    ("make", "suspect"),
    [
        (lambda w: w[1:3], True),
        (lambda w: w.t(), True),
        (lambda w: w.clone(), True),
        (lambda w: w + 1, False),
        (lambda w: w.zero_()[1], True),
        (lambda w: w[:1].zero_(), True),
        (lambda w: w.view(torch.int32), True),
        (lambda w: w.zero_().clone(), False),
    ],
    ids=["slice", "transpose", "copy", "another", "zeros", "row of zeros", "bits", "more zeros"],
)
def test_views_that_a_file_has_lost_are_found(make: Any, suspect: bool) -> None:
    program = torch.export.export(Held(make).eval(), (torch.randn(2, 4),))
    read = through_a_file(program)

    def lost(one: torch.export.ExportedProgram) -> list[tuple[str, bool]]:
        facts = facts_of(one)
        found = lost_views(one, facts.leaves, facts.ties, tensors_of(one))
        return [(problem.subject, "w" in problem.found.split(", ")) for problem in found]

    assert lost(program) == []
    assert lost(read) == ([("v", True)] if suspect else [])
    assert lost(read.run_decompositions()) == lost(read)


WHOLE = Leaf(fqn="w", kind=LeafKind.PARAMETER, dtype="float32", shape=(4, 4))
GOOD = Overlap(fqn="w", order=(0, 1), stride=(4, 1), offset=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"fqn": "x"},
        {"order": (0,)},
        {"order": (1, 1)},
        {"stride": (4,)},
        {"offset": 9},
        {"stride": (16, 1)},
    ],
    ids=str,
)
def test_overlaps_from_files_that_no_program_has_are_refused(changes: dict[str, Any]) -> None:
    view = Leaf(fqn="v", kind=LeafKind.CONSTANT, dtype="float32", shape=(2, 4), view=GOOD)
    assert not list(overlap_problems([WHOLE, view]))
    bad = view.model_copy(update={"view": GOOD.model_copy(update=changes)})
    assert [problem.subject for problem in overlap_problems([WHOLE, bad])] == ["v"]


def test_leaves_that_follow_from_one_another_in_a_circle_are_refused() -> None:
    here = Overlap(fqn="b", order=(0,), stride=(1,), offset=0)
    a = Leaf(fqn="a", kind=LeafKind.CONSTANT, dtype="float32", shape=(2,), view=here)
    b = a.model_copy(update={"fqn": "b", "view": here.model_copy(update={"fqn": "a"})})
    assert [problem.subject for problem in overlap_problems([a, b])] == ["leaves"]
