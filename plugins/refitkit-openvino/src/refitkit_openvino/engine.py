"""The engine: one set of weights that calls use, and new ones beside it.

A ``WeightSet`` never changes. A refit makes another set, and its commit is one assignment. A call
takes the live set once, at its beginning, and ends on it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from refitkit import EngineError, Problem, WeightMismatchError
from refitkit.errors import raised_as
from refitkit.model import EngineMemory, Slot

from refitkit_openvino.graph import load_openvino

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from refitkit.protocols import SlotValue

    from refitkit_openvino.graph import Manifest

ENGINE = "model"
"""Name of the only engine of a module."""


class WeightSet:
    """Weights that never change, and the requests of OpenVINO that read them."""

    def __init__(self, runner: Runner, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bind weights to a model.

        Args:
            runner: The compiled model.
            tensors: One contiguous tensor for each slot, which nobody writes to.
        """
        self.tensors = tensors
        self._runner = runner
        self._idle: deque[Any] = deque()

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs for some inputs. Several threads may call it."""
        # A request serves one call at a time, so calls that run at once have one each.
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._runner.request(self.tensors)
        outputs = self._runner.run(request, inputs)
        self._idle.append(request)
        return outputs


class Runner:
    """A compiled model, whose inputs are the weights and the inputs of a call."""

    def __init__(self, compiled: Any, manifest: Manifest) -> None:
        """Hold a compiled model.

        Args:
            compiled: The ``openvino.CompiledModel``.
            manifest: Description of its inputs and outputs.
        """
        self.slots = {slot.name: slot for slot in manifest.slots}
        self._compiled, self._manifest = compiled, manifest
        self.ports = {port.get_node().get_friendly_name(): port for port in compiled.inputs}

    def request(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """Return a new request that reads some weights."""
        request = self._compiled.create_infer_request()
        for name, weight in weights.items():
            self._bind(request, name, weight)
        return request

    def run(self, request: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs of a request for some inputs.

        Raises:
            EngineError: OpenVINO failed. The module is unharmed.
        """
        hint = "Are values of the inputs in range, such as indices? The module is unharmed."
        with raised_as(EngineError, "OpenVINO failed", hint=hint):
            for spec, value in zip(self._manifest.inputs, inputs, strict=True):
                if spec.name in self.ports:  # else the model does not read it
                    self._bind(request, spec.name, value)
            request.infer()
            outputs = enumerate(self._manifest.outputs)
            return [_copied(request.get_output_tensor(n).data, one.dtype) for n, one in outputs]

    def _bind(self, request: Any, name: str, value: torch.Tensor) -> None:
        """Have a request read the memory of a contiguous tensor."""
        ov, port = load_openvino(), self.ports[name]
        shape, kind = ov.Shape(list(value.shape)), port.get_element_type()
        request.set_tensor(port, ov.Tensor(as_bytes(value).numpy(), shape, kind))


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
            runner: The compiled model.
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
            problems += _misfits(slot, tensor)
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


def _misfits(slot: Slot, value: torch.Tensor) -> Iterator[Problem]:
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
