"""One AOTInductor container as an engine with two sets of weights.

The container serves from its *active* buffer. A refit writes the other one, the *inactive* buffer,
through aliases of its tensors, and then swaps the two; swapping back is the rollback. AOTInductor's
own update functions believe what they are given (sizes, strides, offsets, dtypes), so they see only
the engine's own tensors: once, to allocate the inactive buffer. Every tensor from outside is
checked against its slot and then copied by torch, which takes any layout.

Facts about the container are from ``torch/csrc/inductor/aoti_runtime/model_container.h`` (2.14).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import EngineError, NotRefittableError, Problem, WeightMismatchError
from refitkit.model import EngineMemory, Slot
from refitkit.program.bits import is_dense, same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import Overwriting, write_value
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from refitkit.protocols import SlotValue

ENGINE = "model"
"""An AOTInductor package has one engine, of this name."""

_PREFIX = 1024  # elements compared first when looking for a change


class AOTInductorEngine:
    """The engine of one container.

    Attributes:
        runner: torch's binding of the container, with weights in its active buffer.
    """

    def __init__(self, runner: Any, mutable: Collection[str] | None = None) -> None:
        """Read the slots off a container.

        Args:
            runner: ``torch._C._aoti.AOTIModelContainerRunnerCpu`` or its CUDA twin.
            mutable: Slots that calls of the model change in place. None: nobody knows, so any
                slot may be one, and what live slots hold is carried over at every commit.

        Raises:
            NotRefittableError: Weights that a refit could not write exactly.
        """
        self.runner = runner
        self._internal = _internal_names(runner)
        self._active: dict[str, torch.Tensor] = runner.extract_constants_map(False)  # noqa: FBT003
        self._inactive: dict[str, torch.Tensor] | None = None
        self._known = frozenset(mutable or ()) & self._active.keys()
        self._mutable = frozenset(self._active) if mutable is None else self._known
        self._stale: set[str] = set()  # where the inactive buffer may differ from the active one
        self._has_previous = False  # whether it holds what was live before the last commit
        self._slots = {name: self._slot(name, t) for name, t in sorted(self._active.items())}
        _check_layouts(self._active)

    def _slot(self, name: str, tensor: torch.Tensor) -> Slot:
        return Slot(
            engine=ENGINE,
            name=name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            count=tensor.numel(),
            device=str(tensor.device),
            readable=True,
            mutable=name in self._known,
        )

    @property
    def name(self) -> str:
        """Its name."""
        return ENGINE

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights of the container, by original FQN."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of one set of weights."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def memory(self) -> EngineMemory:
        """The way back is the other buffer."""
        return EngineMemory(engine=ENGINE, kind="inactive-buffer", bytes=self.nbytes)

    # -- readback ---------------------------------------------------------------------------

    def read(self, slot: str) -> torch.Tensor:
        """The live value of a slot: an alias, valid until the next commit."""
        return self._active[slot]

    def mutable_values(self) -> dict[str, torch.Tensor]:
        """Copies of the slots that calls may change."""
        return {name: self._active[name].clone() for name in self._mutable}

    def write_active(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite live values in place: to restore mutable slots, and when a file is opened."""
        with torch.no_grad():
            for name, value in values.items():
                self._active[name].copy_(_checked(self._slots[name], value))

    # -- staging ----------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedSwap:
        """Write all slots of the inactive buffer; see ``refitkit.protocols.Engine``."""
        require_values(self._slots, values)
        return self._stage(values)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedSwap:
        """Write some slots of the inactive buffer and bring the others up to date."""
        require_values(self._slots, values, partial=True)
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> StagedSwap:
        inactive = self._ready_inactive()
        self._has_previous = False
        names = [value.slot.name for value in values]
        carried = self._stale - set(names)
        self._stale |= set(names)
        with torch.no_grad():
            for value in values:
                _write(inactive[value.slot.name], value)
            for name in carried:
                inactive[name].copy_(self._active[name])
        self._stale -= carried
        self.drain()
        return StagedSwap(self, names)

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Free the inactive buffer; the commit writes the active one."""
        require_values(self._slots, values, partial=True)
        self.free_spare()
        return Overwriting(lambda: self._write_over(values))

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        with torch.no_grad():
            for value in values:
                _write(self._active[value.slot.name], value)
        self.drain()

    def previous(self) -> Mapping[str, torch.Tensor]:
        """The inactive buffer, where the last thing that was done to it was a swap.

        Staging a value of it copies nothing: it is in its place.
        """
        return dict(self._inactive or {}) if self._has_previous else {}

    def carry_mutable(self, but: Collection[str]) -> None:
        """Bring what calls have written since staging over to the inactive buffer.

        Called when no call runs any more.

        Args:
            but: Slots that have new values.
        """
        inactive = self._ready_inactive()
        with torch.no_grad():
            for name in self._mutable - set(but):
                inactive[name].copy_(self._active[name])

    def _ready_inactive(self) -> dict[str, torch.Tensor]:
        """Aliases of the inactive buffer; allocated, as a copy of the active one, when needed."""
        if self._inactive is None:
            own = {self._internal[name]: tensor for name, tensor in self._active.items()}
            self.runner.update_constant_buffer(own, True, True)  # noqa: FBT003
            self._inactive = self.runner.extract_constants_map(True)  # noqa: FBT003
            self._stale = set()
        return self._inactive

    def differs(self, names: Iterable[str]) -> bool:
        """Whether any bit of these slots differs between the two buffers."""
        inactive = self._ready_inactive()
        pairs = [(inactive[name], self._active[name]) for name in names]
        return any(not same_bits(a, b, _PREFIX) for a, b in pairs) or any(
            not same_bits(a, b) for a, b in pairs
        )

    def spare(self, slot: str) -> torch.Tensor:
        """The value of a slot in the inactive buffer: an alias."""
        return self._ready_inactive()[slot]

    def swap(self) -> None:
        """Let the two buffers change places: calls that start now use the other one."""
        if self._inactive is None:
            raise EngineError("The engine has no second set of weights to swap to.")
        self.runner.swap_constant_buffer()
        self._active, self._inactive = self._inactive, self._active
        self._has_previous = True

    def serve_again(self, aliases: dict[str, torch.Tensor]) -> None:
        """Serve from the buffer that these are the aliases of, whichever is served from now.

        An interrupt may have come between a swap and the note of it, so the container is asked.
        """
        self._has_previous = False
        other = self._inactive if self._active is aliases else self._active
        live = self.runner.extract_constants_map(False)  # noqa: FBT003
        if any(live[name].data_ptr() != tensor.data_ptr() for name, tensor in aliases.items()):
            self.runner.swap_constant_buffer()
        self._active, self._inactive = aliases, other

    @property
    def live(self) -> dict[str, torch.Tensor]:
        """Aliases of the buffer that is served from."""
        return self._active

    def free_spare(self) -> int:
        """Free the inactive buffer; returns its bytes."""
        if self._inactive is None:
            return 0
        self._inactive = None
        self._stale = set()
        self._has_previous = False
        self.runner.free_inactive_constant_buffer()
        return self.nbytes

    def drain(self) -> None:
        """Wait for pending work on the engine's devices."""
        for device in {t.device for t in self._active.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)


