"""The engine: one set of weights that calls use, and new ones beside it.

A ``WeightSet`` never changes, and OpenVINO compiles the model for it. A refit makes another set
while calls go on, and its commit is one assignment. A call takes the live set once, at its
beginning, and ends on it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from refitkit import EngineError, Problem, UnsupportedTargetError, WeightMismatchError
from refitkit.errors import raised_as
from refitkit.model import EngineMemory, Slot

from refitkit_openvino.graph import load_openvino

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.protocols import SlotValue

    from refitkit_openvino.graph import Graph

ENGINE = "model"
"""Name of the only engine of a module."""


class Runner:
    """A model whose inputs are the weights and the inputs of a call."""

    def __init__(self, graph: Graph) -> None:
        """Read a model.

        Raises:
            UnsupportedTargetError: The model and its description are of different programs.
        """
        self.manifest = graph.manifest
        self.slots = {slot.name: slot for slot in graph.manifest.slots}
        self._core = load_openvino().Core()
        self._model = self._core.read_model(graph.xml, graph.constants)
        found = {one.get_friendly_name() for one in self._model.get_parameters()}
        if missing := sorted(self.slots.keys() - found):
            problems = [Problem(name, "no input of the model") for name in missing]
            raise UnsupportedTargetError("The model lacks weights.", problems=problems)
        self._shared = None if graph.manifest.options.weights == "constants" else self._compile({})

    def compiled(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """Return a compiled model for some weights, which are its constants or still inputs."""
        return self._shared or self._compile(weights)

    def _compile(self, constants: Mapping[str, torch.Tensor]) -> Any:
        ov, model = load_openvino(), self._model.clone()
        for parameter in model.get_parameters():
            name, kind = parameter.get_friendly_name(), parameter.get_element_type()
            if name in constants:
                constant = ov.op.Constant(lent(constants[name], kind))
                parameter.output(0).replace(constant.output(0))
                model.remove_parameter(parameter)
        return self._core.compile_model(model, "CPU", self.manifest.options.properties())


class WeightSet:
    """Weights that never change, and what runs on them."""

    def __init__(self, runner: Runner, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compile a model for weights.

        Args:
            runner: The model.
            tensors: One contiguous tensor for each slot, read-only.

        Raises:
            EngineError: OpenVINO refused them.
        """
        self.tensors = tensors
        self._manifest = runner.manifest
        with raised_as(EngineError, "OpenVINO cannot compile the model"):
            self._compiled = runner.compiled(tensors)
        self._ports = {one.get_node().get_friendly_name(): one for one in self._compiled.inputs}
        self._idle: deque[Any] = deque()

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs for some inputs. Several threads may call it.

        Raises:
            EngineError: OpenVINO failed. The module is unharmed.
        """
        hint = "Are values of the inputs in range, such as indices? The module is unharmed."
        with raised_as(EngineError, "OpenVINO failed", hint=hint):
            # A request serves one call at a time, so calls that run at once have one each.
            try:
                request = self._idle.pop()
            except IndexError:
                request = self._compiled.create_infer_request()
                self._bind(request, self.tensors)
            self._bind(
                request, {s.name: v for s, v in zip(self._manifest.inputs, inputs, strict=True)}
            )
            request.infer()
            outputs = enumerate(self._manifest.outputs)
            answer = [_copied(request.get_output_tensor(n).data, one.dtype) for n, one in outputs]
        self._idle.append(request)
        return answer

    def _bind(self, request: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have a request read tensors. Those that are no inputs are constants, or unused."""
        for name in tensors.keys() & self._ports.keys():
            port = self._ports[name]
            request.set_tensor(port, lent(tensors[name], port.get_element_type()))


def lent(value: torch.Tensor, kind: Any) -> Any:
    """Return a tensor of OpenVINO on the memory of a contiguous tensor."""
    ov = load_openvino()
    return ov.Tensor(as_bytes(value).numpy(), ov.Shape(list(value.shape)), kind)


