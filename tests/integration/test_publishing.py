"""New weights beside running calls: which memory they take, and that no call sees a mixture."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from parts import (
    AT,
    NAMES,
    PARTS,
    SIZE,
    Callers,
    Inside,
    State,
    alive,
    answer,
    answered,
    commit,
    commit_some,
    over,
    state,
    undo,
    values,
    weights,
)
from torch import nn

import refitkit
from refitkit.builtin.aotinductor import native
from refitkit.builtin.aotinductor.native import Container, Library
from refitkit.protocols import SlotValue
from refitkit.testing.oracles import Storage

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from pathlib import Path

    from refitkit.builtin.aotinductor.publishing import Live, PublishingEngine

# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("keepable", [False, True])
def test_refits_keep_two_sets(
    keepable: bool,
    module: Any,
    engine: PublishingEngine,
    sets: list[list[Storage]],
    native_calls: Counter[str],
) -> None:
    for number in range(100):
        commit(engine, number, keepable=keepable)
        assert answer(module) == state(number)
        assert alive(sets) <= 2 * len(NAMES)
    assert len(sets) == 100
    assert engine.free_spare() == engine.nbytes
    assert alive(sets) == len(NAMES)
    assert native_calls["CreateWithDevice"] <= 2


@pytest.mark.usefixtures("no_collector")
def test_refits_through_the_pipeline_keep_two_sets(
    parts: refitkit.CompiledModule, sets: list[list[Storage]], native_calls: Counter[str]
) -> None:
    # What is imported at the first refit can leave an exception with the frames of the refit.
    refitkit.refit(parts, weights(1), inputs=(AT,)).undo()
    gc.collect()
    for number in range(100):
        result = refitkit.refit(parts, weights(number), inputs=(AT,) if number % 2 else None)
        if number % 10 == 0:
            result.undo()
    assert answered(parts(AT)) == state(99)
    del result
    parts.free_spare()
    assert alive(sets) == len(NAMES)
    assert native_calls["CreateWithDevice"] <= 3


@pytest.mark.usefixtures("no_collector")
def test_all_goes_with_the_module(
    parts_path: Path, sets: list[list[Storage]], native_calls: Counter[str]
) -> None:
    compiled = refitkit.load(parts_path)
    files: Any = compiled.opened.files  # type: ignore[attr-defined]
    folder = files.path
    for number in range(3):
        refitkit.refit(compiled, weights(number))
        answered(compiled(AT))
    sibling = compiled.opened.reopen()
    del compiled, files
    assert answer(sibling) == state(2)
    assert folder.exists()
    del sibling
    assert alive(sets) == 0
    assert native_calls["Delete"] == native_calls["CreateWithDevice"] > 0
    assert not folder.exists()


@pytest.mark.usefixtures("no_collector")
def test_siblings_leave_nothing(
    module: Any,
    engine: PublishingEngine,
    sets: list[list[Storage]],
    native_calls: Counter[str],
) -> None:
    commit(engine, 1000)
    for number in range(100):
        sibling = module.reopen()
        assert answer(sibling) == state(1000)
        commit(sibling.engines["model"], number)
        assert answer(sibling) == state(number)
        assert answer(module) == state(1000)
        del sibling
        assert alive(sets) <= 2 * len(NAMES)
    engine.free_spare()
    assert alive(sets) == len(NAMES)
    assert native_calls["CreateWithDevice"] - native_calls["Delete"] <= 4


def test_open_siblings_cost_no_weights(
    module: Any, sets: list[list[Storage]], native_calls: Counter[str]
) -> None:
    siblings = [module.reopen() for _ in range(100)]
    assert alive(sets) == len(NAMES)
    assert {answer(one) for one in siblings} == {state(0)}
    siblings.clear()
    assert native_calls["CreateWithDevice"] - native_calls["Delete"] <= 2


@pytest.mark.usefixtures("no_collector")
def test_calls_keep_neither_inputs_nor_outputs(module: Any) -> None:
    (kept,) = module.run((AT,), {})[:1]
    at = AT.clone()
    outputs = module.run((at,), {})
    storages = [Storage(one) for one in (at, *outputs)]
    del at, outputs
    assert all(one.expired() for one in storages)
    wrong = torch.tensor([0, 99])
    storages = [Storage(wrong)]
    with pytest.raises(refitkit.EngineError):
        module.run((wrong,), {})
    del wrong
    assert storages[0].expired()
    assert kept.shape == (PARTS, 2)


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class Mallinfo(ctypes.Structure):
    """What ``mallinfo2(3)`` returns."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def allocated() -> int:
    """Bytes that C and C++ code of this process has allocated and not freed."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found: Mallinfo = mallinfo()
    return int(found.uordblks + found.hblkhd)


# The least that a tensor takes is more than 100 bytes.
@pytest.mark.parametrize(("leak", "calls"), [("nothing", 20_000), ("in", 1000), ("out", 1000)])
def test_memory_of_calls(
    leak: str, calls: int, engine: PublishingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls need no more memory; a leak of a small tensor in each call would show."""
    run = Library.run

    def leaking(self: Library, handle: int, tensors: Any, stream: Any) -> Any:
        found = run(self, handle, tensors, stream)
        if leak != "nothing":
            native._handles_of(tensors if leak == "in" else found[0])
        return found

    monkeypatch.setattr(Library, "run", leaking)

    def after(calls: int) -> int:
        for _ in range(calls):
            engine.call([AT.clone()])
        return allocated()

    before = after(100)
    grown = after(calls) - before
    assert (grown > 100 * 1000) is (leak != "nothing"), f"grew by {grown} bytes"


