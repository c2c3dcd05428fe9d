"""What converters declare about constants that no recording can follow.

A converter that computes a constant in NumPy or in a C library leaves torch, so a recording does
not see which weights the constant is made of. :func:`made_of` declares it.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from refitkit.errors import CompileError, Problem, raised_as
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.origins import Literal, Unknown, leaves_below
from refitkit.recipe.tape import active_tape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.recipe.tape import Tape

Constant = TypeVar("Constant", torch.Tensor, np.ndarray)
_HINT = (
    "Correct the declaration in the converter. Without a formula the slot is left to other "
    "strategies."
)


def made_of(
    constant: Constant,
    *weights: torch.Tensor | str,
    formula: Callable[..., torch.Tensor] | None = None,
) -> Constant:
    """Declare the weights that a constant of a converter is made of, and return the constant.

    Call it in a converter, before TensorRT gets the constant. Where refitkit records nothing it
    only returns the constant, so converters work everywhere.

    With a formula, each refit computes the constant from the new weights. Without one, the slot of
    the constant is ``unmapped``: a refit needs another strategy for it, and is refused otherwise.

    Args:
        constant: The tensor or NumPy array, of any shape, whose memory the layer gets.
        weights: Weights that the constant is made of: tensors that the converter got, or names of
            parameters and buffers.
        formula: Computes the constant from ``weights``, all of which must be tensors, by torch ops.
            The result must have the dtype, the number of elements and the bits of the constant.

    Raises:
        CompileError: The formula gives another value, or fails; a weight does not exist, or is a
            tensor that refitkit does not follow. Lists all problems.
    """
    tape = active_tape()
    if tape is not None:
        _declare(tape, constant, weights, formula)
    return constant


def _declare(
    tape: Tape,
    constant: torch.Tensor | np.ndarray,
    weights: tuple[torch.Tensor | str, ...],
    formula: Callable[..., torch.Tensor] | None,
) -> None:
    problems = list(_problems_of(tape, weights, has_formula=formula is not None))
    if problems:
        raise CompileError(
            "A converter declares a constant to be made of other things than weights.",
            problems=problems,
            hint=_HINT,
        )
    with tape.paused():
        held = torch.from_numpy(constant) if isinstance(constant, np.ndarray) else constant
    names = _names(tape, weights)
    if formula is not None:
        result = _computed(tape, held, weights, formula, _text(names))
        origin = tape.origin_of(result)
        tape.provenance.declare(held, origin.node, origin.output)
    elif names:
        reason = (
            f"its converter declares that it is made of {_text(names)} and gives no formula, so "
            "only another strategy, of a plugin or 'rebuild', can compute it"
        )
        tape.provenance.declare(held, Unknown(reason, frozenset(names)), 0)
    else:  # the operands are literals of the graph
        tape.provenance.declare(held, Literal(tape.provenance.snapshot(held), seen=True), 0)


def _problems_of(
    tape: Tape, weights: tuple[torch.Tensor | str, ...], *, has_formula: bool
) -> Iterator[Problem]:
    known = tape.provenance.leaf_names
    if not weights:
        yield Problem("made_of", "names no weight")
    for number, weight in enumerate(weights):
        subject = repr(weight) if isinstance(weight, str) else f"weight {number}"
        if not isinstance(weight, str):
            if not tape.sees(weight):
                kind = type(weight).__name__
                yield Problem(subject, "not a tensor that refitkit follows", kind)
            elif None in leaves_below(tape.origin_of(weight)):
                yield Problem(subject, "a tensor of unknown origin")
        elif has_formula:
            yield Problem(subject, "a name", wanted="a tensor, which the formula takes")
        elif weight not in known:
            near = get_close_matches(weight, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else ""
            yield Problem(subject, "no weight of the program", hint=hint)


def _names(tape: Tape, weights: tuple[torch.Tensor | str, ...]) -> list[str]:
    """FQNs of all leaves that the weights follow from, sorted."""
    found: set[str] = set()
    for weight in weights:
        if isinstance(weight, str):
            found.add(weight)
        else:
            found |= {name for name in leaves_below(tape.origin_of(weight)) if name}
    return sorted(found)


def _text(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "literals"


def _computed(
    tape: Tape,
    constant: torch.Tensor,
    weights: tuple[torch.Tensor | str, ...],
    formula: Callable[..., torch.Tensor],
    names: str,
) -> torch.Tensor:
    """The result of a formula, in the shape and on the device of the constant.

    Raises:
        CompileError: It has other bits than the constant.
    """
    # the numbers of a formula are its own, whatever the converter has read before
    with tape.provenance.trusting_numbers():
        with raised_as(CompileError, f"The formula of a constant made of {names} fails"):
            result = formula(*weights)
        if not tape.sees(result):
            raise _wrong(names, "not a tensor that refitkit follows", type(result).__name__, "")
        wanted = f"{dtype_name(constant.dtype)}, {constant.numel()} elements"
        found = f"{dtype_name(result.dtype)}, {result.numel()} elements"
        if found != wanted:
            raise _wrong(names, "dtype or size", found, wanted)
        result = result.detach().to(constant.device).reshape(constant.shape)
    with tape.paused():
        is_right = same_bits(result.contiguous(), constant.detach().contiguous())
        if not is_right:
            raise _wrong(names, "other bits", *_difference(result, constant))
    return result


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> tuple[str, str]:
    """The first elements that differ, as text; with equal text if only signs of zeros differ."""
    one, other = found.reshape(-1), wanted.detach().reshape(-1)
    places = (one != other).nonzero()
    place = int(places[0]) if len(places) else 0
    return f"element {place} is {one[place].item()!r}", f"{other[place].item()!r}"


def _wrong(names: str, kind: str, found: str, wanted: str) -> CompileError:
    return CompileError(
        "A converter declares a formula that does not give its constant.",
        problems=[Problem(f"constant made of {names}", kind, found, wanted)],
        hint=_HINT,
    )
