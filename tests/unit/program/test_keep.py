"""A program without its weights: what it is as bytes, and what it is with weights again."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from refitkit.errors import PlanMismatchError, SourceError
from refitkit.program import KeptProgram, facts_of, keep
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap
from tests.fakes import same_state
from tests.unit.program import models
from tests.unit.program.models import copied, export, exported


def kept_from(program: Any) -> KeptProgram:
    """Through its bytes, as a saved module keeps it."""
    kept, facts = KeptProgram.of(program), facts_of(program)
    assert kept is not None
    return KeptProgram(kept.to_bytes(), facts.leaves, facts.ties)


def pinned_of(program: Any) -> Any:
    tensors = {k: v.clone() for k, v in tensors_of(program).items()}
    return lambda name: tensors[name]


def same(a: Any, b: Any) -> bool:
    """Equal structure, and equal bits of every tensor."""
    mine, structure = pytree.tree_flatten(a)
    theirs, wanted = pytree.tree_flatten(b)
    return structure == wanted and all(
        same_state({"": x.resolve_conj()}, {"": y.resolve_conj()})
        if isinstance(x, torch.Tensor)
        else x == y
        for x, y in zip(mine, theirs, strict=True)
    )


def reweighted(kind: type[nn.Module]) -> nn.Module:
    """A model of other weights; ties and layouts stay."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for name, tensor in {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }.items():
            persistent = name in model.state_dict()
            if persistent and tensor.is_floating_point() and 0 not in tensor.stride():
                tensor.add_(0.25)
    return model


@pytest.mark.parametrize(("kind", "decomposed"), models.FORMS, ids=models.form_name)
def test_with_weights_it_answers_like_the_model(kind: type[nn.Module], decomposed: bool) -> None:
    program = exported(kind, decomposed=decomposed)
    model = reweighted(kind)
    source = {k: v.detach().clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in source.items()}
    bound = kept_from(program).bind(TensorMap(source), pinned_of(program))
    for _ in range(2):  # what it changes, it changes for itself
        with torch.no_grad():
            wanted = model(*copied(kind.inputs))
            found = bound(*copied(kind.inputs))
        assert same(found, wanted)
    assert same_state({k: v.resolve_conj() for k, v in source.items()},
                      {k: v.resolve_conj() for k, v in before.items()})  # fmt: skip


