"""The stage ``verify``: choose a verifier, let it prepare, and turn its findings into a verdict.

``verification`` is the one place that does so, for refits, restores and ``verify_live``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from refitkit.config import TOLERANCES
from refitkit.errors import (
    ConfigError,
    NotRefittableError,
    PluginError,
    Problem,
    VerificationError,
    raised_as,
)
from refitkit.offered import owned, received_verdict, shown
from refitkit.pipeline.checks import check_weights
from refitkit.pipeline.gate import inside_all
from refitkit.pipeline.mapping import map_slots, require_all_slots
from refitkit.pipeline.module import alone
from refitkit.pipeline.needs import require_needs
from refitkit.pipeline.stage import publishes
from refitkit.pipeline.targets import open_weights, require_unchanged
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.protocols import (
    LowersPrecision,
    Offline,
    SupportsReadback,
    VerifyRequest,
)

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import SlotKey, VerificationResult
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.module import CompiledModule
    from refitkit.protocols import OpenedModule, SlotValue, Verifier, WeightSource
    from refitkit.recipe import RefitPlan

    Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]

Judge: TypeAlias = "Callable[[OpenedModule], VerificationResult]"
"""Checks a module with its new weights; made before anything is written."""

NONE = "none"
_HOOK = "refitkit_verifiers"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How a user wants a result verified; see :func:`refitkit.refit` for the meanings.

    Attributes:
        inputs: A tuple of positional inputs, a dict of keyword inputs, or a pair of both.
        reference: A callable or outputs to compare with.
        verify: Name of a verifier, ``none``, or None for the best that is possible.
    """

    inputs: Any = None
    reference: Any = None
    verify: str | None = None


def verification(
    context: Context,
    compiled: CompiledModule,
    options: VerifyOptions,
    *,
    verb: str,
    plan: RefitPlan,
    source: WeightSource,
    values: Callable[[], Mapping[SlotKey, SlotValue]],
    outputs_by_default: bool = True,
) -> Judge | None:
    """Prepare the check of a module, with all work that can be done before the commit.

    Args:
        context: Plugins and settings.
        compiled: The module, with its old weights.
        options: How the user wants the module verified.
        verb: Name of the verb, for progress.
        plan: The plan that is followed.
        source: The new weights.
        values: Gives the new values of all slots.
        outputs_by_default: Whether given inputs alone make ``outputs`` the verifier.

    Returns:
        The check; None if the user passed ``none``, or nothing can be verified.

    Raises:
        ConfigError: There is no verifier of this name, or ``inputs`` or ``reference`` are unusable.
        NotRefittableError: The verifier calls the module, which cannot be called here.
        RefitError: The verifier cannot check this refit.
        PluginError: The verifier failed, now or in the check; names the verifier.
    """
    module = compiled.opened
    inputs = as_inputs(options.inputs)
    _require_reference_used(options, inputs)
    with_inputs = inputs is not None and outputs_by_default
    verifier = choose(context.host, options.verify, module, with_inputs=with_inputs)
    if verifier is None:
        return None
    request = VerifyRequest(
        plan=plan,
        module=module,
        source=source,
        # asked for only now: without a verifier, unchanged slots need no values
        values=values(),
        inputs=inputs,
        reference=options.reference,
        program=compiled.program,
        tolerances=tolerances_for(context.config, module),
        tools=context.tools(verb, "verify"),
    )
    who = owned(_HOOK, verifier.name, context.host.offers(_HOOK)[verifier.name].plugin)
    doing = f"The weights cannot be verified by {verifier.name!r}"
    with raised_as(PluginError, f"{who} failed to prepare", doing=doing):
        judge = verifier.prepare(request)
    if not callable(judge):
        raise PluginError(
            f"{who} prepared {shown(judge)}, which cannot be called.",
            hint="See refitkit.protocols.Verifier.",
        )

    def judging(module: OpenedModule) -> VerificationResult:
        with raised_as(PluginError, f"{who} failed", doing=doing):
            return received_verdict(judge(module), who)

    return judging


