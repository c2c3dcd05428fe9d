"""Which weights can change a program's results, checked against what changing them does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from refitkit.program import KeptProgram, facts_of
from refitkit.program.liveness import live_inputs
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -1.0, 2.0]])
LIVE = {"live.weight", "live.bias"}
DEAD = {"dead.0.weight", "dead.0.bias", "dead.2.weight", "dead.2.bias"}


class Two(nn.Module):
    """A layer that is used, and layers whose results go nowhere; how is for functions to say."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.live = nn.Linear(4, 4)
        self.dead = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.register_buffer("state", torch.ones(2, 4))
        self._run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self._run(self, x)


def head(m: Any, x: torch.Tensor) -> Any:
    """The pooler of a model whose caller takes the hidden states."""
    hidden = m.live(x)
    torch.tanh(m.dead(hidden))
    return hidden


def in_place(m: Any, x: torch.Tensor) -> Any:
    made = m.dead(x).add_(m.live(x))
    made[0].copy_(x[0])
    return {"y": m.live(x)}


def random(m: Any, x: torch.Tensor) -> Any:
    nn.functional.dropout(torch.bernoulli(m.dead(x).sigmoid()), training=False)
    return m.live(x)


def only_shapes(m: Any, x: torch.Tensor) -> Any:
    zeros = torch.zeros_like(m.dead[0].weight) + m.dead[2].weight.new_ones(4)
    return m.live(x).expand_as(m.dead(x)) + zeros.sum() * 0 + x.type_as(m.dead[0].bias)


def overwritten(m: Any, x: torch.Tensor) -> Any:
    a, b, c = m.dead(x), m.dead(x) + 1, m.dead(x) + 2
    return a.zero_() + b.fill_(2.0) + c.copy_(m.live(x))


def of_a_list(m: Any, x: torch.Tensor) -> Any:
    return torch.broadcast_tensors(m.dead(x), m.live(x))[1]


def no_rows(m: Any, x: torch.Tensor) -> Any:
    return torch.cat([m.live(x), m.dead(x)[:0]])


