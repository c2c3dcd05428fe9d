"""Verifiers: objects that check a module after a refit and decide whether to keep the weights.

A plugin offers verifiers with the hook ``refitkit_verifiers``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability
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
    """The input of ``Verifier.prepare``.

    Attributes:
        plan: Plan of the refit.
        module: Opened target. In a refit it still has its old weights while ``prepare`` runs.
        source: New weights, under the names that the program reads.
        values: New values by ``(engine, slot)``. Slots that keep their values are missing.
        inputs: Positional and keyword inputs; None if the user passed none.
        reference: Reference that the user passed: a callable or the expected outputs; None if the
            user passed none.
        program: Stored program without weights; None if the module was saved without one.
        tolerances: ``(absolute, relative)`` by dtype name; see :class:`refitkit.config.Config`.
        tools: Services of the pipeline.
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
class Verifier(Protocol, metaclass=Ability):
    """A method to check a refitted module."""

    @property
    def name(self) -> str:
        """Name of the verifier, as users write it in ``verify=``. ``none`` is reserved."""

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Do all work that does not need the new weights live, and return the check itself.

        In a refit, refitkit calls this before anything is staged, while calls of the module run. It
        calls the returned check once. If the module publishes (:class:`OpensStaged`), it does so
        before the commit, with another module than ``request.module``: one that has the staged
        weights. Otherwise it does so after the commit, behind the closed gate; keep the check
        short, since calls of the module wait. Check the module that you are given, and call it with
        ``OpenedModule.probe``. ``refitkit.verify`` calls both, one right after the other.

        Returns:
            A callable that gets the module with the new weights. A result that is not ``ok`` makes
            refitkit drop them and raise ``VerificationError``.

        Raises:
            RefitError: The verifier cannot check this refit: no inputs, no reference, no readback.
                Nothing is changed. Any other exception, here or in the check, becomes a
                ``PluginError`` that names the verifier.
        """
