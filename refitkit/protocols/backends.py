"""What compiles models into engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from refitkit.model import Guard, LedgerRow, OpCall
    from refitkit.protocols.modules import OpenedModule
    from refitkit.protocols.tools import Tools


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
        layer_types: Names of the layer types of ``Tools`` in whose layers weights were found.
    """

    rows: tuple[LedgerRow, ...]
    calls: tuple[OpCall, ...] = ()
    guards: tuple[Guard, ...] = ()
    pinned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    platform: str = ""
    layer_types: tuple[str, ...] = ()


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
