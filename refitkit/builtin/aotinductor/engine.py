"""The engine of a compiled library: its slots, and the two ways to give them new values.

``AOTInductorEngine`` has what both ways share. A ``LibraryEngine`` (``publishing.py``,
``shared.py``) calls the library through its C interface, and publishes new weights while calls go
on. ``SwappingEngine`` is for libraries that only torch's binding can call: its container serves
calls from its *active* buffer, a refit writes the *inactive* buffer through aliases of its tensors,
and then swaps the two. Swapping back is the rollback.

AOTInductor's own update functions check nothing (sizes, strides, offsets, dtypes). So refitkit
passes them only tensors of the library's own layout. Every other tensor from outside is compared
with its slot and then copied by torch, which accepts any layout.

Facts about the container are from ``torch/csrc/inductor/aoti_runtime/model_container.h`` (2.14).
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.aotinductor.native import Turns
from refitkit.errors import (
    ConfigError,
    EngineError,
    NotRefittableError,
    Problem,
    WeightMismatchError,
)
from refitkit.model import EngineMemory, Slot
from refitkit.program.bits import is_dense, same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe import Overwriting, write_value
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from refitkit.builtin.aotinductor.native import Answer, Library
    from refitkit.protocols import SlotValue

ENGINE = "model"
"""Name of the only engine of an AOTInductor package."""

_PREFIX = 1024  # elements compared first when looking for a change


class AOTInductorEngine:
    """What both kinds of engines share; see ``refitkit.protocols.Engine``.

    Attributes:
        binding: Why the library is called through torch's binding; empty if it is called through
            its C interface.
    """

    binding = ""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], mutable: Collection[str] | None
    ) -> None:
        """Read the slots.

        Args:
            tensors: The weights by FQN, as the library lays them out.
            mutable: Slots that calls of the model change in place. None if that is unknown: then
                any slot may be one, and every commit copies all live values that it does not set.

        Raises:
            NotRefittableError: A weight has an offset or gaps.
        """
        # ``_declared`` is for the slots' ``mutable``, ``_mutable`` for what commits carry over.
        self._declared = frozenset(mutable or ()) & tensors.keys()
        self._mutable = frozenset(tensors) if mutable is None else self._declared
        self._slots = {name: self._slot(name, t) for name, t in sorted(tensors.items())}
        _check_layouts(tensors)

    def _slot(self, name: str, tensor: torch.Tensor) -> Slot:
        return Slot(
            engine=ENGINE,
            name=name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            count=tensor.numel(),
            device=str(tensor.device),
            readable=True,
            mutable=name in self._declared,
        )

    @property
    def name(self) -> str:
        """Name of the engine: ``model``."""
        return ENGINE

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights of the library, by original FQN."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of one set of weights."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """The memory that calls read now, by slot."""
        raise NotImplementedError

    @property
    def memory(self) -> EngineMemory:
        """Memory for the rollback."""
        raise NotImplementedError

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """Strides of all slots, by name."""
        live = self.live
        return {name: tuple(live[name].stride()) for name in self._slots}

    @property
    def route(self) -> tuple[str, str]:
        """How weights reach the library, and why so; see ``refitkit.protocols.TellsRoute``."""
        return ("binding", self.binding) if self.binding else ("c-interface", "")

    def serve(self, models: int) -> None:
        """Serve several calls side by side from now on.

        Raises:
            ConfigError: The engine cannot; says why.
        """
        if models > 1:
            raise ConfigError(
                f"num_models={models} needs the library's C interface, and {self.binding}.",
                hint="Leave num_models out: calls of this module run one after another.",
            )

    @property
    def publishes(self) -> bool:
        """Whether calls can go on while new weights become live."""
        return False

    def values(self) -> dict[str, torch.Tensor]:
        """Return the live values of all slots, of one set; see ``read``."""
        return {**self._aliases(self._slots), **self.mutable_values()}

    def sibling(self) -> AOTInductorEngine | None:
        """Return an engine of its own that shares the library; None if it cannot be shared."""
        return None

    # -- calls --------------------------------------------------------------------------------

    @property
    def call_spec(self) -> tuple[str, str]:
        """Structures of the inputs and of the outputs, as torch writes them."""
        raise NotImplementedError

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs for inputs that were checked.

        Raises:
            RuntimeError: The library failed.
        """
        raise NotImplementedError

    # -- live values --------------------------------------------------------------------------

    def read(self, slot: str) -> torch.Tensor:
        """Return the live value of a slot: an alias, or a copy if calls may change it."""
        found = self.mutable_values if slot in self._mutable else self._aliases
        return found([slot])[slot]

    def _aliases(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return aliases of live values, of one set."""
        live = self.live
        return {name: live[name] for name in names}

    def mutable_values(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Return copies of slots that calls may change, each as it is between two calls.

        Args:
            names: Some of them; all by default.
        """
        raise NotImplementedError

    def write_active(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite live values in place, to restore state or to fill a newly opened library.

        Raises:
            WeightMismatchError: A value has another dtype or shape than its slot.
        """
        with torch.no_grad():
            for name, value in values.items():
                self.live[name].copy_(checked(self._slots[name], value))

    def drain(self) -> None:
        """Wait for pending work on the engine's devices."""
        for device in {t.device for t in self.live.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    # -- staging ------------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> Any:
        """Stage all slots; see ``refitkit.protocols.Engine``."""
        require_values(self._slots, values)
        return self._stage(values)

    def stage_partial(self, values: Sequence[SlotValue]) -> Any:
        """Stage some slots. The others keep their live values."""
        require_values(self._slots, values, partial=True)
        return self._stage(values)

    def _stage(self, values: Sequence[SlotValue]) -> Any:
        raise NotImplementedError

    def stage_over(self, values: Sequence[SlotValue]) -> Overwriting:
        """Free the second set of weights; the commit overwrites the live one.

        See ``refitkit.protocols.SupportsOverwrite``.
        """
        require_values(self._slots, values, partial=True)
        self.free_spare()
        return Overwriting(lambda: self._write_over(values))

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        raise NotImplementedError

    def free_spare(self) -> int:
        """Free the second set of weights; return its size in bytes."""
        raise NotImplementedError


class LibraryEngine(AOTInductorEngine):
    """An engine that calls a library through its C interface, and publishes sets of weights."""

    def __init__(
        self,
        library: Library,
        tensors: Mapping[str, torch.Tensor],
        mutable: Collection[str],
        models: int,
    ) -> None:
        """Describe the slots.

        Args:
            library: The model's library.
            tensors: A set of its weights, by slot.
            mutable: Slots that calls of the model change in place.
            models: How many calls are served side by side.

        Raises:
            NotRefittableError: A weight has an offset or gaps.
        """
        super().__init__(tensors, mutable)
        self._library, self._models = library, models
        self._turns = Turns(models)

    @property
    def library(self) -> Library:
        """The model's library."""
        return self._library

    @property
    def models(self) -> int:
        """How many calls are served side by side."""
        return self._models

    @property
    def memory(self) -> EngineMemory:
        """Memory for the rollback: the set before the live one."""
        return EngineMemory(engine=ENGINE, kind="second-set", bytes=self.nbytes)

    @property
    def call_spec(self) -> tuple[str, str]:
        """See the base class."""
        return self._library.in_spec, self._library.out_spec

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See the base class. Other threads run meanwhile."""
        outputs, failure = self._turns.take(partial(self._call_now, tensors))
        # Raised only here: a traceback would keep the frame that refers to the container.
        if failure:
            raise RuntimeError(failure)
        return outputs

    def _call_now(self, tensors: Sequence[torch.Tensor]) -> Answer:
        """Run the model on the live weights; called in a turn."""
        raise NotImplementedError

    def mutable_values(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """See the base class."""
        wanted = self._mutable if names is None else names
        # In a turn, so that no call writes meanwhile: such a model has one turn only.
        return self._turns.take(lambda: {n: self.live[n].clone() for n in wanted}) if wanted else {}


class SwappingEngine(AOTInductorEngine):
    """The engine of a container with two buffers, behind torch's binding.

    Attributes:
        runner: Torch's binding of the container, with weights in its active buffer.
    """

    def __init__(
        self, runner: Any, mutable: Collection[str] | None = None, *, binding: str = "chosen"
    ) -> None:
        """Read the slots of a container.

        Args:
            runner: ``torch._C._aoti.AOTIModelContainerRunnerCpu`` or
                ``AOTIModelContainerRunnerCuda``.
            mutable: Slots that calls of the model change in place; None if that is unknown.
            binding: Why the C interface is not used.

        Raises:
            NotRefittableError: Two weights have one name, or a weight has an offset or gaps.
        """
        self.runner, self.binding = runner, binding
        self._internal = _internal_names(runner)
        self._active: dict[str, torch.Tensor] = runner.extract_constants_map(False)  # noqa: FBT003
        self._inactive: dict[str, torch.Tensor] | None = None
        self._stale: set[str] = set()  # where the inactive buffer may differ from the active one
        self._has_previous = False  # whether it holds what was live before the last commit
        super().__init__(self._active, mutable)

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """Aliases of the active buffer, by slot."""
        return self._active

    @property
    def memory(self) -> EngineMemory:
        """Memory for the rollback: the inactive buffer."""
        return EngineMemory(engine=ENGINE, kind="inactive-buffer", bytes=self.nbytes)

    @property
    def call_spec(self) -> tuple[str, str]:
        """See the base class."""
        in_spec, out_spec = self.runner.get_call_spec()
        return in_spec, out_spec

    def mutable_values(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """See the base class."""
        wanted = self._mutable if names is None else names
        return {name: _copy_between_calls(self.live[name]) for name in wanted}

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See the base class. The binding holds the GIL meanwhile."""
        found: list[torch.Tensor] = self.runner.run(tensors)
        return found

    # -- staging ------------------------------------------------------------------------------

    def _stage(self, values: Sequence[SlotValue]) -> StagedSwap:
        inactive = self._ready_inactive()
        self._has_previous = False
        names = [value.slot.name for value in values]
        carried = self._stale - set(names)
        # Marked as stale first: if a write fails, the next refit brings these slots up to date.
        self._stale |= set(names)
        with torch.no_grad():
            for value in values:
                write(inactive[value.slot.name], value)
            for name in carried:
                inactive[name].copy_(self._active[name])
        self._stale -= carried
        # Copies to a GPU may be pending, and their sources belong to the caller.
        self.drain()
        return StagedSwap(self, names)

    def _write_over(self, values: Sequence[SlotValue]) -> None:
        with torch.no_grad():
            for value in values:
                write(self._active[value.slot.name], value)
        self.drain()

    def previous(self) -> Mapping[str, torch.Tensor]:
        """Return the inactive buffer if the last operation on it was a swap; else nothing.

        Staging one of these values copies nothing: it is in place already.
        """
        return dict(self._inactive or {}) if self._has_previous else {}

    def _ready_inactive(self) -> dict[str, torch.Tensor]:
        """Return aliases of the inactive buffer. If needed, allocate it as a copy."""
        if self._inactive is None:
            own = {self._internal[name]: tensor for name, tensor in self._active.items()}
            self.runner.update_constant_buffer(own, True, True)  # noqa: FBT003
            self._inactive = self.runner.extract_constants_map(True)  # noqa: FBT003
            self._stale = set()
        return self._inactive

    # -- for ``StagedSwap`` -------------------------------------------------------------------

    def spare(self, slot: str) -> torch.Tensor:
        """Return the value of a slot in the inactive buffer: an alias."""
        return self._ready_inactive()[slot]

    def differs(self, names: Iterable[str]) -> bool:
        """Return whether any bit of some slots differs between the two buffers."""
        inactive = self._ready_inactive()
        return any_differs([(inactive[name], self._active[name]) for name in names])

    def carry_mutable(self, written: Collection[str]) -> None:
        """Copy to the inactive buffer what calls have written since staging.

        No call may run meanwhile.

        Args:
            written: Slots that keep their new values.
        """
        inactive = self._ready_inactive()
        with torch.no_grad():
            for name in self._mutable - set(written):
                inactive[name].copy_(self._active[name])

    def swap(self) -> None:
        """Exchange the two buffers: calls that start now use the other one.

        Raises:
            EngineError: There is no inactive buffer.
        """
        if self._inactive is None:
            raise EngineError("The engine has no second set of weights to swap to.")
        self.runner.swap_constant_buffer()
        self._active, self._inactive = self._inactive, self._active
        self._has_previous = True

    @property
    def active(self) -> dict[str, torch.Tensor]:
        """Aliases of the active buffer, for ``restore_live``."""
        return self._active

    def restore_live(self, aliases: dict[str, torch.Tensor]) -> None:
        """Serve calls from a buffer, whichever is active now.

        Args:
            aliases: Aliases of that buffer: an earlier ``active``.
        """
        self._has_previous = False
        other = self._inactive if self._active is aliases else self._active
        # An interrupt may have come between the swap in the container and the one of our aliases.
        # So the container is asked which buffer is active.
        live = self.runner.extract_constants_map(False)  # noqa: FBT003
        if any(live[name].data_ptr() != tensor.data_ptr() for name, tensor in aliases.items()):
            self.runner.swap_constant_buffer()
        self._active, self._inactive = aliases, other

    def free_spare(self) -> int:
        """Free the inactive buffer; return its size in bytes."""
        if self._inactive is None:
            return 0
        # Our aliases go first: using one after the container has freed the buffer would crash.
        self._inactive = None
        self._stale = set()
        self._has_previous = False
        self.runner.free_inactive_constant_buffer()
        return self.nbytes


class StagedSwap:
    """New values in the inactive buffer; see ``refitkit.protocols.StagedRefit``."""

    def __init__(self, engine: SwappingEngine, names: Sequence[str]) -> None:
        """Create the handle; ``AOTInductorEngine.stage`` calls this.

        Args:
            engine: Engine whose inactive buffer holds the values.
            names: Slots with new values.
        """
        self._engine = engine
        self._names = names
        self._before = engine.active

    def commit(self) -> None:
        """Swap the buffers: one pointer changes, independent of the size of the weights."""
        self._engine.carry_mutable(self._names)
        self._engine.drain()
        self._engine.swap()

    def rollback(self) -> None:
        """Serve calls from the earlier buffer, whether or not the swap took place."""
        self._engine.drain()
        self._engine.restore_live(self._before)

    def discard(self) -> None:
        """Leave the inactive buffer as it is: the engine knows which of its slots are stale."""

    def changed(self) -> bool:
        """Return whether any bit differs from the live values."""
        return self._engine.differs(self._names)

    def staged(self, slot: str) -> torch.Tensor:
        """Return the new value of a slot: an alias, valid until ``commit``."""
        return self._engine.spare(slot)


def write(into: torch.Tensor, value: SlotValue) -> None:
    """Write a value to a tensor of the container; a large value of a file piece by piece."""
    if not write_value(into, value):
        into.copy_(checked(value.slot, value.load()))


def checked(slot: Slot, value: torch.Tensor) -> torch.Tensor:
    """Return a value unchanged if it has the dtype and shape of its slot.

    Raises:
        WeightMismatchError: It has not. ``Tensor.copy_`` would cast or broadcast it.
    """
    if dtype_name(value.dtype) != slot.dtype or tuple(value.shape) != slot.shape:
        found = f"{dtype_name(value.dtype)} {tuple(value.shape)}"
        problem = Problem(slot.name, "value", found, f"{slot.dtype} {slot.shape}")
        raise WeightMismatchError("A value does not fit its slot.", problems=[problem])
    return value


def _copy_between_calls(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that is made while nothing else has the GIL, as calls of the binding do."""
    if tensor.device.type != "cpu":
        return tensor.clone()
    copy = torch.empty_like(tensor)  # dense, with the same strides
    _memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copy


_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def any_differs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Return whether any bit differs between the tensors of any pair."""
    # Nearly always a change shows in the first elements of a slot.
    return any(not same_bits(a, b, _PREFIX) for a, b in pairs) or any(
        not same_bits(a, b) for a, b in pairs
    )


def _internal_names(runner: Any) -> dict[str, str]:
    """Return the container's internal name of each constant, by original FQN.

    Raises:
        NotRefittableError: Two constants have the same FQN.
    """
    names: dict[str, str] = {}
    for internal, fqn in runner.get_constant_names_to_original_fqns().items():
        if fqn in names:
            problem = Problem(fqn, "two constants of this name", f"{names[fqn]}, {internal}")
            raise NotRefittableError("Two weights of the engine have one name.", problems=[problem])
        names[fqn] = internal
    return names


def _check_layouts(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that no weight has an offset, gaps or overlaps: the container copies these wrongly.

    Raises:
        NotRefittableError: Weights have an offset, gaps or overlaps. The error lists them.
    """
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
