"""A checker that remembers layouts treats every call as if it checked each one.

So each call goes to a checker with a history, and to the check of a new one. Both raise the same
error, or both give the engine the same memory.
"""

from __future__ import annotations

import itertools
import random
import warnings
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from refitkit.builtin.aotinductor import inputs as inputs_module
from refitkit.builtin.aotinductor.inputs import (
    CallSpec,
    CallTensors,
    FixedInput,
    InputChecker,
    SymbolicSize,
    TensorInput,
)
from refitkit.errors import InputMismatchError
from refitkit.program.bits import digest

if TYPE_CHECKING:
    from collections.abc import Callable

Call = tuple[tuple[Any, ...], dict[str, Any]]


# -- what modules were compiled for -----------------------------------------------------------


class Form(NamedTuple):
    """What a module was compiled for, and right inputs for it."""

    spec: CallSpec
    structure: pytree.TreeSpec
    right: Callable[[], Call]

    def checker(self) -> InputChecker:
        return InputChecker(self.spec, self.structure)


def tensor(name: str, shape: tuple[Any, ...], **facts: Any) -> TensorInput:
    usual = {"dtype": "float32", "device": "cpu", "order": tuple(range(len(shape)))}
    return TensorInput(name=name, shape=shape, **usual | facts)


def form(right: Callable[[], Call], *specs: TensorInput | FixedInput, **ranges: Any) -> Form:
    return Form(CallSpec(inputs=specs, ranges=ranges), pytree.tree_structure(right()), right)


N = SymbolicSize(symbol="n")
FORMS = {
    "one": form(lambda: ((torch.randn(2, 3),), {}), tensor("x", (2, 3), strides=(3, 1))),
    "batch": form(
        lambda: ((torch.randn(2, 3), torch.randn(5)), {}),
        tensor("x", (N, 3)),
        tensor("y", (SymbolicSize(symbol="n", factor=2, offset=1),)),
        n=(1, 4),
    ),
    "written": form(
        lambda: ((torch.randn(2, 3), torch.randn(2, 3)), {}),
        tensor("x", (2, 3), strides=(3, 1)),
        tensor("y", (2, 3), written=True),
    ),
    "keywords": form(
        lambda: ((torch.randn(2),), {"b": torch.randn(2, 3), "a": torch.ones(2, 3).long()}),
        tensor("x", (2,)),
        tensor("b", (2, 3)),
        tensor("a", (2, 3), dtype="int64"),
    ),
    "number": form(
        lambda: ((torch.randn(2), 2), {}), tensor("x", (2,)), FixedInput(name="n", value=2)
    ),
    "nested": form(
        lambda: (([torch.randn(2), torch.randn(2)],), {}), tensor("x", (2,)), tensor("y", (2,))
    ),
    "complex": form(
        lambda: ((torch.randn(2, 3, dtype=torch.complex64),), {}),
        tensor("x", (2, 3), dtype="complex64"),
    ),
    "strides": form(
        lambda: (
            (torch.randn(3, 2).t(), torch.randn(2, 8)[:, :6:2], torch.randn(1, 3, 1)),
            {},
        ),
        tensor("x", (2, 3), order=(1, 0), strides=(1, 2)),
        tensor("y", (2, 3), strides=(8, 2)),
        tensor("z", (1, N, 1), order=(1, 0, 2)),
        n=(0, None),
    ),
    "empty": form(
        lambda: ((torch.randn(0, 3), torch.randn(())), {}), tensor("x", (0, 3)), tensor("s", ())
    ),
    "nothing": form(lambda: ((), {})),
}


# -- odd inputs -------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def fake(x: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