# -- whose memory it is ---------------------------------------------------------------------------


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(9 * tensor.numel())[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


TAKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda one: one,
    "a parameter": nn.Parameter,
    "an inference tensor": _inference,
}
COPIED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not aligned": _offset,
    "a part of a larger tensor": _part,
    "turned": lambda one: one.mT.contiguous().mT,
    "expanded": lambda one: one[:1, :1].clone().expand(one.shape),
    "negated lazily": lambda one: torch._neg_view(-one),
}


@pytest.mark.parametrize("keepable", [True, False, None])
@pytest.mark.parametrize("name", [*TAKEN, *COPIED])
def test_a_value_that_may_be_kept_is_not_copied(
    name: str, keepable: bool | None, module: Any, engine: PublishingEngine
) -> None:
    asked: list[torch.Tensor] = []

    def may_keep(tensor: torch.Tensor) -> bool:
        asked.append(tensor)
        return bool(keepable)

    given = {**TAKEN, **COPIED}[name](torch.full((4, 3), 7.0))
    value = SlotValue(
        engine.slots["table"],
        "test",
        (),
        lambda: given,
        keepable=None if keepable is None else may_keep,
    )
    engine.stage_partial([value]).commit()
    is_kept = engine.live["table"].data_ptr() == given.data_ptr()
    assert is_kept is (name in TAKEN and keepable is True)
    assert all(one is given for one in asked)
    assert answer(module) == (0, 0, 0, 0, 7)
    assert not engine.read("table").requires_grad


def test_what_calls_write_is_copied(tally: refitkit.CompiledModule) -> None:
    engine: Any = tally.engines["model"]
    given = torch.full((SIZE,), 5.0)
    value = SlotValue(engine.slots["count"], "test", (), lambda: given, keepable=lambda _: True)
    engine.stage_partial([value]).commit()
    tally(torch.ones(4))
    assert tally.read("count").unique().tolist() == [6]
    assert given.unique().tolist() == [5]


def _over_later(engine: PublishingEngine, number: int) -> None:
    commit(engine, number)
    over(engine, number)


