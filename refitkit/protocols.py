"""What plugin objects offer. Everything here is structural: no base class has to be inherited.

A backend opens or compiles a target into an :class:`OpenedModule`, which lists its
:class:`Engine` objects. A refit asks :class:`MappingStrategy` objects for a :class:`SlotValue` for
every slot, has each engine stage them, and commits. Verifiers judge the result.

What an engine may or may not be able to do is a protocol of its own: :class:`SupportsReadback`,
:class:`SupportsPartial`, :class:`SupportsSpareBuffer`, :class:`SupportsWarming`. So it is with
opened modules (:class:`Offline`, :class:`LowersPrecision`) and sources (:class:`HoldsProgram`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from refitkit.model import (
        EngineMemory,
        Guard,
        LayerType,
        LedgerRow,
        OpCall,
        PlanData,
        Slot,
        TensorInfo,
        VerificationResult,
    )


@dataclass(frozen=True)
class Tools:
    """What the pipeline lends to backends, strategies and openers.

    Attributes:
        layer_types: Network layer types that hold weights, of all plugins, by name.
        tell: Tells of progress in things that take long; never once per tensor.
        check_finite: Whether new values must be finite wherever the present ones are.
    """

    layer_types: Mapping[str, LayerType] = field(default_factory=dict)
    tell: Callable[[str], None] = field(default=lambda _: None)
    check_finite: bool = True


@runtime_checkable
class WeightSource(Protocol):
    """Where new weights come from, read lazily by FQN."""

    @property
    def description(self) -> str:
        """What it is, in words, for reports and messages."""

    def names(self) -> Collection[str]:
        """FQNs of everything it has."""

    def info(self, fqn: str) -> TensorInfo:
        """What it has under this name, without reading the data.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be described.
        """

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of this name. Not to be written to, and to be copied before it is kept.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be read.
        """


@runtime_checkable
class HoldsProgram(Protocol):
    """A source whose weights are those of a program, which is at hand."""

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The program. Not to be changed."""


@runtime_checkable
class Plan(Protocol):
    """A plan as strategies, checks and verifiers see it."""

    @property
    def data(self) -> PlanData:
        """Ledger, leaves, ties and fingerprint."""

    def pinned(self, name: str) -> torch.Tensor:
        """A tensor that the plan keeps. Not to be written to."""


@dataclass(frozen=True)
class SlotValue:
    """A new value for one slot, computed on demand.

    Attributes:
        slot: The slot that it is for.
        strategy: Name of the strategy that gives it.
        sources: FQNs that it comes from.
        load: Returns the tensor: dtype and shape of the slot, any layout, any device. It may be a
            view of the caller's tensor: read it, never write or keep it.
        identity: Whether the value is a source's tensor itself, so that ``load`` is free.
        pinned: Whether it is a value that the plan keeps, and nothing of the source's.
    """

    slot: Slot
    strategy: str
    sources: tuple[str, ...]
    load: Callable[[], torch.Tensor]
    identity: bool = False
    pinned: bool = False


class StagedRefit(Protocol):
    """New values beside the ones that an engine serves, on their way in.

    The pipeline calls either ``discard``, or ``commit`` and then, if anything fails, ``rollback``.
    Each may raise. When ``rollback`` raises, the module is lost.
    """

    def commit(self) -> None:
        """Make the new values live. When it raises, ``rollback`` is called."""

    def rollback(self) -> None:
        """Make the old values live again, bit for bit; also right after a failed ``commit``."""

    def discard(self) -> None:
        """Forget the new values; the live ones were never touched."""

    def changed(self) -> bool | None:
        """Whether any bit differs from the live values; None where the engine cannot tell.

        Called before ``commit``.
        """


class Engine(Protocol):
    """One refittable unit."""

    @property
    def name(self) -> str:
        """Its name, unique within its module."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """All its slots by name."""

    @property
    def memory(self) -> EngineMemory:
        """Where old weights are kept for a rollback, and what that costs once staged."""

    def stage(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Bring new values for *all* slots beside the live ones, which go on serving.

        Must check dtype and shape of every tensor before it is used, and copy it: the caller's
        tensor is free when this returns. When it raises, the live values are untouched.
        """