class StagedSwap:
    """New values in the inactive buffer."""

    def __init__(self, engine: AOTInductorEngine, names: Sequence[str]) -> None:
        """Made by ``AOTInductorEngine.stage``."""
        self._engine = engine
        self._names = names
        self._before = engine.live

    def commit(self) -> None:
        """Swap: one pointer, whatever the size of the weights."""
        self._engine.carry_mutable(self._names)
        self._engine.drain()
        self._engine.swap()

    def rollback(self) -> None:
        """Serve from the buffer from before, whether or not the swap took place."""
        self._engine.drain()
        self._engine.serve_again(self._before)

    def discard(self) -> None:
        """Leave the inactive buffer as it is: the next refit knows which of its slots are stale."""

    def changed(self) -> bool:
        """Whether any bit differs from the live values."""
        return self._engine.differs(self._names)

    def staged(self, slot: str) -> torch.Tensor:
        """The new value of a slot: an alias, valid until ``commit``."""
        return self._engine.spare(slot)


def _write(into: torch.Tensor, value: SlotValue) -> None:
    """Write a value; a large one of a file as it is read."""
    if not write_value(into, value):
        into.copy_(_checked(value.slot, value.load()))


def _checked(slot: Slot, value: torch.Tensor) -> torch.Tensor:
    """The value, if it has the slot's dtype and shape: ``copy_`` would cast and broadcast."""
    if dtype_name(value.dtype) != slot.dtype or tuple(value.shape) != slot.shape:
        found = f"{dtype_name(value.dtype)} {tuple(value.shape)}"
        problem = Problem(slot.name, "value", found, f"{slot.dtype} {slot.shape}")
        raise WeightMismatchError("A value does not fit its slot.", problems=[problem])
    return value


def _internal_names(runner: Any) -> dict[str, str]:
    """The container's internal name of every constant, by original FQN."""
    names: dict[str, str] = {}
    for internal, fqn in runner.get_constant_names_to_original_fqns().items():
        if fqn in names:
            problem = Problem(fqn, "two constants of this name", f"{names[fqn]}, {internal}")
            raise NotRefittableError(
                "The engine's weights cannot be told apart.", problems=[problem]
            )
        names[fqn] = internal
    return names


def _check_layouts(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights with an offset, gaps or overlaps: the container copies such ones wrongly."""
    problems = [
        Problem(name, "layout", f"strides {t.stride()}, offset {t.storage_offset()}", "dense")
        for name, t in tensors.items()
        if t.numel() and (t.storage_offset() or not is_dense(t))
    ]
    if problems:
        raise NotRefittableError(
            "The engine was compiled with weights that are views of other tensors.",
            problems=problems,
            hint="Compile it with refitkit.compile, which makes them tensors of their own.",
        )