def _copied(array: Any, dtype: str) -> torch.Tensor:
    """Return a copy of an output. OpenVINO lends its own memory, which the next call changes."""
    # NumPy has no bfloat16, so bytes are copied.
    found = torch.empty(array.shape, dtype=getattr(torch, dtype))
    as_bytes(found).numpy()[:] = array.reshape(-1).view("uint8")
    return found


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor, as a view."""
    return value.reshape(-1).view(torch.uint8)


class State(NamedTuple):
    """The weights that calls use, and those from before the last commit."""

    live: WeightSet
    previous: WeightSet | None = None


class OpenVINOEngine:
    """The engine; see ``refitkit.protocols.Engine``."""

    def __init__(self, runner: Runner, live: WeightSet) -> None:
        """Serve from a set of weights.

        Args:
            runner: The model.
            live: The weights.
        """
        self.runner = runner
        self.state = State(live)

    @property
    def name(self) -> str:
        """Name of the engine."""
        return ENGINE

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights, by FQN."""
        return self.runner.slots

    @property
    def memory(self) -> EngineMemory:
        """The old weights stay in memory, beside the live ones."""
        total = sum(slot.nbytes for slot in self.slots.values())
        return EngineMemory(engine=ENGINE, kind="inactive-buffer", bytes=total)

    # -- new weights --------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedWeights:
        """Copy new values of all slots; see ``refitkit.protocols.Engine``."""
        given = {value.slot.name for value in values}
        return self._staged(values, [name for name in self.slots if name not in given])

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedWeights:
        """Copy new values of some slots; see ``refitkit.protocols.SupportsPartial``."""
        return self._staged(values, [])

    def _staged(self, values: Sequence[SlotValue], missing: Sequence[str]) -> StagedWeights:
        """Copy values into a new set, which shares all other weights with the live one.

        Raises:
            WeightMismatchError: Values do not fit. It lists all of them.
        """
        counts = Counter(value.slot.name for value in values)
        problems = [Problem(name, "missing") for name in missing]
        problems += [Problem(name, "given twice") for name, count in counts.items() if count > 1]
        problems += [Problem(name, "no such slot") for name in counts.keys() - self.slots.keys()]
        if problems:
            raise WeightMismatchError("The values are not those of the slots.", problems=problems)
        new: dict[str, torch.Tensor] = {}
        for value in values:
            slot, tensor = self.slots[value.slot.name], value.load().detach()
            problems += misfits(slot, tensor)
            if not problems:
                new[slot.name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        if problems:
            raise WeightMismatchError("The values do not fit the slots.", problems=problems)
        live = self.state.live
        self.state = State(live)  # frees the previous weights
        return StagedWeights(self, WeightSet(self.runner, {**live.tensors, **new}), new)

    # -- present and previous weights ---------------------------------------------------------

    def read(self, slot: str) -> torch.Tensor:
        """Return the live value of a slot; see ``refitkit.protocols.SupportsReadback``."""
        return self.state.live.tensors[slot]

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the values before the last commit; see ``refitkit.protocols.HoldsPrevious``."""
        return dict(self.state.previous.tensors) if self.state.previous else {}


def misfits(slot: Slot, value: torch.Tensor) -> Iterator[Problem]:
    """Yield what keeps a value from being a slot's."""
    found = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if found != (slot.dtype, slot.shape):
        yield Problem(slot.name, "value", " ".join(map(str, found)), f"{slot.dtype} {slot.shape}")
    elif value.dtype is torch.int64 and not torch.equal(
        value.to(torch.int32).to(torch.int64), value
    ):
        # The CPU plugin of OpenVINO computes int64 as int32.
        yield Problem(slot.name, "range", "numbers of more than 32 bits", "32 bits")


class StagedWeights:
    """Weights that are not live yet; see ``refitkit.protocols.StagedRefit``."""

    def __init__(
        self, engine: OpenVINOEngine, weights: WeightSet, new: Mapping[str, torch.Tensor]
    ) -> None:
        """Hold new weights.

        Args:
            engine: The engine that they are for.
            weights: All weights after the commit.
            new: Those among them that were given.
        """
        self.weights = weights
        self._engine, self._before, self._new = engine, engine.state, new

    def commit(self) -> None:
        """Make the new weights live."""
        self._engine.state = State(self.weights, self._before.live)

    def rollback(self) -> None:
        """Make the old weights live again."""
        self._engine.state = self._before

    def discard(self) -> None:
        """Drop the new weights: the last reference to them goes with this object."""

    def changed(self) -> bool:
        """Return whether any bit of the new weights is another one."""
        live = self._before.live.tensors
        return any(not torch.equal(as_bytes(v), as_bytes(live[n])) for n, v in self._new.items())

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot; see ``refitkit.protocols.ShowsStaged``."""
        return self._new[slot]