@runtime_checkable
class SupportsReadback(Protocol):
    """An engine that can read its weights back."""

    def read(self, slot: str) -> torch.Tensor:
        """The live value: an alias, valid until the next commit. Not to be written to."""


@runtime_checkable
class SupportsPartial(Protocol):
    """An engine that can change some slots and keep the others."""

    def stage_partial(self, values: Sequence[SlotValue]) -> StagedRefit:
        """Like ``stage``, for some slots; all others keep their live values."""


@runtime_checkable
class SupportsSpareBuffer(Protocol):
    """An engine with a second set of weights in memory."""

    def free_spare(self) -> int:
        """Free the second set; returns its bytes. The next refit allocates it again."""


@runtime_checkable
class SupportsWarming(Protocol):
    """An engine whose first refit is slow unless it was warmed."""

    def warm(self, tell: Callable[[str], None]) -> None:
        """Do now what the first refit would have to. Its weights and answers do not change.

        Args:
            tell: Tells of progress.
        """


@runtime_checkable
class Rebuilds(Protocol):
    """An opened module whose slots can be read off a program."""

    def rebuilt(
        self, program: torch.export.ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots, by engine and slot, flat.

        Raises:
            PlanMismatchError: The program makes other engines.
        """


@runtime_checkable
class Offline(Protocol):
    """An opened module that cannot be called on this machine."""

    @property
    def offline(self) -> str:
        """Why not, and what is possible instead."""

    @property
    def verifier(self) -> str:
        """Name of the verifier that judges it without calling it."""


@runtime_checkable
class LowersPrecision(Protocol):
    """An opened module that computes some dtypes in a lower precision than their own."""

    @property
    def precision(self) -> Mapping[str, str]:
        """By dtype of an output, the dtype whose precision it has: TF32 has float16's."""


class OpenedModule(Protocol):
    """What a backend hands over when it has compiled or opened a target."""

    @property
    def backend(self) -> str:
        """Name of the backend."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by name."""

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """What was saved beside the engines, by name; empty where nothing was."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call it like the model.

        Raises:
            InputMismatchError: The inputs are not those that it was made for.
        """

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Like ``run``, and afterwards all buffers that the model changes are as before."""

    def drain(self) -> None:
        """Wait for work that calls have left pending on a device."""

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write it with its present weights: beside ``path``, then renamed."""

    def reopen(self) -> OpenedModule:
        """A second, independent one with the same present weights."""


@dataclass(frozen=True)
class PlanDraft:
    """What a backend knows of how its slots come about.

    Attributes:
        rows: One row for every slot of every engine.
        calls: What the rows' recipes compute.
        guards: Values that must be what they are now for recipes to hold.
        pinned: Tensors that the plan keeps, by their name in it.
        settings: Compilation settings, as text by name.
        versions: Versions of what made the engines, by package.
        platform: Operating system, machine and device kind.
    """

    rows: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    pinned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    platform: str = ""


@runtime_checkable
class HoldsValues(Protocol):
    """What a program was cut into, with the values that its engines would get."""

    def values(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Values of all slots, by engine and slot, flat."""


@runtime_checkable
class Backend(Protocol):
    """What compiles models into engines."""

    @property
    def name(self) -> str:
        """Its name, as users write it."""

    def compile(
        self, program: torch.export.ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> OpenedModule:
        """Compile. Never changes the program, its tensors or the module it came from.

        Args:
            program: What to compile.
            options: The backend's own options.
            tools: What the pipeline lends.

        Raises:
            ConfigError: An option does not exist.
            NotRefittableError: An option would make the engine unfit for refits.
            ToolchainError: A tool is missing; names what to install.
            CompileError: The compiler refused the program.
        """

    def draft(
        self, parts: Mapping[str, Any], module: OpenedModule | None, tools: Tools
    ) -> PlanDraft:
        """How every slot follows from the program.

        Args:
            parts: What ``refitkit_partition`` made of the program: a part for each engine.
            module: The opened target; None when planning offline.
            tools: What the pipeline lends.

        Raises:
            PlanMismatchError: The program is not the one that was compiled.
            UnsupportedTargetError: The backend cannot plan offline.
        """

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """What a saved file or folder holds, as plain data, without running any of its code.

        Returns:
            None where the file is not this backend's.

        Raises:
            UnsupportedTargetError: It is this backend's, and broken.
        """

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """What a saved file or folder keeps beside its engines, by name; runs no code of it.

        Returns:
            Nothing where the file is not this backend's, or keeps nothing.

        Raises:
            UnsupportedTargetError: It is this backend's, and broken.
        """


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on beside the program, known before it is made.

    Attributes:
        text: Options and settings, as text: where it differs, so may the plan.
        versions: What ``PlanDraft.versions`` will be.
        platform: What ``PlanDraft.platform`` will be.
        settings: What ``PlanDraft.settings`` will be; None where only planning can tell.
    """

    text: str
    versions: Mapping[str, str]
    platform: str
    settings: Mapping[str, str] | None = None


@runtime_checkable
class KnowsPlanKey(Protocol):
    """A backend whose plans may be kept in ``Config.plan_cache``: they cost more than a look-up."""

    def plan_key(
        self,
        program: torch.export.ExportedProgram,
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """What the plan will depend on, without planning.

        Args:
            program: What would be planned; it is read only.
            module: The opened target; None when planning offline.
            options: The backend's own options.

        Returns:
            None where it depends on things of which nothing is known.

        Raises:
            ConfigError: An option cannot be meant.
        """


class BindableProgram(Protocol):
    """A program that was kept without its weights."""

    def bind(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> Callable[..., Any]:
        """The program as an eager callable with the source's weights.

        Raises:
            SourceError: The source lacks something that the program needs.
        """

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> torch.export.ExportedProgram:
        """The program with the source's weights, which it shares with the source.

        Raises:
            SourceError: The source lacks something that the program needs.
            PlanMismatchError: The kept program is damaged.
        """


@dataclass(frozen=True)
class MapRequest:
    """What a strategy is asked.

    Attributes:
        plan: The plan, bound to the module.
        module: The opened target.
        source: Where the new weights come from.
        wanted: Rows that still need a value.
        program: The program that was kept, without weights; None where there is none.
        tools: What the pipeline lends.
    """

    plan: Plan
    module: OpenedModule
    source: WeightSource
    wanted: tuple[LedgerRow, ...]
    program: BindableProgram | None = None
    tools: Tools = field(default_factory=Tools)


@dataclass(frozen=True)
class Mapped:
    """What a strategy answers.

    Attributes:
        values: Values by ``(engine, slot)``.
        declined: Why it does not serve the others, by ``(engine, slot)``.
    """

    values: Mapping[tuple[str, str], SlotValue]
    declined: Mapping[tuple[str, str], str] = field(default_factory=dict)


@runtime_checkable
class MappingStrategy(Protocol):
    """One way to get values for slots."""

    @property
    def name(self) -> str:
        """Its name, as users write it in ``Config.strategies``."""

    @property
    def priority(self) -> int:
        """Strategies are tried from the lowest to the highest."""

    def map(self, request: MapRequest) -> Mapped:
        """Values for as many of the wanted rows as it can prove right; never a guess."""


@dataclass(frozen=True)
class VerifyRequest:
    """What a verifier has to work with.

    Attributes:
        plan: The plan.
        module: The opened target, still with its old weights while ``prepare`` runs.
        source: The new weights.
        values: The new values by ``(engine, slot)``.
        inputs: Positional and keyword inputs; None where the user gave none.
        reference: What the user gave as reference: a callable or the outputs themselves.
        program: The program that was kept, without weights; None where there is none.
        tolerances: ``(absolute, relative)`` by dtype name; see :class:`refitkit.config.Config`.
        tools: What the pipeline lends.
    """

    plan: Plan
    module: OpenedModule
    source: WeightSource
    values: Mapping[tuple[str, str], SlotValue]
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    reference: Any
    program: BindableProgram | None
    tolerances: Mapping[str, tuple[float, float]]
    tools: Tools = field(default_factory=Tools)


@runtime_checkable
class Verifier(Protocol):
    """One way to judge a refitted module."""

    @property
    def name(self) -> str:
        """Its name, as users write it in ``verify=``."""

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Do all that can be done before anything is written; return what judges afterwards.

        Raises:
            RefitError: It cannot judge (no inputs, nothing to compare with, no readback). Raised
                here, it stops the refit before anything was written.
        """
