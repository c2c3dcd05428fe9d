"""Refits past the refitter, on real engines: equal to TensorRT's own, bit for bit."""

from __future__ import annotations

import threading
from random import Random
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch

import refitkit
from refitkit.builtin.torch_tensorrt.direct import moves, route
from refitkit.builtin.torch_tensorrt.direct.folds import Fold, FoldsAtOnce
from refitkit.builtin.torch_tensorrt.direct.places import Place
from tests.device_faults import DeviceFaults
from tests.gpu import trt_models
from tests.gpu.trt_helpers import compiled_by_us, export, needs_trt, options_for, same
from tests.gpu.trt_models import inputs_of, randomized
from tests.unit.builtin.torch_tensorrt.test_moves import value_and_place

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_trt
KINDS: list[Callable[[], torch.nn.Module]] = [trt_models.Convolutions, trt_models.Words]
DIRECT = refitkit.Pipeline()
BY_TENSORRT = refitkit.Pipeline({"direct": False})


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest) -> Any:
    """A kind of model, and two modules of one program: written directly, and by TensorRT."""
    kind = request.param
    program = export(randomized(kind, 0), inputs_of(kind))
    return kind, *(
        one.compile(program, "torch_tensorrt", options_for("python"), prove=False)
        for one in (DIRECT, BY_TENSORRT)
    )


def test_answers_are_those_of_the_refitter(pair: Any) -> None:
    kind, direct, other = pair
    x = inputs_of(kind)
    for seed in (1, 2, 0, 1):
        state = randomized(kind, seed).state_dict()
        DIRECT.refit(direct, state)
        BY_TENSORRT.refit(other, state)
        assert same(direct(*x), other(*x))


def test_undo_and_copies_answer_as_before(pair: Any) -> None:
    kind, direct, _ = pair
    x = inputs_of(kind)
    DIRECT.refit(direct, randomized(kind, 1).state_dict())
    before = direct(*x)
    result = DIRECT.refit(direct, randomized(kind, 2).state_dict())
    after = direct(*x)
    assert not same(before, after)
    copy = DIRECT.refit(direct, randomized(kind, 3).state_dict(), copy=True).module
    assert same(direct(*x), after)
    assert not same(copy(*x), after)
    result.undo()
    assert same(direct(*x), before)


