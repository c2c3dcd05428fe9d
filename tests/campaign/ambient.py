"""Every verb in every state that a caller can have set torch to, and three refits afterwards.

``make test`` runs a slice. The whole campaign, all modes with all verbs::

    python -m tests.campaign.ambient
    python -m tests.campaign.ambient --backend tensorrt_network --modes inference fake

The refits come after the mode has ended. All that they give is compared bit by bit with the same
history without the mode. Three, as the two sets of weights of an engine take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

State: TypeAlias = "dict[str, torch.Tensor]"
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Model(torch.nn.Module):
    """Of what refits treat differently, one of each.

    Weights, a view of one, a buffer that calls write, and one that no state_dict holds. Its
    ``ones`` and its quotient of integers have the default dtype of whoever runs them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.top = self.a.weight.data[:3]
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("steps", torch.arange(6))
        self.register_buffer("table", torch.arange(6.0) / 7, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls.add_(1)
        y = self.a(x) + self.table + torch.ones(6) * 0.3 + self.steps / 3
        return self.b(y.relu()) + (x @ self.top.t()).sum(), self.calls + 0


class Plain(torch.nn.Module):
    """For TensorRT, whose engines have no state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x).relu() + torch.ones(6) * 0.3)
        return y


MODELS: dict[str, type[torch.nn.Module]] = {"aotinductor": Model, "tensorrt_network": Plain}


def state(backend: str, seed: int) -> State:
    """Weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t + seed
        for name, t in MODELS[backend]().state_dict().items()
    }


def program(backend: str) -> torch.export.ExportedProgram:
    """The model with weights of the seed 0."""
    model = MODELS[backend]().eval()
    model.load_state_dict(state(backend, 0))
    return torch.export.export(model, (X,))


def make_file(backend: str, folder: Path, mode: str = "none") -> Path:
    """A saved module, compiled in a mode."""
    options = {} if backend == "aotinductor" else {"min_block_size": 1}
    exported, path = program(backend), folder / f"{backend}.refit"
    within(mode, lambda: refitkit.compile(exported, backend, options, prove=False).save(path))
    return path


# -- modes ------------------------------------------------------------------------------------


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    """Have a setting of torch for a while."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


class Doubling(TorchFunctionMode):
    """Spoils all floats that come out of functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        is_float = isinstance(found, torch.Tensor) and found.is_floating_point()
        return found * 2 if is_float else found


class Moving(TorchDispatchMode):
    """Spoils all copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func in {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}:
            return found + 1
        return found.add_(1) if func is torch.ops.aten.copy_.default else found


@contextmanager
def deterministic() -> Iterator[None]:
    with setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ):
        yield


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


@contextmanager
def tensor_type() -> Iterator[None]:
    with default_dtype(torch.float32):
        torch.set_default_tensor_type(torch.DoubleTensor)
        yield


@contextmanager
def hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        yield


IN_EVERYTHING = (
    *("inference", "autocast", "meta", "float64"),
    *("function mode", "dispatch mode", "fake"),
)


@contextmanager
def everything() -> Iterator[None]:
    with ExitStack() as stack:
        for name in IN_EVERYTHING:
            stack.enter_context(CONTEXTS[name]())
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default device": default_device,
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "tensor type": tensor_type,
    "fake": FakeTensorMode,
    "fake, real allowed": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "functional": FunctionalTensorMode,
    "function mode": Doubling,
    "dispatch mode": Moving,
    "deterministic": deterministic,
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 2),
    "denormals": lambda: setting(lambda: False, torch.set_flush_denormal, True),
    "saved tensors": hooks,
    "anomaly": torch.autograd.detect_anomaly,
    "everything": everything,
}


class Around(torch.nn.Module):
    """A model that does something while it is called."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.do()
        return x + 1