@pytest.mark.parametrize("kind", models.ALL)
def test_it_is_json_without_weights(kind: type[nn.Module]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    kept = KeptProgram.of(exported(kind))
    assert kept is not None
    assert isinstance(json.loads(kept.to_bytes(), parse_constant=refuse), dict)


def test_no_value_of_a_weight_is_in_it() -> None:
    class Model(models.Plain):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.weight.fill_(7654.5)
                self.lost.fill_(8765.5)

    text = KeptProgram.of(export(Model())).to_bytes()  # type: ignore[union-attr]
    assert b"7654.5" not in text
    assert b"8765.5" not in text
    assert len(text) < 50_000
    large = export(nn_of(1 << 20))
    assert len(KeptProgram.of(large).to_bytes()) < 50_000  # type: ignore[union-attr]


def nn_of(size: int) -> nn.Module:
    model = nn.Linear(size, 1)
    model.inputs = (torch.ones(1, size),)
    return model


def test_the_same_program_gives_the_same_bytes() -> None:
    one, two = (KeptProgram.of(export(models.Plain())) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.to_bytes() == two.to_bytes()


def test_keeping_changes_nothing() -> None:
    program = export(models.Directly())
    before = {k: v.clone() for k, v in program.state_dict.items()}
    flags = {k: v.requires_grad for k, v in program.state_dict.items()}
    text = program.graph.python_code("self").src
    KeptProgram.of(program)
    assert program.graph.python_code("self").src == text
    assert all(v.equal(before[k]) for k, v in program.state_dict.items())
    assert {k: v.requires_grad for k, v in program.state_dict.items()} == flags
    assert program.example_inputs is not None


@pytest.mark.parametrize("kind", [models.Plain, models.Directly, models.OwnParameter, models.Tied])
def test_a_live_model_is_not_touched(kind: type[nn.Module]) -> None:
    """Not its values, not its gradients, not its flags."""
    program, model = exported(kind), reweighted(kind).train()
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    state = model.state_dict(keep_vars=True)
    bound = kept_from(program).bind(TensorMap(state), pinned_of(program))
    result = bound(*copied(kind.inputs))
    assert not any(
        x.requires_grad for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)
    )
    assert same_state({k: v.detach() for k, v in model.state_dict().items()}, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    assert all(state[k] is v for k, v in model.state_dict(keep_vars=True).items())


def test_weights_are_used_where_they_are() -> None:
    program = exported(models.Plain)
    source = {k: v.detach().clone() for k, v in program.state_dict.items()}
    bound = kept_from(program).bind(TensorMap(source), pinned_of(program))
    x = torch.zeros(2)
    first = bound(x)
    source["kept"].add_(1.0)
    assert same(bound(x), first + 1.0)


class Lending(TensorMap):
    """A source that reads anew what it is asked for, and knows what is still held of that."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []
        self.most = 0
        self._lent: list[weakref.ref[torch.UntypedStorage]] = []

    def get(self, fqn: str) -> torch.Tensor:
        self.asked.append(fqn)
        read = super().get(fqn).detach().clone()
        self._lent.append(weakref.ref(read.untyped_storage()))
        self.most = max(self.most, self.held)
        return read

    @property
    def held(self) -> int:
        return sum(one() is not None for one in self._lent)


class Layers(nn.Module):
    """A chain of layers whose first weight is used once more at the end, and one that is not."""

    inputs = (torch.ones(1, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.layers[0].weight  # type: ignore[operator]


@pytest.mark.parametrize("decomposed", [False, True])
def test_weights_are_read_when_they_are_needed_and_then_let_go(*, decomposed: bool) -> None:
    program, model = exported(Layers, decomposed=decomposed), reweighted(Layers)
    source = Lending(model.state_dict())
    bound = kept_from(program).bind(source, pinned_of(program))
    assert not source.asked
    with torch.no_grad():
        assert same(bound(*Layers.inputs), model(*Layers.inputs))
    assert source.most == 3  # of one layer, and what is used again
    assert source.held == 0
    read = [name for name in model.state_dict() if not name.startswith("unused")]
    assert sorted(source.asked) == sorted(read)


class InRegions(Layers):
    """The same inside of regions, one in the other, which export makes submodules of."""

    inputs = (torch.ones(1, 4),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.layers[0](x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for layer in self.layers[1:]:
                    x = torch.tanh(layer(x))
            return x.float() @ self.layers[0].weight  # type: ignore[operator]


def test_regions_let_go_of_weights_too() -> None:
    program, model = exported(InRegions), reweighted(InRegions)
    source = Lending(model.state_dict())
    bound = kept_from(program).bind(source, pinned_of(program))
    with torch.no_grad():
        assert same(bound(*InRegions.inputs), model(*InRegions.inputs))
    assert source.most == 3
    assert source.held == 0


def test_what_a_source_computes_knows_nothing_of_regions() -> None:
    class Computing(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return super().get(fqn)

    seen: set[tuple[bool, bool]] = set()
    program = exported(InRegions)
    bound = kept_from(program).bind(Computing(program.state_dict), pinned_of(program))
    with torch.enable_grad():
        bound(*InRegions.inputs)
    assert seen == {(False, False)}


def test_a_call_that_fails_holds_nothing() -> None:
    program = exported(Layers)
    source, kept = Lending(program.state_dict), kept_from(program)
    alive = weakref.ref(source)
    with pytest.raises(RuntimeError):
        kept.bind(source, pinned_of(program))(torch.ones(1, 3))
    assert source.held == 0
    del source
    gc.collect()
    assert alive() is None


def test_a_source_that_cannot_be_read_when_it_is_asked() -> None:
    class Broken(TensorMap):
        def get(self, fqn: str) -> torch.Tensor:
            raise OSError(fqn)

    program = exported(Layers)
    bound = kept_from(program).bind(Broken(program.state_dict, "the file"), pinned_of(program))
    with pytest.raises(SourceError, match=r"the file cannot be read: OSError: layers\.0"):
        bound(*Layers.inputs)


def test_a_changed_buffer_starts_from_its_value_at_every_bind() -> None:
    program = exported(models.Counter)
    source, kept = {"calls": torch.tensor(5)}, kept_from(program)
    for _ in range(2):
        bound = kept.bind(TensorMap(source), pinned_of(program))
        assert bound(torch.ones(2)).tolist() == [7, 7]
        assert bound(torch.ones(2)).tolist() == [8, 8]
    assert source["calls"].item() == 5


def test_two_threads_may_bind_one_program() -> None:
    """A module and its copy keep one program, and may be refitted at once."""
    program = exported(models.Normalized)
    kept, inputs = kept_from(program), models.Normalized.inputs
    together = threading.Barrier(2, timeout=30)

    def weights(fill: float) -> dict[str, torch.Tensor]:
        return {
            name: torch.full_like(value, fill) if value.is_floating_point() else value
            for name, value in program.state_dict.items()
        }

    def wrong_answers(fill: float) -> int:
        bound = kept.bind(TensorMap(weights(fill)), pinned_of(program))
        alone = kept_from(program).bind(TensorMap(weights(fill)), pinned_of(program))
        wanted = alone(*copied(inputs))
        together.wait()
        return sum(not same(bound(*copied(inputs)), wanted) for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong_answers, (1.0, 2.0))) == [0, 0]


def test_two_threads_may_bind_two_programs() -> None:
    """torch reads one program at a time in a whole process, and says so by failing."""
    together = threading.Barrier(2, timeout=30)

    def bind_often(kind: type[nn.Module]) -> None:
        program = exported(kind)
        kept = [kept_from(program) for _ in range(10)]
        together.wait()
        for one in kept:
            one.bind(TensorMap(program.state_dict), pinned_of(program))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bind_often, (models.Normalized, models.Plain)))


# -- what the source lacks --------------------------------------------------------------------


def bind(kind: type[nn.Module], weights: dict[str, torch.Tensor], pinned: Any = None) -> Any:
    program = exported(kind)
    return kept_from(program).bind(TensorMap(weights), pinned or pinned_of(program))


def test_something_that_the_program_reads_is_missing() -> None:
    with pytest.raises(SourceError, match="'weight'"):
        bind(models.Plain, {"kept": torch.ones(2), "unused": torch.ones(4)})


def test_what_nobody_reads_may_be_missing() -> None:
    bound = bind(models.Plain, {"weight": torch.ones(2), "kept": torch.zeros(2)})
    assert same(bound(torch.zeros(2)), torch.tensor([10.5, 20.25]))


def test_what_nobody_reads_is_not_asked_of_the_plan() -> None:
    tensors = tensors_of(exported(models.Plain))
    asked: list[str] = []

    def pinned(name: str) -> torch.Tensor:
        asked.append(name)
        if name == "unused_lost":
            raise KeyError(name)
        return tensors[name]

    bind(models.Plain, {"weight": torch.ones(2), "kept": torch.zeros(2)}, pinned)
    assert "lost" in asked


def test_what_the_plan_lacks_too_is_a_source_error() -> None:
    with pytest.raises(SourceError, match="'lost'"):
        bind(models.Plain, {"weight": torch.ones(2), "kept": torch.zeros(2)}, {}.__getitem__)


def test_a_source_overrides_what_the_plan_keeps() -> None:
    weights = {"weight": torch.ones(2), "kept": torch.zeros(2), "lost": torch.zeros(2)}
    assert same(bind(models.Plain, weights)(torch.zeros(2)), torch.tensor([10.0, 20.0]))


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_one_name_of_a_tie_is_enough(name: str) -> None:
    weight = torch.arange(6.0).reshape(3, 2)
    model = models.Tied().eval()
    model.load_state_dict({"embedding.weight": weight, "head.weight": weight})
    bound = bind(models.Tied, {name: weight})
    assert same(bound(*models.Tied.inputs), model(*models.Tied.inputs).detach())


# -- what cannot be kept ----------------------------------------------------------------------


def test_a_program_that_torch_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export.serde import serialize

    def fails(self: object, *arguments: object, **named: object) -> None:
        raise serialize.SerializeError("no")

    monkeypatch.setattr(serialize.ExportedProgramSerializer, "serialize", fails)
    assert KeptProgram.of(exported(models.Plain)) is None


def test_a_program_with_objects_that_only_pickle_knows() -> None:
    program = SimpleNamespace(constants={"object": object()})
    assert KeptProgram.of(program) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"null", b"\xff", b'{"graph_module": 3}'], ids=repr
)
def test_bytes_that_are_no_program(content: bytes) -> None:
    facts = facts_of(exported(models.Plain))
    program = exported(models.Plain)
    kept = KeptProgram(content, facts.leaves, facts.ties)
    with pytest.raises(PlanMismatchError, match="kept"):
        kept.bind(TensorMap(program.state_dict), pinned_of(program))


def test_dynamic_shapes_survive() -> None:
    model = models.Attention().eval()
    dims = {"x": {1: torch.export.Dim("n", min=2, max=8)}}
    program = torch.export.export(model, model.inputs, dynamic_shapes=dims)
    bound = kept_from(program).bind(TensorMap(model.state_dict()), pinned_of(program))
    for n in (2, 5, 8):
        x = torch.arange(n * 8.0).reshape(1, n, 8) / 24
        assert same(bound(x), model(x).detach())


def test_keyword_inputs_survive() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * self.weight * scale

    model = Keyword()
    program = torch.export.export(model, (torch.ones(2),), {"scale": torch.tensor(2.0)})
    bound = kept_from(program).bind(TensorMap(model.state_dict()), pinned_of(program))
    assert bound(torch.ones(2), scale=torch.tensor(3.0)).tolist() == [3, 3]


# -- restored ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "decomposed"), models.FORMS, ids=models.form_name)
def test_a_restored_program_answers_like_the_model(kind: type[nn.Module], decomposed: bool) -> None:
    program = exported(kind, decomposed=decomposed)
    model = reweighted(kind)
    source = {k: v.detach().clone() for k, v in model.state_dict().items()}
    restored = kept_from(program).restore(TensorMap(source), pinned_of(program))
    with torch.no_grad():
        wanted = model(*copied(kind.inputs))
        found = restored.module(check_guards=False)(*copied(kind.inputs))
    assert same(found, wanted)
    assert facts_of(restored).leaves == facts_of(program).leaves
    # torch's serializer writes out defaults that decompositions leave open; empty regions are lost
    if not decomposed and kind is not models.NestedRegions:
        assert facts_of(restored).graph == facts_of(program).graph


def test_a_restored_program_shares_memory_with_its_source_and_among_tied_names() -> None:
    program = exported(models.Tied)
    source = {k: v.detach().clone() for k, v in program.state_dict.items()}
    restored = kept_from(program).restore(TensorMap(source), pinned_of(program))
    assert facts_of(restored).ties == facts_of(program).ties
    for name, value in restored.state_dict.items():
        twins = next((tie for tie in facts_of(program).ties if name in tie), (name,))
        assert value.data_ptr() == source[twins[0]].data_ptr()
        assert not value.requires_grad


def test_a_restored_program_lacks_nothing() -> None:
    program = exported(models.Tied)
    with pytest.raises(SourceError):
        kept_from(program).restore(TensorMap({}), pinned_of(program))


def test_a_program_that_would_not_be_read_back_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(_: Any) -> None:
        raise ValueError("odd")

    program = exported(models.Plain)
    monkeypatch.setattr(keep, "check_graph", odd)
    assert KeptProgram.of(program) is None
