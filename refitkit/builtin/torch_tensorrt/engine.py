"""A TensorRT engine as refitkit's engine: what both runtimes have in common.

In the Python runtime the live engine is refitted in place (``inplace.py``); the C++ runtime keeps
its engine to itself, so a second one is refitted, serialized and put in its place (``shadow.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt import staging
from refitkit.builtin.torch_tensorrt.arena import Layout
from refitkit.builtin.torch_tensorrt.refitter import PersistentRefitter
from refitkit.builtin.torch_tensorrt.rollback import Copies, WeightSets
from refitkit.builtin.torch_tensorrt.upload import Uploader
from refitkit.errors import EngineError, NotRefittableError, Problem, WeightMismatchError
from refitkit.model import EngineMemory, Slot
from refitkit.recipe.sources import require_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from refitkit.builtin.torch_tensorrt.handles import EngineHandle
    from refitkit.builtin.torch_tensorrt.rollback import Keep
    from refitkit.builtin.torch_tensorrt.weighttypes import WeightFact
    from refitkit.protocols import SideBySide, SlotValue, StagedRefit


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is refitted.

    Attributes:
        device: Where the engine runs.
        known: What is known of its slots, by name; see ``PersistentRefitter.facts``.
        keep: Where the weights from before a refit are kept.
        check_finite: Whether new values must be finite where the live ones are known to be.
    """

    device: torch.device
    known: Mapping[str, Slot]
    keep: Keep = "device"
    check_finite: bool = True


