"""What calls are made of, and where walks over them end."""

from __future__ import annotations

from refitkit.model import CallRef, OpCall, PinnedRef, SourceRef, Tensor
from refitkit.recipe.ops import LeafDependencies, calls_below, operands_of

ONE = (Tensor(dtype="float32", shape=(2,)),)
CALLS = [
    OpCall(op="aten.neg.default", args=(SourceRef(fqn="a"),), results=ONE),
    OpCall(op="aten.neg.default", args=(SourceRef(fqn="b"),), results=ONE),
    OpCall(op="aten.add.Tensor", args=(CallRef(call=0), PinnedRef(name="p")), results=ONE),
    OpCall(op="aten.cat.default", args=((CallRef(call=2), CallRef(call=2)), 0), results=ONE),
    OpCall(op="aten.full_like.default", args=(PinnedRef(name="p"), 1), results=ONE),
]


def below(*wanted: int, kept: frozenset[int] = frozenset()) -> set[int]:
    values = [CallRef(call=number) for number in wanted]
    return calls_below(values, lambda n: () if n in kept else operands_of(CALLS[n]))


def test_operands_stand_in_order_in_lists_too() -> None:
    assert operands_of(CALLS[3]) == (CallRef(call=2), CallRef(call=2))
    with_names = OpCall(op="x", args=(1, None), kwargs={"a": SourceRef(fqn="w")}, results=ONE)
    assert operands_of(with_names) == (SourceRef(fqn="w"),)


def test_calls_below_are_those_that_a_value_is_made_by() -> None:
    assert below(3) == {0, 2, 3}
    assert below(1, 2) == {0, 1, 2}
    assert calls_below([SourceRef(fqn="a"), PinnedRef(name="p")], lambda _: ()) == set()


def test_the_walk_ends_where_nothing_is_said_to_be_below() -> None:
    assert below(3, kept=frozenset({2})) == {2, 3}
    assert below(3, 0, kept=frozenset({2})) == {0, 2, 3}


def test_leaves_are_followed_under_all_their_names() -> None:
    dependencies = LeafDependencies(CALLS, [("a", "twin")])
    assert dependencies.of(CallRef(call=3)) == {"a", "twin"}
    assert dependencies.of(CallRef(call=4)) == dependencies.of(PinnedRef(name="p")) == frozenset()
    assert dependencies.of(SourceRef(fqn="twin")) == {"a", "twin"}
    assert LeafDependencies(CALLS).of_call(3) == {"a"}


def test_calls_may_come_later_and_chains_may_be_long() -> None:
    calls = list(CALLS)
    dependencies = LeafDependencies(calls)
    assert dependencies.of_call(1) == {"b"}
    calls[4] = OpCall(op="aten.neg.default", args=(CallRef(call=3),), results=ONE)
    calls += [
        OpCall(op="aten.neg.default", args=(CallRef(call=n + 4),), results=ONE) for n in range(5000)
    ]
    assert dependencies.of_call(5004) == LeafDependencies(calls).of_call(5004) == {"a"}
    wanted = {0, *range(2, 5005)}
    assert calls_below([CallRef(call=5004)], lambda n: operands_of(calls[n])) == wanted
