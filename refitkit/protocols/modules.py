"""Opened targets, and what some of them are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from refitkit.model import SlotKey
    from refitkit.protocols.engines import Engine
    from refitkit.protocols.tools import Tools


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

    def synchronize(self) -> None:
        """Wait for work that calls have left pending on a device."""

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write it with its present weights: beside ``path``, then renamed."""

    def reopen(self) -> OpenedModule:
        """A second, independent one with the same present weights."""


@runtime_checkable
class ProbesFromState(Protocol):
    """An opened module that can be probed from another state than its present one."""

    def probe_from(
        self,
        state: Mapping[SlotKey, torch.Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Like ``OpenedModule.probe``, but these slots hold other values while it runs.

        Verifiers compute what the module should answer before the commit, from a copy of its state.
        Calls go on and write the state until the commit.

        Args:
            state: Values of slots that calls change, by ``(engine, slot)``.
            args: Positional inputs.
            kwargs: Keyword inputs.
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