def test_a_copy_needs_no_proof(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, direct, other = pair
    x = inputs_of(kind)
    DIRECT.refit(direct, randomized(kind, 1).state_dict())
    monkeypatch.setattr(route, "learn", None)
    state = randomized(kind, 2).state_dict()
    result = DIRECT.refit(direct, state, copy=True)
    assert {(one.name, one.why) for one in result.report.routes} == {("direct", "")}
    BY_TENSORRT.refit(other, state)
    assert same(result.module(*x), other(*x))


def test_a_layout_is_found_for_a_transformer() -> None:
    compiled = compiled_by_us(trt_models.Words)
    routes = DIRECT.refit(compiled, randomized(trt_models.Words, 1).state_dict()).report.routes
    assert {(route.name, route.why) for route in routes if route.name != "torch"} == {
        ("direct", "")
    }


def test_streams_and_calls_beside_refits_are_never_torn() -> None:
    """Each answer is one of two, on two streams, while weights go to and fro."""
    kind = trt_models.Words
    compiled = compiled_by_us(kind)
    x = inputs_of(kind)
    states = [randomized(kind, seed).state_dict() for seed in (1, 2)]
    wanted = []
    for state in states:
        DIRECT.refit(compiled, state)
        wanted.append(compiled(*x).clone())
    streams: list[Any] = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    for number in range(100):
        answers = []
        for stream in streams:
            with torch.cuda.stream(stream):
                answers += [compiled(*x) for _ in range(5)]
        DIRECT.refit(compiled, states[number % 2])
        with torch.cuda.stream(streams[0]):
            answers.append(compiled(*x))
        torch.cuda.synchronize()
        assert all(any(same(one, other) for other in wanted) for one in answers)
        assert same(answers[-1], wanted[number % 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_move_what_torch_moves(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    rng = Random(0)  # noqa: S311
    for _ in range(20):
        mover = moves.Mover(device)
        found, wanted = (torch.zeros(1 << 22, dtype=torch.uint8, device=device) for _ in "ab")
        kept, start = [], 3
        for _ in range(5):
            sizes = rng.choices([1, 2, 3, 9, 64, 65, 130], k=2) + rng.choices([1, 3], k=2)
            value, place, start = value_and_place(rng, dtype, start, sizes)
            if start * value.element_size() > 1 << 22:
                break
            value = value.to(device)
            name = str(len(kept))
            way = mover.way(name, place, value)
            if way is None:
                value = value.contiguous().view(-1)
                way = mover.way(name, place, value)
            assert way is not None
            moves._copy(wanted, place, value)
            mover.add(found, way, value)
            kept.append(value)
        mover.finish(found)
        assert mover.kernels
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_folds_as_torch_does(dtype: torch.dtype) -> None:
    device, count = torch.device("cuda", 0), 100_000
    g = torch.Generator(device).manual_seed(0)
    powers = torch.randint(-12, 13, (5, count), generator=g, device=device)
    run = (torch.rand(5, count, generator=g, device=device) + 0.5) * 2.0**powers
    run[[1, 2], ::2] *= -1
    run = run.to(dtype).flatten()
    fold = Fold("w", "b", "m", "v", "e")
    values = dict(zip(fold.names, run.split(count), strict=True))
    places = {"w": Place(0, ((count, 2),)), "b": Place(1, ((count, 2),))}
    found, wanted = (torch.zeros(2 * count, dtype=dtype, device=device) for _ in "ab")
    folding = FoldsAtOnce([fold], places, values, {dtype: run}, moves._kernels())
    for _ in range(2):  # the second launch is another one
        found.zero_()
        folding.write({dtype: found})
        assert folding._launches[dtype]._kernel is not None
        FoldsAtOnce([fold], places, values, {dtype: run}).write({dtype: wanted})
        assert same(found, wanted)
    assert wanted.isfinite().float().mean() > 0.9


class Refitting:
    """Refits a module again and again, until the context ends."""

    def __init__(self, module: Any, states: list[Any]) -> None:
        self._module, self._states = module, states
        self._stop, self.refits = threading.Event(), 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            DIRECT.refit(self._module, self._states[self.refits % 2])
            self.refits += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_calls_on_several_streams_are_never_torn(pair: Any) -> None:
    kind, direct, _ = pair
    x = inputs_of(kind)
    states = [state_on(randomized(kind, seed)) for seed in (1, 2)]
    right = []
    for state in states:
        DIRECT.refit(direct, state)
        right.append(direct(*x).clone())
    streams = [torch.cuda.Stream() for _ in range(4)]
    answers = []
    with Refitting(direct, states) as refitting:
        while len(answers) < 400 or refitting.refits < 10:
            with torch.cuda.stream(streams[len(answers) % 4]):
                answers.append(direct(*x).clone())
    torch.cuda.synchronize()
    assert all(same(answer, right[0]) or same(answer, right[1]) for answer in answers)
    assert {same(answer, right[0]) for answer in answers} == {True, False}


def test_replays_of_a_graph_are_never_torn(pair: Any) -> None:
    kind, direct, _ = pair
    x = inputs_of(kind)
    states = [state_on(randomized(kind, seed)) for seed in (1, 2)]
    right = []
    ((_, engine),) = (one for one in direct.engines.items() if hasattr(one[1], "handle"))
    DIRECT.refit(direct, states[0])
    context = engine.handle.cuda_engine().create_execution_context()
    output, stream, graph = (
        torch.empty_like(direct(*x)),
        torch.cuda.Stream(),
        torch.cuda.CUDAGraph(),
    )
    names = [context.engine.get_tensor_name(i) for i in range(context.engine.num_io_tensors)]
    for name, value in zip(names, (*x, output), strict=True):
        context.set_tensor_address(name, value.data_ptr())
    with torch.cuda.stream(stream):
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            assert context.execute_async_v3(stream.cuda_stream)
    for state in states:
        DIRECT.refit(direct, state)
        right.append(direct(*x).clone())
    answers = []
    with Refitting(direct, states) as refitting, torch.cuda.stream(stream):
        while len(answers) < 400 or refitting.refits < 10:
            direct.run_as_call(graph.replay)
            answers.append(output.clone())
    torch.cuda.synchronize()
    assert all(same(answer, right[0]) or same(answer, right[1]) for answer in answers)
    assert {same(answer, right[0]) for answer in answers} == {True, False}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_refit_with_a_fault_is_done_or_was_never_there(pair: Any, *, after: bool) -> None:
    """Each call of torch, Triton and TensorRT fails in turn; 250 of them, if there are more."""
    kind, direct, _ = pair
    x = inputs_of(kind)
    states = [state_on(randomized(kind, seed)) for seed in (1, 2)]
    right = []
    for number in (0, 1, 0, 1):
        DIRECT.refit(direct, states[number])
        right.append(direct(*x).clone())
    with DeviceFaults(after=after) as counted:
        DIRECT.refit(direct, states[1])
    calls, refused, lost = counted.calls, 0, 0
    for at in range(0, calls, max(1, calls // 250)):
        before = direct.version
        with DeviceFaults(at, after=after) as faults:
            try:
                DIRECT.refit(direct, states[0])
            except refitkit.ModuleLostError:
                # a failed wait for the commit: nobody knows what the device holds
                lost += 1
                with pytest.raises(refitkit.ModuleLostError):
                    direct(*x)
                direct.gate.heal()  # this device is well
            except (refitkit.RefitError, RuntimeError):
                refused += 1
                assert direct.version == before, faults.failed
        if not faults.failed:  # the counted refit made more calls
            break
        answer = direct(*x)
        assert any(same(answer, one) for one in right), faults.failed
        if not lost:
            assert same(answer, right[0 if direct.version > before else 1]), faults.failed
        lost = 0
        for number in (0, 1):
            DIRECT.refit(direct, states[number])
            assert same(direct(*x), right[number]), faults.failed
    assert refused > calls // 4 if calls < 250 else refused > 60


def state_on(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state_dict on the device that nobody changes."""
    return {name: value.detach().clone().cuda() for name, value in module.state_dict().items()}