def without_gradients(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        a, b = m.live(x), m.dead(x)
    b.relu_()
    return a + 1


def in_autocast(m: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = m.live(x), m.dead(x)
        b.mul_(2.0)
    torch.sin(b)
    return a + 1


def in_checkpoint(m: Any, x: torch.Tensor) -> Any:
    return checkpoint(lambda x: (m.dead(x), m.live(x)), x, use_reentrant=False)[1]


def in_branches(m: Any, x: torch.Tensor) -> Any:
    both = torch.cond(
        x.sum() > 0, lambda x: (m.live(x), m.dead(x)), lambda x: (m.live(x) * 2, x + 1), (x,)
    )
    return both[0]


def in_a_loop(m: Any, x: torch.Tensor) -> Any:
    return torch.while_loop(
        lambda i, a, b: i < 2,
        lambda i, a, b: (i + 1, m.live(a), m.dead(b)),
        (torch.tensor(0), x.clone(), x.clone()),
    )[1]


def in_a_scan(m: Any, x: torch.Tensor) -> Any:
    return scan(lambda c, row: (m.live(c) + row, m.dead(row)), torch.zeros(4), x)[0]


def in_a_map(m: Any, x: torch.Tensor) -> Any:
    return map_rows(lambda row: (m.dead(row), m.live(row)), x)[1]


def nested(m: Any, x: torch.Tensor) -> Any:
    def yes(x: torch.Tensor) -> Any:
        with torch.no_grad():
            m.dead(x).relu_()
            return m.live(x)

    return torch.cond(x.sum() > 0, yes, lambda x: x * 2, (x,))


WITH_DEAD_CODE = [
    head, in_place, random, only_shapes, overwritten, of_a_list, no_rows, without_gradients,
    in_autocast, in_checkpoint, in_branches, in_a_loop, in_a_scan, in_a_map, nested,
]  # fmt: skip


def into_a_buffer(m: Any, x: torch.Tensor) -> Any:
    m.state.add_(m.dead(x))
    return m.live(x)


def into_a_view_of_a_buffer(m: Any, x: torch.Tensor) -> Any:
    m.state.view(4, 2).t()[0].copy_(m.dead(x).flatten()[:4])
    return m.live(x)


def into_a_buffer_in_a_region(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        m.state.mul_(m.dead(x))
    return m.live(x)


def into_an_input(m: Any, x: torch.Tensor) -> Any:
    x.add_(m.dead(x))
    return m.live(torch.ones(4))


def into_what_is_used_later(m: Any, x: torch.Tensor) -> Any:
    made = m.live(x)
    made.view(-1)[:4].add_(m.dead(x)[0])
    return made * 2


def overwritten_in_part(m: Any, x: torch.Tensor) -> Any:
    made = m.dead(x)
    made[0].zero_()
    made.view(-1)[4:6].copy_(m.live(x)[0, :2])
    return made


def like_itself(m: Any, x: torch.Tensor) -> Any:
    made = m.dead(x)
    return m.live(x) + made.expand_as(made)


def overwritten_by_itself(m: Any, x: torch.Tensor) -> Any:
    made = m.dead(x)
    return m.live(x) + made.copy_(made)


def into_what_was_used_before(m: Any, x: torch.Tensor) -> Any:
    made = torch.zeros(2, 4)
    seen = made[1]
    made.copy_(m.dead(x))
    return m.live(x), seen


def into_the_result_of_a_region(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        made = m.live(x)
        part = made[0]
    more = m.dead(x)[1]
    with torch.no_grad():
        part.add_(more)
    return made


def carried(m: Any, x: torch.Tensor) -> Any:
    """What the next iteration of a loop reads reaches the result after all."""
    return torch.while_loop(
        lambda i, a, b: i < 2,
        lambda i, a, b: (i + 1, m.live(a) + b, m.dead(b)),
        (torch.tensor(0), x.clone(), x.clone()),
    )[1]


def how_often(m: Any, x: torch.Tensor) -> Any:
    """A weight that decides how many iterations there are."""
    start = m.dead(x).abs().sum()
    return torch.while_loop(
        lambda n, a: n > 0.5,
        lambda n, a: (n * 0.5, m.live(a)),
        (start, x.clone()),
    )[1]


def which_branch(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(m.dead(x).sum() > 0, m.live, lambda x: m.live(x) * 2, (x,))


def scanned(m: Any, x: torch.Tensor) -> Any:
    return scan(lambda c, row: (m.dead(c) + row, m.live(c)), torch.ones(4), x)[1]


def combined(m: Any, x: torch.Tensor) -> Any:
    pair = (m.live(x), m.dead(x))
    return associative_scan(
        lambda a, b: (a[0] * b[0] + a[1], a[1] + b[1]), pair, dim=0, combine_mode="generic"
    )[0]


ALL_LIVE = [
    into_a_buffer, into_a_view_of_a_buffer, into_a_buffer_in_a_region, into_an_input,
    into_what_is_used_later, overwritten_in_part, overwritten_by_itself, like_itself,
    into_what_was_used_before, into_the_result_of_a_region, carried, which_branch, scanned,
    combined,
]  # fmt: skip


def export(run: Callable[..., Any], **how: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(Two(run).eval(), (X.clone(),), **how)


def forms(run: Callable[..., Any]) -> list[torch.export.ExportedProgram]:
    """The program as it is exported, and decomposed."""
    program = export(run)
    return [program, program.run_decompositions()]


def used(program: torch.export.ExportedProgram) -> set[str]:
    leaves = facts_of(program).leaves
    return {leaf.fqn for leaf in leaves if leaf.used and leaf.persistent} - {"state"}


def matters(program: torch.export.ExportedProgram) -> set[str]:
    """Weights whose change is seen by a caller: in results, buffers or inputs."""
    module: Any = program.module(check_guards=False)
    state = dict(module.named_buffers())["state"]

    def seen() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for sign in (1.0, -1.0):
            given = X * sign
            state.fill_(1.0)
            found += [*pytree.tree_leaves(module(given)), state.clone(), given]
        return found

    def is_seen(weight: torch.Tensor, kept: torch.Tensor) -> bool:
        changed = False
        for factor, more in ((-1.5, 9.0), (9.0, 0.25), (-20.0, -9.0)):
            weight.copy_(kept * factor + more)
            changed |= not all(map(torch.equal, seen(), before))
        weight.copy_(kept)
        return changed

    with torch.no_grad():
        before, weights = seen(), dict(module.named_parameters())
        return {n for n in LIVE | DEAD if is_seen(weights[n], weights[n].clone())}


@pytest.mark.parametrize("run", WITH_DEAD_CODE)
def test_weights_that_only_dead_code_reads_are_not_used(run: Callable[..., Any]) -> None:
    for program in forms(run):
        assert used(program) == matters(program) == LIVE


@pytest.mark.parametrize("run", ALL_LIVE)
def test_weights_that_change_what_a_caller_sees_are_used(run: Callable[..., Any]) -> None:
    for program in forms(run):
        assert used(program) == matters(program) == LIVE | DEAD


def test_a_weight_that_decides_how_often_a_loop_runs_is_used() -> None:
    for program in forms(how_often):
        assert used(program) == LIVE | DEAD


def test_a_weight_of_only_one_result_of_a_block_is_used_by_that_result() -> None:
    """Of a block that is called twice, each call may need other results."""
    both = torch.compiler.nested_compile_region(lambda x, s, t: (x * s, x * t))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.c, self.d = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return both(x, self.a, self.b)[0] + both(x, self.c, self.d)[1]

    program = torch.export.export(Blocks(), (torch.ones(4),), strict=True)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "invoke_subgraph" in calls
    leaves = facts_of(program).leaves
    assert {leaf.fqn for leaf in leaves if leaf.used} == {"a", "d"}


class Sized(nn.Module):
    """A number in a buffer says how many rows there are: its value is in a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.rows.item()
        torch._check(n >= 0)
        torch._check(n <= 4)
        return torch.ones_like(x[:n])


def test_a_value_in_the_shape_of_what_is_overwritten_is_used() -> None:
    def chosen(m: Any, x: torch.Tensor) -> Any:
        return m.live(x), x[m.dead(x) > 0].zero_()

    assert used(export(chosen)) == LIVE | DEAD


def test_a_value_in_a_shape_is_used() -> None:
    program = torch.export.export(Sized(), (torch.ones(4, 2),))
    assert [leaf.used for leaf in facts_of(program).leaves] == [True]


def test_asserts_on_values_are_effects_and_those_on_dtypes_are_not() -> None:
    graph = torch.fx.Graph()
    checked, only_typed, x = (graph.placeholder(name) for name in ("checked", "only_typed", "x"))
    for node in (checked, only_typed, x):
        node.meta["val"] = torch.ones(1)
    aten = torch.ops.aten
    graph.call_function(aten._assert_async.msg, (checked, "no"))
    graph.call_function(
        aten._assert_tensor_metadata.default, (only_typed,), {"dtype": torch.float32}
    )
    graph.output((x,))
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert live_inputs(module) == {checked, x}


@pytest.mark.parametrize(
    ("op", "live"),
    [(torch.ops.higher_order.print, True), (torch.ops.higher_order.out_dtype, False)],
)
def test_of_higher_order_ops_that_nobody_knows_effects_are_assumed(op: Any, live: bool) -> None:
    graph = torch.fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    graph.call_function(op, (weight,))
    graph.output((x,))
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert live_inputs(module) == ({weight, x} if live else {x})


def test_a_region_with_other_arguments_than_expected_uses_all_of_them() -> None:
    body = torch.fx.Graph()
    a = body.placeholder("a")
    body.placeholder("b")
    body.output((a,))
    root = nn.Module()
    root.body = torch.fx.GraphModule(nn.Module(), body)
    graph = torch.fx.Graph()
    weights = [graph.placeholder(name) for name in "uvw"]
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    graph.call_function(wrap, (False, graph.get_attr("body"), *weights))
    graph.output((weights[0],))
    assert live_inputs(torch.fx.GraphModule(root, graph)) == set(weights)


def test_dead_code_changes_no_fingerprint() -> None:
    """Plans that were made before dead code was known fit the same programs."""
    assert facts_of(export(head)).graph == facts_of(export(head)).graph
    assert facts_of(export(head)).graph != facts_of(export(in_place)).graph


@pytest.mark.parametrize("change", ["missing", "other dtype", "there"])
def test_a_kept_program_runs_its_dead_code_on_what_fits(change: str) -> None:
    program = export(only_shapes)
    kept = KeptProgram.of(program)
    assert kept is not None
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in program.state_dict.items()}
    model = Two(only_shapes)
    model.load_state_dict(weights)
    for name in DEAD:
        if change == "missing":
            del weights[name]
        elif change == "other dtype":
            weights[name] = weights[name].to(torch.float16)
    result = kept.bind(TensorMap(weights), {}.__getitem__)(X)
    with torch.no_grad():
        expected = model(X)
    assert result.dtype == expected.dtype
    assert result.equal(expected)
