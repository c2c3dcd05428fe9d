"""Ways to judge a refitted module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from refitkit.protocols.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.model import VerificationResult
    from refitkit.protocols.engines import SlotValue
    from refitkit.protocols.modules import OpenedModule
    from refitkit.protocols.plans import BindableProgram, Plan
    from refitkit.protocols.sources import WeightSource


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