ODD: dict[str, Callable[[torch.Tensor], Any]] = {
    # the same values
    "as it is": lambda x: x,
    "gradient": lambda x: x.requires_grad_(),
    "history": lambda x: x.requires_grad_() * 1,
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "buffer": torch.nn.Buffer,
    "subclass": lambda x: x.as_subclass(Subclass),
    "inference": inference,
    "alias": lambda x: x.view_as(x),
    # the same values in other memory
    "turned in memory": lambda x: x.mT.contiguous().mT,
    "dense": lambda x: x.contiguous(),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "gaps in rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x.new_ones(1), x.reshape(-1)])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "overlapping": lambda x: torch.ones(64).to(x.dtype).as_strided(x.shape, [1] * x.dim()),
    "strides of 1": lambda x: x.as_strided(x.shape, [s if n > 1 else 77 for n, s in sizes(x)]),
    # pending work, and no memory of its own
    "negated": torch._neg_view,
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "imaginary": lambda x: torch.complex(x, x).conj().imag,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "functional": torch._to_functional_tensor,
    "freed": freed,
    # other layouts
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "strided nested": lambda x: torch.nested.nested_tensor([*x]),
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    # other dtypes and shapes
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "int": lambda x: x.int(),
    "bits as int": lambda x: x.view(torch.int32),
    "longer": lambda x: torch.cat([x, x]),
    "shorter": lambda x: x[:1],
    "without rows": lambda x: x[:0],
    "without columns": lambda x: x[..., :0],
    "more dimensions": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "turned": lambda x: x.mT,
    "swapped sizes": lambda x: x.reshape(x.shape[::-1]),
    # no tensors
    "a number": lambda x: 2,
    "a float": lambda x: 2.0,
    "None": lambda x: None,
    "text": lambda x: "x",
    "array": lambda x: x.numpy(),
    "list": lambda x: [x],
    "pair": lambda x: (x, x),
    "dict": lambda x: {"x": x},
}


def sizes(x: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(x.shape, x.stride(), strict=True))


def odd(kind: str, value: Any) -> Any:
    """Such an input in place of a right one; the right one if there is none of its kind."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")  # of torch's, about tensors that are rare
        return ODD[kind](value)
    return value


# -- what comes of a call ---------------------------------------------------------------------


def outcome(flatten: Callable[..., CallTensors], *call: Any) -> Any:
    """The error of a checker, or all that an engine and the caller can notice of its tensors."""
    given = [v for v in pytree.tree_leaves(call) if isinstance(v, torch.Tensor)]
    try:
        found = flatten(*call)
    except Exception as exc:  # noqa: BLE001 - whatever it is, both raise it
        return type(exc), str(exc)
    written = [
        ([id(v) for v in given].index(id(value)), [id(t) for t in found.tensors].index(id(copy)))
        for value, copy in found.copies
    ]
    starts = {start_of(value) for value in given}
    # an engine that returns an input must not return the caller's object
    same = [one is value for one in found.tensors for value in given]
    return [seen(one, starts) for one in found.tensors], written, same


def seen(one: torch.Tensor, starts: set[int]) -> tuple[Any, ...]:
    """Everything about a tensor for an engine: its memory, or the content of a copy."""
    keys = torch._C._dispatch_keys(one).raw_repr()
    facts = keys, type(one), one.dtype, one.shape, one.stride(), one.requires_grad, one.grad_fn
    start = start_of(one)
    if start in starts:
        return *facts, start, one.storage_offset()
    return *facts, digest(one) if start or not one.numel() else "no memory"


def start_of(one: torch.Tensor) -> int:
    if isinstance(one, FakeTensor):
        return 0
    try:
        return one.data_ptr()
    except RuntimeError:  # it has no memory
        return 0


def both(form: Form, used: InputChecker, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outcome of a call, which is that of a check."""
    found = outcome(used.flatten, args, kwargs)
    assert found == outcome(form.checker()._checked, args, kwargs)
    return found


def replaced(call: Call, place: int, kind: str) -> Call:
    """A call with one odd input."""
    flat, structure = pytree.tree_flatten(call)
    flat[place] = odd(kind, flat[place])
    args, kwargs = pytree.tree_unflatten(flat, structure)
    return args, kwargs


def is_refused(found: Any) -> bool:
    return isinstance(found[0], type)


