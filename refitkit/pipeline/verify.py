"""The stage ``verify``: choose a verifier, and turn what it finds into a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from refitkit.config import TOLERANCES
from refitkit.errors import ConfigError, NotRefittableError, PluginError, Problem, raised_as
from refitkit.protocols import LowersPrecision, Offline, SupportsReadback

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import VerificationResult
    from refitkit.protocols import OpenedModule, Verifier, VerifyRequest

NONE = "none"


def choose(
    host: Host, wanted: str | None, module: OpenedModule, *, with_inputs: bool
) -> Verifier | None:
    """The verifier that was asked for, or the best that this refit allows.

    Returns:
        None where ``none`` was asked for, or nothing can be verified.

    Raises:
        ConfigError: There is no verifier of this name; lists those that there are.
        NotRefittableError: It calls the module, which cannot be called here.
    """
    if wanted == NONE:
        return None
    offered: dict[str, Verifier] = host.named("refitkit_verifiers")
    if wanted is not None and wanted not in offered:
        names = ", ".join([*sorted(offered), NONE])
        raise ConfigError(f"There is no verifier {wanted!r}.", hint=f"There are: {names}.")
    if wanted == "outputs" and isinstance(module, Offline):
        raise NotRefittableError(
            "The verifier 'outputs' calls the module, which cannot be done here.",
            hint=f"{module.offline} verify={module.verifier!r} judges it without a call.",
        )
    if wanted is None:
        with_inputs = with_inputs and not isinstance(module, Offline)
        readable = all(isinstance(e, SupportsReadback) for e in module.engines.values())
        wanted = "outputs" if with_inputs else "weights" if readable else NONE
    return offered.get(wanted)


def prepared(
    verifier: Verifier, request: VerifyRequest
) -> Callable[[OpenedModule], VerificationResult]:
    """What will judge the module; everything else is done before anything is written.

    Raises:
        RefitError: The verifier cannot judge this refit.
        PluginError: It failed, now or when it judges; names it.
    """
    failed = f"The verifier {verifier.name!r} failed"
    doing = f"The weights cannot be judged by {verifier.name!r}"
    with raised_as(PluginError, f"{failed} to prepare", doing=doing):
        judge = verifier.prepare(request)

    def judging(module: OpenedModule) -> VerificationResult:
        with raised_as(PluginError, failed, doing=doing):
            return judge(module)

    return judging


def tolerances_for(config: Config, module: OpenedModule) -> Mapping[str, tuple[float, float]]:
    """The configured tolerances; the default ones by the precision that a module computes in."""
    if not isinstance(module, LowersPrecision):
        return config.tolerances
    lower = {
        name: config.tolerances[kind]
        for name, kind in module.precision.items()
        if config.tolerances[name] == TOLERANCES[name]
    }
    return {**config.tolerances, **lower}


def as_inputs(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """Inputs as users give them.

    A sequence of positional ones, a mapping of keyword ones, or a pair of both:
    ``((x,), {"mask": mask})``.

    Raises:
        ConfigError: Anything else.
    """
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple) and _is_pair(inputs):
        return tuple(inputs[0]), inputs[1]
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise ConfigError(
        f"inputs= is a {type(inputs).__name__}.",
        hint="Pass positional ones as a tuple, inputs=(x,), keyword ones as a dict, or both.",
    )


def require_used(reference: Any, inputs: object, verifier: str | None) -> None:
    """Check that outputs to compare with are not given in vain.

    Raises:
        ConfigError: There are no inputs, and no verifier was named that might do without.
    """
    if reference is not None and inputs is None and verifier is None:
        raise ConfigError(
            "reference= is what outputs are compared with, and there are no inputs to call with.",
            hint="Pass inputs=, too.",
        )


def why_unused(inputs: object, wanted: str | None, module: OpenedModule) -> str:
    """Why inputs are given in vain, for the report; nothing where they are used."""
    if inputs is None or wanted is not None or not isinstance(module, Offline):
        return ""
    return module.offline


def _is_pair(inputs: tuple[Any, ...]) -> bool:
    match inputs:
        case (tuple(), dict() as named):
            return all(isinstance(name, str) for name in named)
    return False


def problems_of(result: VerificationResult) -> list[Problem]:
    """What a verifier found wrong."""
    wrong = [Problem(m.name, m.note or "differs") for m in result.measures if not m.ok]
    return wrong or [Problem(result.verifier, result.note or "failed")]
