"""Backends: objects that compile programs into engines and open what they saved.

A plugin registers its backends with the hook ``refitkit_register_backends``. :class:`Backend` is
the required interface. A backend may also implement :class:`KnowsPlanKey`; the parts that
``refitkit_partition`` returns for it may implement :class:`HoldsValues`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from refitkit.model import Guard, LedgerRow, OpCall
    from refitkit.protocols.modules import OpenedModule
    from refitkit.protocols.tools import Tools


@runtime_checkable
class Backend(Protocol, metaclass=Ability):
    """A compiler for programs, and the reader of the files that it saves.

    One object serves all verbs of a pipeline, so it keeps no state of a single module.
    """

    @property
    def name(self) -> str:
        """Name of the backend, as users write it: ``refitkit.compile(program, backend=name)``."""

    def compile(
        self, program: torch.export.ExportedProgram, options: Mapping[str, Any], tools: Tools
    ) -> OpenedModule:
        """Return the compiled module, ready for calls and refits.

        ``refitkit.compile`` calls this once. It does not change the program, its tensors or the
        module that the program was exported from.

        Args:
            program: Program to compile.
            options: Options of this backend, by name.
            tools: Services of the pipeline.

        Raises:
            ConfigError: An option does not exist.
            NotRefittableError: An option would make the engine unfit for refits.
            ToolchainError: A tool is missing. The message names what to install.
            CompileError: The compiler refused the program.
        """

    def draft(
        self, parts: Mapping[str, Any], module: OpenedModule | None, tools: Tools
    ) -> PlanDraft:
        """Return how the value of every slot follows from the program.

        refitkit calls this when it makes a plan: after ``compile``, and for ``refitkit.plan``. It
        changes neither the program nor the module.

        Args:
            parts: One part of the program for each engine, by engine name. The hook
                ``refitkit_partition`` of the same backend returned them.
            module: Opened target; None when planning offline.
            tools: Services of the pipeline.

        Returns:
            One row for every slot of every engine, unmapped slots included.

        Raises:
            PlanMismatchError: The program is not the one that was compiled.
            UnsupportedTargetError: The backend cannot plan offline.
        """

    def describe(self, path: Path) -> Mapping[str, Any] | None:
        """Return the content of a saved file or folder as plain data, without running its code.

        ``Pipeline.describe`` and ``refitkit inspect`` ask one backend after another.

        Args:
            path: File or folder that exists.

        Returns:
            Facts by name; None if this backend did not write the file.

        Raises:
            UnsupportedTargetError: This backend wrote the file, and the file is damaged.
        """

    def attachments(self, path: Path) -> Mapping[str, bytes]:
        """Return the data that was saved beside the engines, without running any code of the file.

        refitkit stores its plan there. It calls this to read a plan without opening the module.

        Args:
            path: File or folder that exists.

        Returns:
            The ``attachments`` that ``OpenedModule.save`` got, by name, byte for byte. Empty if
            this backend did not write the file, or if the file has no attachments.

        Raises:
            UnsupportedTargetError: This backend wrote the file, and the file is damaged.
        """


@dataclass(frozen=True)
class PlanDraft:
    """The result of ``Backend.draft``: how slots get their values, and what was compiled.

    refitkit adds the leaves, ties and fingerprint of the program, and makes a plan of both.

    Attributes:
        rows: One row for every slot of every engine.
        calls: Calls of aten ops that the recipes in ``rows`` refer to, each after its operands.
        guards: Values that must stay as they are for the recipes to hold.
        pinned: Tensors that the plan stores, by their name in the plan.
        settings: Compilation settings, as text by name.
        versions: Versions of the software that made the engines, by package.
        platform: Operating system, machine and device kind.
        layer_types: Names of those ``Tools.layer_types`` in whose layers weights were found.
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
class HoldsValues(Protocol, metaclass=Ability):
    """A part of a program that knows the values its engine would get, without an engine.

    If the first part that ``refitkit_partition`` returns implements this, refitkit can prove a plan
    by trial offline. Without it, the report of ``refitkit.plan`` says that there is no proof.

    Asked by: the proof by trial of ``refitkit.plan``.
    Gain: ``refitkit.plan`` proves the plan without an engine, and names the strategies that it
        needs.
    """

    def values(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return the values of all slots of all engines.

        The proof of a plan calls this on programs with other weights, and compares the bits with
        the values that the plan computes.

        Returns:
            Tensors by engine name, then by slot name: the dtype of the slot, one dimension, any
            device.
        """


@dataclass(frozen=True)
class PlanKey:
    """Everything except the program that a plan depends on, known before the plan is made.

    The plan cache compares it with the key of a stored plan.

    Attributes:
        text: Options and settings as text. If two texts differ, the plans may differ.
        versions: The value that ``PlanDraft.versions`` will have.
        platform: The value that ``PlanDraft.platform`` will have.
        settings: The value that ``PlanDraft.settings`` will have; None if only planning finds it.
    """

    text: str
    versions: Mapping[str, str]
    platform: str
    settings: Mapping[str, str] | None = None


@runtime_checkable
class KnowsPlanKey(Protocol, metaclass=Ability):
    """A backend whose plans may be stored in ``Config.plan_cache``.

    Implement it if planning costs more than a look-up in the cache.

    Asked by: planning, if ``Config.plan_cache`` is set.
    Gain: a plan is read from the cache instead of made again.
    """

    def plan_key(
        self,
        program: torch.export.ExportedProgram,
        module: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> PlanKey | None:
        """Return what the plan will depend on, without planning.

        Called before ``draft``, if a plan cache is configured. It does not change the program.

        Args:
            program: Program that would be planned.
            module: Opened target; None when planning offline.
            options: Options of this backend, for planning offline. A module knows its own.

        Returns:
            The key; None if the plan depends on something unknown, so it cannot be cached.

        Raises:
            ConfigError: An option is not valid.
        """