# -- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_one_odd_input(name: str) -> None:
    form = FORMS[name]
    used = form.checker()
    places = range(len(pytree.tree_leaves(form.right())))
    calls = [(place, kind) for place in places for kind in ODD] * 3
    random.Random(name).shuffle(calls)  # noqa: S311
    outcomes = []
    for place, kind in calls:
        both(form, used, *form.right())
        outcomes.append(both(form, used, *replaced(form.right(), place, kind)))
    refused = sum(map(is_refused, outcomes))
    assert not calls or 0 < refused < len(outcomes)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_several_odd_inputs(name: str, seed: int) -> None:
    """Freed memory stays away: a copy of it would crash."""
    form, rng = FORMS[name], random.Random(f"{name} {seed}")  # noqa: S311
    used, kinds = form.checker(), [kind for kind in ODD if kind != "freed"]
    for _ in range(150):
        call = form.right()
        for place in range(len(pytree.tree_leaves(call))):
            if rng.random() < 0.6:
                # odd in two ways
                for kind in rng.sample(kinds, 2):
                    call = replaced(call, min(place, len(pytree.tree_leaves(call)) - 1), kind)
        args, kwargs = call
        names = rng.sample(list(kwargs), len(kwargs))
        both(form, used, args, {key: kwargs[key] for key in names})


def test_sizes_that_vary() -> None:
    form = FORMS["batch"]
    used = form.checker()
    shapes = [*itertools.product(range(7), (3, 4), range(12))]
    for rows, columns, more in [*shapes, *reversed(shapes)]:
        found = both(form, used, (torch.randn(rows, columns), torch.randn(more)), {})
        fits = 1 <= rows <= 4 and columns == 3 and more == 2 * rows + 1
        assert is_refused(found) == (not fits)


def test_keywords() -> None:
    form = FORMS["keywords"]
    (x,), kwargs = form.right()
    a, b = kwargs["a"], kwargs["b"]
    calls: list[tuple[Call, bool]] = [
        (((x,), {"b": b, "a": a}), True),
        (((x,), {"a": a, "b": b}), True),
        (((x,), {"a": b, "b": a}), False),
        (((x,), {"b": a, "a": b}), False),
        (((x,), {"b": b}), False),
        (((x, b), {"a": a}), False),
        (((x, b, a), {}), False),
        (((), {"x": x, "b": b, "a": a}), False),
        (((x,), {"b": b, "a": a, "c": x}), False),
        (((x,), {"b": b, "c": a}), False),
    ]
    used = form.checker()
    for (args, named), is_right in calls * 3:
        assert is_refused(both(form, used, args, named)) == (not is_right)


@pytest.mark.parametrize("name", ["one", "batch", "written"])
def test_wrappers_of_transforms(name: str) -> None:
    """A function that is transformed gets wrappers, which have no memory."""
    form = FORMS[name]
    used, (args, _) = form.checker(), form.right()
    met, leaked = [], []

    def called(*wrappers: torch.Tensor) -> torch.Tensor:
        leaked.append(wrappers)
        met.append(is_refused(both(form, used, wrappers, {})))
        both(form, used, args, {})  # plain tensors inside a transform
        return wrappers[0].sum()

    for _ in range(2):
        both(form, used, args, {})
        both(form, used, tuple(torch._to_functional_tensor(value) for value in args), {})
        torch.func.vmap(called)(*[torch.stack([value, value]) for value in args])
        torch.func.grad(called)(*args)
        torch.func.functionalize(called)(*args)
        torch.func.jvp(called, args, args)
        met += [is_refused(both(form, used, wrappers, {})) for wrappers in leaked]
    assert met == [True] * 20