def _freed(engine: PublishingEngine, number: int) -> None:
    commit(engine, number)
    engine.free_spare()


WRITES: dict[str, Callable[[PublishingEngine, int], Any]] = {
    "refits": commit,
    "partial refits": lambda engine, number: commit_some(engine, number, NAMES[number % 3 :]),
    "rollbacks": lambda engine, number: commit(engine, number).rollback(),
    "undos": undo,
    "overwriting": over,
    "refits and overwriting": _over_later,
    "freed sets": _freed,
}


def writes(name: str, engine: PublishingEngine) -> None:
    """Refits of one kind, that write to all memory that they may write to."""
    for number in (20, 21, 22, 23):
        WRITES[name](engine, number)


@pytest.mark.parametrize("name", WRITES)
def test_what_the_engine_kept_is_never_written_to(name: str, engine: PublishingEngine) -> None:
    given = weights(3)
    engine.stage(values(engine, given, keepable=True)).commit()
    writes(name, engine)
    assert {one.unique().item() for one in given.values()} == {3}


def opened_sibling(when: str, module: Any, engine: PublishingEngine) -> Any:
    """A sibling that is opened in the middle of other work, which is then ended."""
    commit(engine, 1)
    commit(engine, 2)
    match when:
        case "overwritten":
            over(engine, 2)
        case "staged":
            staged = engine.stage_partial(values(engine, weights(3, NAMES[:2])))
        case "committed" | "undone":
            staged = commit_some(engine, 3, NAMES[:2])
    sibling = module.reopen()
    match when:
        case "staged":
            staged.commit()
        case "committed":
            staged.rollback()
        case "undone":
            engine.stage(values(engine, engine.previous())).commit()
    return sibling


@pytest.mark.parametrize("when", ["live", "overwritten", "staged", "committed", "undone"])
@pytest.mark.parametrize("name", WRITES)
def test_what_a_sibling_uses_is_never_written_to(
    name: str, when: str, module: Any, engine: PublishingEngine
) -> None:
    sibling = opened_sibling(when, module, engine)
    before = answer(sibling)
    writes(name, engine)
    assert answer(sibling) == before
    sibling = opened_sibling(when, module, engine)
    before = answer(module)
    writes(name, sibling.engines["model"])
    assert answer(module) == before


def addresses(engine: PublishingEngine) -> dict[str, int]:
    return {name: one.data_ptr() for name, one in engine.live.items()}


def test_two_sets_take_turns(engine: PublishingEngine) -> None:
    commit(engine, 1)
    first = addresses(engine)
    commit(engine, 2)
    second = addresses(engine)
    assert not {*first.values()} & {*second.values()}
    for number in range(3, 9):
        commit(engine, number)
        assert addresses(engine) == (first if number % 2 else second)


def test_an_undo_copies_nothing(module: Any, engine: PublishingEngine) -> None:
    commit(engine, 1)
    first = addresses(engine)
    kept = [engine.read("table")]  # so that no memory may be written to
    commit(engine, 2)
    kept.append(engine.read("table"))
    for number in (1, 2, 1):
        engine.stage(values(engine, engine.previous())).commit()
        assert (addresses(engine) == first) is (number == 1)
        assert answer(module) == state(number)


def test_overwriting_needs_no_memory(
    parts: refitkit.CompiledModule, engine: PublishingEngine, sets: list[list[Storage]]
) -> None:
    before = addresses(engine)
    for number in (1, 2):
        refitkit.refit(parts, weights(number), rollback=False, verify="none")
        assert addresses(engine) == before
        assert answered(parts(AT)) == state(number)
    assert not sets