def verify_live(
    context: Context,
    compiled: CompiledModule,
    weights: object,
    plan: RefitPlan | None,
    options: VerifyOptions,
) -> VerificationResult:
    """Verify that a module holds given weights; see ``Pipeline.verify``."""
    # the same steps as a refit up to the check, so that wrong weights get the same errors
    plan = plan or compiled.plan
    if plan is None:
        raise ConfigError("The module has no plan: pass plan=.")
    require_needs(context, plan)
    plan.check_engines(compiled.backend, compiled.slots)
    source = transformed(context, plan, open_weights(context, weights), compiled.opened)
    mapping = map_slots(context, plan, compiled.opened, source, compiled.program)
    check_weights(context, plan, compiled.opened, source, partial=False)
    require_all_slots(mapping, source)
    mapping.require_complete()

    def verdict() -> VerificationResult | None:
        judge = verification(
            context,
            compiled,
            options,
            verb="verify",
            plan=plan,
            source=source,
            values=lambda: mapping.values,
        )
        return None if judge is None else judge(compiled.opened)

    # No refit may come between, and no call that writes state: a verifier copies state of the
    # module while it prepares, and the module answers from that state.
    passages = [compiled.gate.refit, *alone([compiled])]
    if not publishes(compiled.opened):
        passages.append(compiled.gate.exclusive)
    result = inside_all(passages, verdict)
    if result is None:
        raise ConfigError(
            "Nothing can be verified: the engines cannot be read and no inputs were given."
        )
    if isinstance(source, Transformed):
        result = result.model_copy(update={"notes": source.notes()})
    # after the verification, which reads the files: all of it must be one version
    require_unchanged(source, reread=context.config.reread)
    if not result.ok:
        message = f"The module does not hold {source.description}."
        raise VerificationError(message, problems=problems_of(result), report=result)
    return result


def choose(
    host: Host, wanted: str | None, module: OpenedModule, *, with_inputs: bool
) -> Verifier | None:
    """The verifier that was asked for, or the best that is possible.

    Returns:
        None if ``none`` was asked for, or nothing can be verified.

    Raises:
        ConfigError: There is no verifier of this name; lists those that there are.
        NotRefittableError: The verifier calls the module, which cannot be called here.
    """
    if wanted == NONE:
        return None
    offered: dict[str, Verifier] = host.named(_HOOK)
    if wanted is not None and wanted not in offered:
        names = ", ".join([*sorted(offered), NONE])
        raise ConfigError(f"There is no verifier {wanted!r}.", hint=f"There are: {names}.")
    if wanted == "outputs" and isinstance(module, Offline):
        raise NotRefittableError(
            "The verifier 'outputs' calls the module, which cannot be called here.",
            hint=f"{module.offline} verify={module.verifier!r} verifies it without a call.",
        )
    if wanted is None:
        with_inputs = with_inputs and not isinstance(module, Offline)
        readable = all(isinstance(e, SupportsReadback) for e in module.engines.values())
        wanted = "outputs" if with_inputs else "weights" if readable else NONE
    # None for NONE, and for a built-in verifier whose plugin is switched off
    return offered.get(wanted)


def tolerances_for(config: Config, module: OpenedModule) -> Mapping[str, tuple[float, float]]:
    """Tolerances ``(absolute, relative)`` by dtype, for the precision that a module computes in.

    A tolerance that the user set stays as it is.
    """
    if not isinstance(module, LowersPrecision):
        return config.tolerances
    # TF32 computes float32 with the precision of float16, so that dtype's tolerance applies
    lower = {
        name: config.tolerances[kind]
        for name, kind in module.precision.items()
        if config.tolerances[name] == TOLERANCES[name]
    }
    return {**config.tolerances, **lower}


def as_inputs(inputs: Any) -> Inputs | None:
    """Inputs of a call, as positional and keyword inputs; None if there are none.

    Args:
        inputs: A sequence of positional inputs, a mapping of keyword inputs, or a tuple of both:
            ``((x,), {"mask": mask})``.

    Raises:
        ConfigError: It is anything else.
    """
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple):  # a list is never a pair, but a pattern would match one
        match inputs:
            case (tuple() as positional, dict() as named) if all(isinstance(n, str) for n in named):
                return positional, named
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise ConfigError(
        f"inputs= must be a tuple, a list or a dict, and is a {type(inputs).__name__}.",
        hint="Pass positional inputs as a tuple, inputs=(x,), keyword inputs as a dict, or both.",
    )


def why_unused(options: VerifyOptions, module: OpenedModule) -> str:
    """Why given inputs are not used, for the report; empty if they are, or there are none."""
    if options.inputs is None or options.verify is not None or not isinstance(module, Offline):
        return ""
    return module.offline


def problems_of(result: VerificationResult) -> list[Problem]:
    """The findings that made a verdict bad."""
    wrong = [Problem(m.name, m.why or "differs") for m in result.measures if not m.ok]
    return wrong or [Problem(result.verifier, result.note or "failed")]


def _require_reference_used(options: VerifyOptions, inputs: Inputs | None) -> None:
    """Raise ConfigError if there is a reference, and no call whose outputs it is compared with."""
    if options.reference is not None and inputs is None and options.verify is None:
        raise ConfigError(
            "reference= is compared with outputs, and there are no inputs to call the module with.",
            hint="Pass inputs=, too.",
        )