def after(do: Callable[[], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(x: torch.Tensor) -> torch.Tensor:
        do()
        return (x + 1).sum()

    return function


def _in_a_thread(do: Callable[[], object]) -> None:
    def run() -> None:
        with everything():
            do()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


TRACERS: dict[str, Callable[[Callable[[], object]], object]] = {
    "vmap": lambda do: torch.vmap(after(do))(X),
    "grad": lambda do: torch.func.grad(after(do))(X),
    "vmap of grad": lambda do: torch.vmap(torch.func.grad(after(do)))(X),
    "functionalize": lambda do: torch.func.functionalize(after(do))(X),
    "make_fx": lambda do: make_fx(after(do))(X),
    "make_fx, fake": lambda do: make_fx(after(do), tracing_mode="fake")(X),
    "make_fx, before": lambda do: make_fx(after(do), pre_dispatch=True)(X),
    "jit.trace": lambda do: torch.jit.trace(after(do), (X,), check_trace=False),
    "export": lambda do: torch.export.export(Around(do), (X,)),
    "compile": lambda do: torch.compile(after(do), backend="eager")(X),
    "thread": _in_a_thread,
}
MODES = (*CONTEXTS, *TRACERS)


def within(mode: str, do: Callable[[], object]) -> None:
    """Do something once, in a mode."""
    if mode in CONTEXTS:
        with CONTEXTS[mode]():
            do()
        return
    times = iter([do])

    def once() -> None:  # tracers may call a function several times
        next(times, bool)()

    TRACERS[mode](once)


def facts() -> tuple[Any, ...]:
    """What this thread has torch set to."""
    c = torch._C
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        [id(c._get_function_stack_at(i)) for i in range(c._len_torch_function_stack())],
        [id(mode) for mode in _get_current_dispatch_mode_stack()],
        c._functorch.get_dynamic_layer_stack_depth(),
        c._get_tracing_state(),
    )


# -- verbs ------------------------------------------------------------------------------------


class World:
    """A module with weights of the seed 0, after two refits.

    Attributes:
        module: It.
    """

    def __init__(self, backend: str, source: Path, folder: Path) -> None:
        self.backend, self.source, self.target = backend, source, folder / "target.refit"
        self.pipeline = refitkit.Pipeline({"keep_versions": 3})
        self.module = self.pipeline.load(source)
        self.second = self.pipeline.load(source)
        self.states = [state(backend, seed) for seed in range(6)]
        self.plan = self.module.plan
        self.program = program(backend) if backend == "aotinductor" else None
        self.results = [self.pipeline.refit(self.module, self.states[n]) for n in (1, 0)]

    @property
    def inputs(self) -> Any:
        return (X,) if self.backend == "aotinductor" else None


def _partial(world: World) -> None:
    some = {"a.weight": world.states[2]["a.weight"]}
    world.pipeline.refit(world.module, some, partial=True)


def _pairs(world: World) -> list[Any]:
    return [(world.module, world.states[2]), (world.second, world.states[2])]


def _load(world: World) -> None:
    world.module = world.pipeline.load(world.source)


def _compile(world: World) -> None:
    assert world.program is not None
    world.module = world.pipeline.compile(world.program)


def _copy(world: World) -> None:
    world.module = world.pipeline.copy(world.module)


def _save(world: World) -> None:
    world.module.save(world.target)
    world.module = world.pipeline.load(world.target)


def _plan(world: World) -> None:
    assert world.program is not None
    world.plan = world.pipeline.plan(world.program, world.module)


def _own_plan(world: World) -> None:
    assert world.module.plan is not None
    world.plan = refitkit.RefitPlan.from_bytes(world.module.plan.to_bytes())


def _materialize(world: World) -> None:
    assert world.module.plan is not None
    values = world.module.plan.materialize(world.states[2])
    for name in world.states[3].keys() & set(values.get("model", {})):
        world.states[3][name] = values["model"][name]


def _own_state(world: World) -> None:
    made = {n: torch.full(t.shape, 1 / 3) for n, t in world.states[2].items() if n != "steps"}
    world.pipeline.refit(world.module, made, partial=True)


def _merge(world: World) -> None:
    other = {**world.states[3], **{n: t for n, t in world.states[2].items() if n == "steps"}}
    merge = refitkit.WeightedAverage([(world.states[2], 0.25), (other, 0.75)])
    world.pipeline.refit(world.module, merge)


def _stream(world: World) -> None:
    world.pipeline.refit(world.module, iter(world.states[2].items()))


VERBS: dict[str, Callable[[World], object]] = {
    "nothing": lambda world: None,
    "call": lambda world: world.module(X),
    "load": _load,
    "compile": _compile,
    "plan": _plan,
    "plan bytes": _own_plan,
    "materialize": _materialize,
    "read": lambda world: world.module.read(world.module.slots[0].name),
    "save and load": _save,
    "refit": lambda w: w.pipeline.refit(w.module, w.states[2], inputs=w.inputs),
    "refit with weights of the mode": _own_state,
    "refit with a merge": _merge,
    "refit from a stream": _stream,
    "delta": lambda w: w.pipeline.refit(w.module, w.states[2], delta=True),
    "partial": _partial,
    "no rollback": lambda w: w.pipeline.refit(w.module, w.states[2], rollback=False),
    "refit_all": lambda world: world.pipeline.refit_all(_pairs(world)),
    "report": lambda world: str(world.results[-1].report),
    "undo": lambda world: world.results[-1].undo(),
    "restore": lambda world: world.pipeline.restore(world.module, 0),
    "copy": _copy,
    "verify": lambda w: w.pipeline.verify(w.module, w.states[0], inputs=w.inputs),
    "diff": lambda world: world.pipeline.diff(world.module, world.states[2]),
    "free_spare": lambda world: world.module.free_spare(),
    "forget": lambda world: world.module.forget(),
    "warm": lambda world: world.module.warm(),
}
ONLY_AOTINDUCTOR = {"call", "compile", "plan", "no rollback"}
MAY_FAIL = {"call", "refit with weights of the mode"}
"""Where the mode makes tensors that are no weights or inputs: fakes, and of other dtypes."""


# -- histories --------------------------------------------------------------------------------


def bits(value: torch.Tensor) -> tuple[Any, ...]:
    """All that tells a tensor from another one."""
    assert not value.is_inference()
    data = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(value.dtype), tuple(value.shape), str(value.device), bytes(data.numpy())


def history(world: World) -> Iterator[tuple[str, Any]]:
    """What a module gives in three refits, and all that follows."""
    for number in (3, 4, 5):
        weights = world.states[number]
        world.pipeline.refit(world.module, weights, inputs=world.inputs, plan=world.plan)
        yield from _shown(world, f"refit {number}")
    result = world.pipeline.refit(world.module, world.states[3], delta=True)
    yield from _shown(world, "delta")
    result.undo()
    yield from _shown(world, "undo")
    world.module.save(world.target)
    world.module = world.pipeline.load(world.target)
    yield from _shown(world, "saved")
    yield from _shown(world, "saved")


def _shown(world: World, when: str) -> Iterator[tuple[str, Any]]:
    if world.backend == "aotinductor":
        for number, output in enumerate(world.module(X)):
            yield f"output {number} after {when}", bits(output)
    for slot in world.module.slots:
        yield f"{slot.name} after {when}", bits(world.module.read(slot.name, slot.engine))


@dataclass
class Campaign:
    """Verbs in modes.

    Attributes:
        outcomes: How many verbs ended how.
        problems: What differs from the history without the mode.
    """

    backend: str
    source: Path
    folder: Path

    def __post_init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self._wanted = cache(self._without)

    def _without(self, verb: str) -> dict[str, Any]:
        world = World(self.backend, self.source, self.folder)
        VERBS[verb](world)
        return dict(history(world))

    def run(self, mode: str, verb: str) -> None:
        """Run a verb in a mode, and refits after it."""
        world = World(self.backend, self.source, self.folder)
        ended: list[str] = []

        def do() -> None:
            before = None if mode == "compile" else facts()
            try:
                VERBS[verb](world)
            except Exception as exc:  # noqa: BLE001 - reported
                ended.append(f"{type(exc).__name__} in {mode}")
                if verb not in MAY_FAIL or not isinstance(exc, refitkit.RefitError):
                    self.problems.append(f"{verb} in {mode}: {type(exc).__name__}: {exc}"[:600])
            if before is not None and facts() != before:
                self.problems.append(f"{verb} in {mode}: modes are not as they were")

        try:
            within(mode, do)
        except Exception as exc:  # noqa: BLE001 - reported
            self.problems.append(f"around {verb} in {mode}: {type(exc).__name__}: {exc}"[:600])
            return
        outcome = ended[0] if ended else "done"
        self.outcomes[outcome] += 1
        try:
            found = dict(history(world))
        except Exception as exc:  # noqa: BLE001 - reported
            self.problems.append(f"after {verb} in {mode}: {type(exc).__name__}: {exc}"[:600])
            return
        wanted = self._wanted("nothing" if ended else verb)
        wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if wrong:
            self.problems.append(f"after {verb} in {mode}: {', '.join(wrong[:4])} differ")


def main() -> int:
    """Run the whole campaign."""
    parser = argparse.ArgumentParser(description="Run every verb in every mode of torch.")
    parser.add_argument("--backend", choices=MODELS, default="aotinductor")
    parser.add_argument("--modes", nargs="*", default=MODES, help=", ".join(MODES))
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), help=", ".join(VERBS))
    given = parser.parse_args()
    only = set(VERBS) if given.backend == "aotinductor" else set(VERBS) - ONLY_AOTINDUCTOR
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(given.backend, make_file(given.backend, Path(folder)), Path(folder))
        for verb in [verb for verb in given.verbs if verb in only]:
            campaign.outcomes.clear()
            campaign.problems.clear()
            for mode in given.modes:
                campaign.run(mode, verb)
            print(verb, dict(campaign.outcomes), f"{len(campaign.problems)} problems", flush=True)  # noqa: T201
            for problem in campaign.problems:
                print("  ", problem.replace("\n", " "))  # noqa: T201
            failed += len(campaign.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