# -- running calls --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
def test_a_set_goes_with_the_last_call_that_uses_it(
    module: Any, engine: PublishingEngine, inside: type[Inside]
) -> None:
    commit(engine, 1)
    call = inside(lambda: answer(module))
    storages = [Storage(tensor) for tensor in engine.live.values()]
    container = weakref.ref(engine.current.container)
    for number in (2, 3, 4):  # the set of the call is not the spare one any more
        commit(engine, number)
    assert not any(one.expired() for one in storages)
    assert container() is not None
    assert call.finish() == state(1)
    assert container() is None
    assert not any(one.expired() for one in storages)  # the next refit writes there
    engine.free_spare()
    assert all(one.expired() for one in storages)
    assert answer(module) == state(4)


def test_a_set_in_use_is_no_memory_for_new_values(
    module: Any, engine: PublishingEngine, inside: type[Inside]
) -> None:
    """Also if a call uses only a part of the spare set, through an older one."""
    commit(engine, 1)
    call = inside(lambda: answer(module))
    commit_some(engine, 2, ["parts.0"])
    commit(engine, 3)
    commit(engine, 4)
    assert call.finish() == state(1)
    assert answer(module) == state(4)


def test_what_was_read_stays_as_it_was(engine: PublishingEngine) -> None:
    commit(engine, 1)
    read = engine.read("parts.0")
    for number in (2, 3, 4):
        commit(engine, number)
    assert read.unique().tolist() == [1]


def test_a_staged_set_stays_while_another_one_is_staged(
    module: Any, engine: PublishingEngine
) -> None:
    commit(engine, 1)
    commit(engine, 2)
    staged = engine.stage(values(engine, weights(3)))
    engine.stage(values(engine, weights(4))).discard()
    staged.commit()
    assert answer(module) == state(3)


def test_a_gpu_may_use_weights_after_the_call(
    module: Any, engine: PublishingEngine, inside: type[Inside]
) -> None:
    """An event says how far it is: here one that a test ends."""

    class Event:
        done = False

        def query(self) -> bool:
            # another thread may look for memory now
            assert self.done or any(used is tensors for used in engine._library.busy())
            return self.done

    event = Event()
    commit(engine, 1)
    engine.current.container.events[0] = event
    tensors = engine.live
    commit(engine, 2)
    commit(engine, 3)
    assert {one.data_ptr() for one in tensors.values()}.isdisjoint(
        one.data_ptr() for one in engine.live.values()
    )
    assert tensors["parts.0"].unique().tolist() == [1]
    event.done = True
    spare = engine.live
    commit(engine, 4)
    commit(engine, 5)
    assert engine._library.busy() == []
    assert engine.live["parts.0"] is spare["parts.0"]


@pytest.mark.usefixtures("no_collector")
def test_a_library_goes_after_the_last_work_of_a_gpu(
    parts_path: Path, sets: list[list[Storage]]
) -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    engine: Any = refitkit.load(parts_path).engines["model"]
    engine.current.container.events[0] = event = Event()
    del engine
    assert event.done
    assert alive(sets) == 0


def test_a_container_that_is_used_again_is_not_emptied(
    module: Any, engine: PublishingEngine
) -> None:
    """Another thread may empty and fill it while this one looks whether it is in use."""
    library, again = engine._library, list[Container]()

    class Event:
        is_asked = False

        def query(self) -> bool:
            if not self.is_asked:
                self.is_asked = True
                library.reap()
                again.append(Container(library, {**engine.live, **weights(5)}))
            return True

    commit(engine, 1)
    engine.current.container.events[0] = Event()
    commit(engine, 2)
    commit(engine, 3)
    library.reap()
    commit(engine, 4)
    (container,) = again
    assert answered(container.run([AT])[0]) == state(5)  # type: ignore[arg-type]
    assert {one.unique().item() for one in container.held().values()} == {5}


# -- calls beside refits --------------------------------------------------------------------------