class Copies(TorchDispatchMode):
    """Every result is a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {}).clone()


@pytest.mark.parametrize(
    "mode",
    [Copies, torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), FakeTensorMode],
)
def test_modes_of_the_caller(mode: Callable[[], Any]) -> None:
    form = FORMS["written"]
    right, used = form.right(), form.checker()
    for _ in range(3):
        with mode():
            both(form, used, *right)
        both(form, used, *right)


def test_in_a_trace_of_torch_jit() -> None:
    """Sizes are tensors there."""
    form = FORMS["one"]
    used = form.checker()

    def called(x: torch.Tensor) -> torch.Tensor:
        both(form, used, (x,), {})
        return x + 1

    ((x,), _) = form.right()
    for _ in range(2):
        with pytest.warns():
            torch.jit.trace(called, (x,), check_trace=False)
        both(form, used, (x,), {})
    assert len(used._passed) == 1


class Pair(torch.Tensor):
    """A tensor that is a structure of two for torch."""


def test_a_tensor_that_is_a_structure() -> None:
    pytree.register_pytree_node(
        Pair,
        lambda pair: ([*pair.as_subclass(torch.Tensor)], None),
        lambda rows, _: torch.stack([*rows]).as_subclass(Pair),
    )
    form = FORMS["one"]
    used, (args, _) = form.checker(), form.right()
    both(form, used, args, {})
    assert is_refused(both(form, used, (args[0].as_subclass(Pair),), {}))


def test_layouts_that_passed_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole point; and what was refused, or had to be copied, is looked at each time."""
    looks: list[int] = []
    look = inputs_module._problems
    monkeypatch.setattr(inputs_module, "_problems", lambda *a: looks.append(1) or look(*a))

    def looked(checker: InputChecker, *call: Any) -> bool:
        looks.clear()
        outcome(checker.flatten, *call)
        return bool(looks)

    for name in ("one", "batch", "written", "keywords", "complex", "strides", "empty"):
        checker = FORMS[name].checker()
        assert [looked(checker, *FORMS[name].right()) for _ in range(3)] == [True, False, False]
    checker = FORMS["one"].checker()
    for args in ((torch.randn(3, 2).t(),), (torch.randn(2, 2),), (torch.randn(2, 3)[:1],)):
        assert [looked(checker, args, {}) for _ in range(3)] == [True] * 3
    gradient = torch.randn(2, 3, requires_grad=True)
    assert [looked(checker, (gradient,), {}) for _ in range(2)] == [True, False]


def test_more_layouts_than_a_checker_remembers() -> None:
    form = FORMS["strides"]
    used = form.checker()
    (x, y, _), _ = form.right()
    for rows in (*range(600), 1, 599):
        assert not is_refused(both(form, used, (x, y, torch.randn(1, rows, 1)), {}))
    assert len(used._passed) <= 256


def test_no_inputs_are_kept() -> None:
    form = FORMS["written"]
    checker, (args, kwargs) = form.checker(), form.right()
    for _ in range(2):
        checker.flatten(args, kwargs)
    watched = [weakref.ref(value.untyped_storage()) for value in args]
    objects = [weakref.ref(value) for value in args]
    del args
    assert not any(one() for one in [*watched, *objects])


def test_inputs_without_a_description_are_given_as_they_are() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    checker = InputChecker(None, pytree.tree_structure(((x, 5), {})))
    for _ in range(3):
        assert checker.flatten((x, 5), {}).tensors == [x]
        assert checker.flatten((x, x), {}).tensors == [x, x]
        with pytest.raises(InputMismatchError, match="structure"):
            checker.flatten((x,), {})


def test_an_error_is_the_same_after_a_right_call() -> None:
    """One text of the error, in full: what the other tests compare is not empty."""
    form = FORMS["one"]
    used = form.checker()
    used.flatten(*form.right())
    with pytest.raises(InputMismatchError, match=r"x: shape, found \(2, 4\), wanted \(2, 3\)"):
        used.flatten((torch.randn(2, 4),), {})


@pytest.mark.parametrize("first", [False, True], ids=["at once", "after a right call"])
@pytest.mark.parametrize("nbytes", [0, 8])
def test_a_tensor_without_memory_for_its_elements_is_refused(nbytes: int, *, first: bool) -> None:
    """The engine would read past the end of the memory."""
    one = FORMS["one"]
    checker = one.checker()
    (right,), _ = one.right()
    if first:
        checker.flatten((right,), {})
    short = right.clone()
    short.untyped_storage().resize_(nbytes)
    with pytest.raises(InputMismatchError, match="freed, or is smaller than its shape"):
        checker.flatten((short,), {})


def test_a_nested_tensor_is_refused() -> None:
    one = FORMS["one"]
    (right,), _ = one.right()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([right])
    with pytest.raises(InputMismatchError, match=r"layout, found nested, wanted torch\.strided"):
        one.checker().flatten((nested,), {})
