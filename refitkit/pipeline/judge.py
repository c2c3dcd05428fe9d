"""Judging a module as it is: does it hold these weights? Nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, VerificationError
from refitkit.pipeline import verify
from refitkit.pipeline.check import check_weights
from refitkit.pipeline.gate import inside_all
from refitkit.pipeline.load import open_weights, require_unchanged
from refitkit.pipeline.mapping import map_slots, require_all
from refitkit.pipeline.needs import require_needs
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.protocols import VerifyRequest

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import VerificationResult
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.refit import RefitRequest


def verify_live(
    host: Host, config: Config, compiled: CompiledModule, wish: RefitRequest
) -> VerificationResult:
    """Hold a module against weights; see ``Pipeline.verify``."""
    plan = wish.plan or compiled.plan
    if plan is None:
        raise ConfigError("The module has no plan: pass plan=.")
    inputs = verify.as_inputs(wish.inputs)
    verify.require_used(wish.reference, inputs, wish.verify)
    verifier = verify.choose(host, wish.verify, compiled.opened, with_inputs=inputs is not None)
    if verifier is None:
        raise ConfigError(
            "Nothing can be verified: the engines cannot be read and no inputs were given."
        )
    require_needs(host, config, plan)
    plan.check_engines(compiled.backend, compiled.slots)
    source = transformed(host, config, plan, open_weights(host, wish.weights, config))
    mapping = map_slots(host, plan, compiled.opened, source, compiled.program, config)
    check_weights(host, plan, compiled.opened, source, partial=False, config=config)
    require_all(mapping, source)
    mapping.require_complete()
    request = VerifyRequest(
        plan=plan,
        module=compiled.opened,
        source=source,
        values=mapping.values,
        inputs=inputs,
        reference=wish.reference,
        program=compiled.program,
        tolerances=verify.tolerances_for(config, compiled.opened),
        tools=tools_for(host, config, "verify", "verify"),
    )
    passages = [compiled.gate.refit, compiled.gate.alone]
    result = inside_all(passages, lambda: verify.prepared(verifier, request)(compiled.opened))
    if isinstance(source, Transformed):
        result = result.model_copy(update={"notes": source.notes()})
    require_unchanged(source, reread=config.reread)
    if not result.ok:
        message = f"The module does not hold {source.description}."
        raise VerificationError(message, problems=verify.problems_of(result), report=result)
    return result