class RefitterEngine:
    """One TensorRT engine; see ``refitkit.protocols.Engine``. Subclasses know its runtime.

    Its live weights are what was last given to it: whoever refits the engine in another way has to
    open it again before refitting it in part.
    """

    def __init__(self, handle: EngineHandle, trt: Any, options: EngineOptions) -> None:
        """Touch nothing yet: the refitter is made when it is first needed.

        Args:
            handle: The engine in its target.
            trt: The package ``tensorrt``.
            options: How it is refitted.
        """
        self.handle = handle
        self._trt = trt
        self._options = options
        self._uploader = Uploader(options.device)
        self._refitter: PersistentRefitter | None = None
        self._facts: dict[str, WeightFact] | None = None
        self._slots: dict[str, Slot] | None = None
        self._sets: WeightSets | None = None

    # -- what it is -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the child that it is."""
        return self.handle.name

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._options.device

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All weights, by the names that TensorRT has for them."""
        facts = self.facts
        if self._slots is None:
            self._slots = {name: self._slot(fact) for name, fact in sorted(facts.items())}
        return self._slots

    def _slot(self, fact: WeightFact) -> Slot:
        return Slot(
            engine=self.name,
            name=fact.name,
            dtype=fact.dtype,
            shape=fact.shape,
            count=fact.count,
            device=str(self.device),
        )

    @property
    def facts(self) -> Mapping[str, WeightFact]:
        """What the engine asks of each weight."""
        refitter = self._ready_refitter()
        if self._facts is None:
            self._facts = refitter.facts(self._options.known)
        return self._facts

    @property
    def memory(self) -> EngineMemory:
        """The second set of weights; engine bytes where nobody knows the live weights."""
        if self._sets is None or not self._sets.known:
            size = len(self.handle.engine_bytes())
            return EngineMemory(engine=self.name, kind="engine-bytes", bytes=size)
        return EngineMemory(engine=self.name, kind=self._options.keep, bytes=self._sets.nbytes)

    @property
    def name_map(self) -> Mapping[str, Any] | None:
        """The cached map of torch-tensorrt 2.11 and 2.12; see ``name_map.HasNameMap``."""
        found: Mapping[str, Any] | None = self.handle.weight_name_map
        return found

    @property
    def knows_live(self) -> bool:
        """Whether the live weights are known: from a refit, or from ``adopt``."""
        return self._sets is not None and self._sets.known

    def remembered(self, slot: str) -> torch.Tensor | None:
        """What was last given to a slot: an alias; None while nobody knows it."""
        return self._sets.known_value(slot) if self._sets is not None else None

    def staged(self, slot: str) -> torch.Tensor:
        """What the staging set holds for a slot: an alias."""
        return self.sets.staging.tensors[slot]

    def side_by_side(self) -> SideBySide | None:
        """Both sets as they lie in memory; None while nobody knows the live values."""
        return self.sets.side_by_side()

    def previous(self) -> Mapping[str, torch.Tensor]:
        """What was given before the last refit, copied when asked for: staging overwrites it."""
        values = self._sets.previous() if self._sets is not None else {}
        return Copies(values, lambda name: values[name].clone())

    # -- for subclasses ---------------------------------------------------------------------

    def _engine(self) -> Any:
        """The ``ICudaEngine`` to refit."""
        raise NotImplementedError

    def _staged(self) -> StagedRefit:
        """What becomes of the staging set, which is filled."""
        raise NotImplementedError

    def _rehearse(self) -> str:
        """Refit to what the engine holds anyway; why that is impossible, else nothing."""
        raise NotImplementedError

    # -- the refitter and its buffers -------------------------------------------------------

    def _ready_refitter(self) -> PersistentRefitter:
        """The one refitter; another one only where somebody has put another engine in place."""
        engine = self._engine()
        if self._refitter is None or self._refitter.engine is not engine:
            self.forget()
            self._refitter = PersistentRefitter(engine, self._trt, self.device)
        return self._refitter

    @property
    def sets(self) -> WeightSets:
        """The two sets of weights; the refitter is bound to the first."""
        refitter = self._ready_refitter()
        if self._sets is None:
            layout = Layout.of(self.facts.values())
            sets = WeightSets(layout, self.device, self._options.keep)
            refitter.bind(self.facts, sets.staging.views)
            self._sets = sets
        return self._sets

    def forget(self) -> None:
        """Let the refitter and all buffers go, and with them what the live weights are."""
        self._refitter = self._facts = self._slots = self._sets = None

    def refit(self, *, idle: bool = False) -> None:
        """Give the engine what the staging set holds.

        Args:
            idle: Whether no call of the engine can be pending.

        Raises:
            EngineError: TensorRT failed; the engine may hold a mixture.
        """
        if self._refitter is None or self._sets is None:
            raise EngineError(f"The engine {self.name!r} has lost its refitter.")
        self._refitter.refit(idle=idle)

    # -- staging ----------------------------------------------------------------------------

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for all slots into the staging set."""
        return self._stage(values, partial=False)

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for some slots into the staging set; the others keep theirs.

        Raises:
            NotRefittableError: Nobody knows what the others hold.
        """
        self._ready_refitter()
        if not self.knows_live:
            raise self._unknown()
        return self._stage(values, partial=True)

    def _stage(self, values: Sequence[SlotValue], *, partial: bool) -> StagedRefit:
        require_values(self.facts, values, partial=partial)
        sets = self.sets
        sets.begin(partial=partial)
        self._fill(values)
        if self._options.check_finite:
            self._check_finite(sets)
        return self._staged()

    def _fill(self, values: Sequence[SlotValue]) -> None:
        """Copy values into the staging set."""
        staging.fill(self.sets.staging, self.facts, values, self._uploader)

    def _unknown(self) -> NotRefittableError:
        return NotRefittableError(
            f"Nobody knows the present weights of the engine {self.name!r}: TensorRT cannot be "
            "asked for them.",
            hint="Refit it fully once; after that it can be refitted in part.",
        )

    def _check_finite(self, sets: WeightSets) -> None:
        problems = [
            Problem(
                name,
                "non-finite",
                f"{count} elements",
                "finite, as the present ones are",
                "to allow it: check_finite=False in the config",
            )
            for name, count in sets.spoilt()
        ]
        if problems:
            raise WeightMismatchError("New weights are not finite.", problems=problems)

    def adopt(self, values: Sequence[SlotValue]) -> None:
        """Take over what the engine is known to hold, because it was built from it.

        Args:
            values: The live value of every slot.

        Raises:
            WeightMismatchError: They are not values of this engine.
        """
        require_values(self.facts, values)
        sets = self.sets
        sets.live = None
        self._fill(values)
        sets.live = "staging"

    # -- warming and freeing ----------------------------------------------------------------

    def warm(self, tell: Callable[[str], None]) -> None:
        """Make the refitter and its buffers, and have it compile what it needs.

        Args:
            tell: Tells of progress.

        Raises:
            EngineError: TensorRT failed; the engine is as before.
        """
        sets = self.sets
        tell(f"{self.name}: {len(self.facts)} weights, {sets.nbytes} bytes")
        why_not = self._rehearse()
        tell(f"{self.name}: {why_not or 'the refitter is warm'}")

    def free_spare(self) -> int:
        """Free the second set; the first one stays, as only it knows the live weights."""
        return self._sets.free_base() if self._sets is not None else 0
