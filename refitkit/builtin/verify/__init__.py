"""Built-in verifiers: ``outputs`` and ``weights``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.protocols import Verifier


@hookimpl
def refitkit_verifiers() -> list[Verifier]:
    """Return the verifiers ``outputs`` and ``weights``."""
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.verify.outputs import OutputsVerifier
    from refitkit.builtin.verify.weights import WeightsVerifier

    return [OutputsVerifier(), WeightsVerifier()]
