"""Proof by trial that a compiled module takes new weights: other weights in, right answers out.

Compilers fold what they think constant, and new versions find new things to fold: a weight that was
folded is a slot that changes nothing, or half of what it should. So a module that was just compiled
is refitted to weights that differ everywhere, and its outputs are compared with those of the
program, as any refit is verified; then it gets its own weights back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refitkit.errors import NotRefittableError, VerificationError
from refitkit.pipeline.blamed_slots import KEPT, wrong_slots
from refitkit.pipeline.held import WeightState
from refitkit.pipeline.needs import of_strategies
from refitkit.program import facts_of
from refitkit.program.views import derived_value
from refitkit.protocols import Offline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Need
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.pipeline import Pipeline

_SEEDS = (0, 1)


@dataclass(frozen=True)
class Proof:
    """How a proof by trial went.

    Attributes:
        missing: Why there is none; empty where there is one.
        needs: What plugins gave it.
    """

    missing: str = ""
    needs: tuple[Need, ...] = ()


def prove(pipeline: Pipeline, compiled: CompiledModule, program: ExportedProgram) -> Proof:
    """Refit a new module to other weights and back.

    Args:
        pipeline: What refits it.
        compiled: The module, with the program's weights.
        program: What it was compiled from.

    Raises:
        NotRefittableError: With other weights it answers wrongly; lists the outputs, and the slots
            that kept their old value.
    """
    how = _way(compiled, program)
    if how is None:
        return Proof("the program has no example inputs")
    try:
        pipeline.verify(compiled, program, inputs=how.inputs, with_=how.verifier)
    except VerificationError as exc:
        return Proof(f"it is not the program with its own weights, too: {exc.problems}")
    lax = _without_finite(pipeline)
    try:
        return _trials(lax, compiled, program, how)
    finally:
        lax.refit(compiled, program, verify="none", delta=False, rollback=True)
        compiled.free_spare()
        compiled.held = WeightState()


def _without_finite(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, for which slots may become NaN: what the program has of them comes back.

    Where a variance is 0 a folded scale can be infinite, and with moved weights it is not.
    """
    lax = copy.copy(pipeline)
    lax.config = pipeline.config.model_copy(update={"check_finite": False})
    return lax


@dataclass(frozen=True)
class _Way:
    """How a module is judged."""

    verifier: str
    inputs: object = None


def _way(compiled: CompiledModule, program: ExportedProgram) -> _Way | None:
    """By its outputs, or without a call where it cannot be called; None where neither can be."""
    if isinstance(compiled.opened, Offline):
        return _Way(compiled.opened.verifier)
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return _Way("outputs", (tuple(args), dict(kwargs or {})))


def _trials(
    pipeline: Pipeline, compiled: CompiledModule, program: ExportedProgram, how: _Way
) -> Proof:
    reason = ""
    for seed in _SEEDS:
        weights = moved_weights(program, seed)
        if compiled.plan and compiled.plan.broken_guards(pipeline.open_weights(weights)):
            reason = "other weights change values that decided what slots hold"
            continue
        try:
            result = pipeline.refit(
                compiled,
                weights,
                inputs=how.inputs,
                verify=how.verifier,
                delta=False,
                rollback=True,  # a verdict that is bad must not lose the module
            )
        except VerificationError as exc:
            if not _endless(exc):
                raise _failed(pipeline, compiled, weights, exc) from exc
            reason = "other weights make the program itself answer NaN or infinity"
        else:
            return Proof(needs=of_strategies(pipeline.host, result.report.ledger))
    return Proof(reason)


def _failed(
    pipeline: Pipeline,
    compiled: CompiledModule,
    weights: Mapping[str, torch.Tensor],
    exc: VerificationError,
) -> NotRefittableError:
    """The error of a proof that failed, with the slots that are to blame as far as that shows."""
    slots = list(wrong_slots(pipeline, compiled, weights))
    if any(problem.kind == KEPT for problem in slots):
        why = "some slots kept their old value"
    elif slots:
        why = "some slots did not get the value that the program gives them"
    else:
        why = "the compiler has made some of them part of its code, as all slots took new values"
    return NotRefittableError(
        f"With other weights than those of its compilation the module answers wrongly: {why}.",
        problems=[*slots, *exc.problems],
        hint="Options that fold constants do this, and so do converters that make numbers of "
        "weights: install the plugin that maps those. To compile all the same, and verify every "
        "refit: prove=False.",
    )


def _endless(exc: VerificationError) -> bool:
    measures = exc.report.verification.measures if exc.report else ()
    wrong = [m for m in measures if not m.ok]
    return bool(wrong) and all("NaN" in m.note for m in wrong)


def moved_weights(program: ExportedProgram, seed: int) -> dict[str, torch.Tensor]:
    """The program's weights, moved: every float by up to a quarter, none to another sign.

    So variances stay positive, and zeros and ones, which folding likes, become something else.
    Names of one tensor get one value, and views of a weight get its values. Integers and what is
    not finite stay: they may be indices and masks.
    """
    made: dict[tuple[int, ...], torch.Tensor] = {}
    moved: dict[str, torch.Tensor] = {}
    for name, value in program.state_dict.items():
        key = (value.data_ptr(), value.storage_offset(), *value.shape, *value.stride())
        if key not in made or not value.numel():
            made[key] = _moved(value.detach(), seed)
        moved[name] = made[key]
    leaves = {leaf.fqn: leaf for leaf in facts_of(program).leaves}
    views = [leaf for leaf in leaves.values() if leaf.view and leaf.persistent]
    for leaf in views:
        moved[leaf.fqn] = derived_value(leaf, leaves, moved.__getitem__, moved.__getitem__)
    return moved


def _moved(value: torch.Tensor, seed: int) -> torch.Tensor:
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        return value.clone()
    random = torch.Generator(device="cpu").manual_seed(seed * 7919 + value.numel())
    draw = torch.rand(value.shape, generator=random, dtype=torch.float32).to(value.device)
    wide = value.float()
    new = wide * (0.75 + 0.5 * draw) + torch.where(wide == 0, 0.02 + 0.02 * draw, 0.0)
    return torch.where(torch.isfinite(wide), new, wide).to(value.dtype)