class Steps:
    """Refits of an engine that others call, and the weights that are live after each."""

    def __init__(self, engine: PublishingEngine, callers: Callers) -> None:
        self.now = dict.fromkeys(NAMES, 0.0)
        self._engine, self._callers = engine, callers

    def full(self, number: int) -> None:
        commit(self._engine, number)
        self.now = dict.fromkeys(NAMES, number)

    def kept(self, number: int) -> None:
        commit(self._engine, number, keepable=True)
        self.now = dict.fromkeys(NAMES, number)

    def partial(self, number: int) -> None:
        names = {NAMES[number % 5], NAMES[number * 3 % 5]}
        commit_some(self._engine, number, list(names))
        self.now.update(dict.fromkeys(names, number))

    def undone(self, number: int) -> None:
        undo(self._engine, number, self._callers.wait)

    def rolled_back(self, number: int) -> None:
        staged = commit(self._engine, number)
        self._callers.wait()
        staged.rollback()

    def mixed(self, number: int) -> None:
        kinds = ["full", "partial", "undone", "partial", "rolled_back", "kept", "partial"]
        getattr(self, kinds[number % len(kinds)])(number)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("kind", ["full", "kept", "partial", "undone", "rolled_back", "mixed"])
def test_calls_beside_refits_see_whole_sets(
    kind: str, models: int, module: Any, engine: PublishingEngine
) -> None:
    """Each call sees one set that was live, and a thread's calls see sets in their order."""
    engine.serve(models)
    order: dict[State, int] = {answer(module): 0}
    publish = engine.publish

    def publishing(new: Live) -> None:
        # noted before it is live; a set can be live several times
        found = tuple(float(new.weights.tensors[name].view(-1)[0]) for name in NAMES)
        order[found] = len(order)
        publish(new)

    engine.publish = publishing  # type: ignore[method-assign]
    with Callers(*[lambda: answer(module)] * 2) as callers:
        steps = Steps(engine, callers)
        for number in callers.steps(60):
            getattr(steps, kind)(number)
            assert answer(module) == tuple(steps.now.values())
    found = callers.found
    assert {*found[0], *found[1]} <= order.keys()
    assert len({*found[0], *found[1]}) > 1
    if kind in ("full", "kept", "partial"):
        for places in [[order[one] for one in answers] for answers in found]:
            assert places == sorted(places)


def test_calls_beside_refits_of_the_pipeline(
    parts: refitkit.CompiledModule, engine: PublishingEngine
) -> None:
    engine.serve(2)
    refitkit.refit(parts, weights(0))
    committed = {state(0)}

    with Callers(*[lambda: answered(parts(AT))] * 2) as callers:
        for number in callers.steps(20):
            callers.wait()
            committed.update([state(number), (*state(number)[:-1], 0.5)])
            refitkit.refit(parts, weights(number), inputs=(AT,)).undo()
            refitkit.refit(parts, weights(number))
            refitkit.refit(parts, {"table": torch.full((4, 3), 0.5)}, partial=True).undo()
            with pytest.raises(refitkit.VerificationError):
                refitkit.refit(parts, weights(-number), inputs=(AT,), reference=WRONG)
            assert answered(parts(AT)) == state(number)
    found = callers.found
    assert {*found[0], *found[1]} <= committed
    assert len({*found[0], *found[1]}) > 1


WRONG = (torch.full((PARTS, 2), 0.25), torch.full((2, 3), 0.25))


def test_siblings_are_refitted_side_by_side(module: Any) -> None:
    """They share a library, and containers that wait for weights."""

    def refits(sibling: Any) -> Callable[[], None]:
        engine, numbers = sibling.engines["model"], iter(range(1, 1 << 30))

        def refit() -> None:
            number = next(numbers)
            commit(engine, number)
            undo(engine, -number)
            assert answer(sibling) == state(number)
            commit_some(engine, -number, NAMES[:2])
            assert answer(sibling) == (-number, -number, number, number, number)

        return refit

    with Callers(*[refits(module.reopen()) for _ in range(3)]) as callers:
        for number in callers.steps(20):
            one = module.reopen()
            commit(one.engines["model"], number)
            assert answer(one) == state(number)
