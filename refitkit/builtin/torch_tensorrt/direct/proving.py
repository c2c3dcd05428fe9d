"""Prove that writing by a layout does what TensorRT's refit does.

Nothing is taken from ``learning`` on trust. The values of the proof differ in every element, all
memory that TensorRT asked for is compared, and so are answers: of contexts made before and after,
and of a second engine of the same bytes that TensorRT never refitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from refitkit.builtin.torch_tensorrt.direct.learning import Refittable, UnknownLayoutError
from refitkit.errors import UnsupportedTargetError
from refitkit.program.bits import same_bits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout


class Answering(Protocol):
    """An engine whose memory is known, and that can be called."""

    def pieces(self) -> Sequence[torch.Tensor]:
        """See ``Refittable``."""

    def answers(self, *, late: bool) -> Sequence[torch.Tensor]:
        """Return its outputs for fixed inputs, three for each profile.

        Args:
            late: Whether in the second context, which is made when it is first asked for, or in
                the first one.
        """


class Provable(Refittable, Answering, Protocol):
    """An engine that TensorRT can refit, whose memory is known, and that can be called."""


def prove(
    engine: Provable,
    untouched: Answering,
    layout: EngineLayout,
    values: Mapping[str, torch.Tensor],
) -> None:
    """Prove a layout; both engines hold ``values`` afterwards.

    Args:
        engine: The engine from which the layout was learned.
        untouched: Another engine of the same bytes, which TensorRT never refitted.
        layout: The layout.
        values: Values of all weights, flat, on the device of the engines.

    Raises:
        UnknownLayoutError: The layout is wrong or does not suffice.
    """
    try:
        counts = {name: value.numel() for name, value in values.items()}
        layout.check(counts, engine.pieces()[layout.piece].device)
    except UnsupportedTargetError as exc:
        raise UnknownLayoutError(str(exc)) from exc
    proof = _Proof(engine, untouched, layout, [values, _others(values, layout)])
    proof.memory()
    proof.answers()
    proof.untouched()


def _others(values: Mapping[str, torch.Tensor], layout: EngineLayout) -> dict[str, torch.Tensor]:
    """Return values that differ in each element that can be written, and have the same signs."""
    generator = torch.Generator().manual_seed(0)
    found = dict(values)
    for name, value in values.items():
        if name in layout.fixed:
            continue
        factor = 1.25 + torch.rand(value.numel(), generator=generator) / 2
        new = (value.float() * factor.to(value.device)).to(value.dtype)
        # zeros, and what is lost in rounding
        found[name] = torch.where(new == value, value + 2.0**-6, new).to(value.dtype)
    for fold in layout.folds:  # beside its variances, an eps would be lost in rounding
        eps, var = found[fold.eps], values[fold.var]
        found[fold.eps] = (eps.float() + var.float().abs().mean()).to(eps.dtype)
    return found


class _Proof:
    """The parts of the proof."""

    def __init__(
        self,
        engine: Provable,
        untouched: Answering,
        layout: EngineLayout,
        values: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        self._engine, self._untouched = engine, untouched
        self._layout, self._values = layout, values
        self._answers: list[list[torch.Tensor]] = []

    def memory(self) -> None:
        """All memory of the engine, after TensorRT's refit and after ours. No call in between."""
        refitted = []
        for values in self._values:
            self._engine.refit(values)
            refitted.append([piece.clone() for piece in self._engine.pieces()])
        for values, wanted in reversed(list(zip(self._values, refitted, strict=True))):
            self._write(self._engine, values)
            _require_same(self._engine.pieces(), wanted, "memory after TensorRT's refit")
        if all(map(torch.equal, *refitted)):
            raise UnknownLayoutError("a refit changes no memory that is known")

    def answers(self) -> None:
        """Answers of the engine."""
        for values in self._values:
            self._engine.refit(values)
            found = [one.clone() for one in self._engine.answers(late=False)]
            if not all(map(same_bits, found, self._engine.answers(late=False))):
                raise UnknownLayoutError("its answers differ from call to call")
            self._answers.append(found)
        if all(map(same_bits, *self._answers)):
            raise UnknownLayoutError("its answers do not depend on its weights")
        for number in (0, 1, 0):
            self._write(self._engine, self._values[number])
            self._require_answers(self._engine, number)

    def untouched(self) -> None:
        """Answers of the other engine, and memory that calls write to."""
        sizes = [[len(piece) for piece in one.pieces()] for one in (self._engine, self._untouched)]
        if sizes[0][: self._layout.piece + 1] != sizes[1][: self._layout.piece + 1]:
            raise UnknownLayoutError("a second engine of the same bytes has other memory")
        first, last = self._layout.span
        self._untouched.answers(late=False)  # its first context is made before anything is written
        for number in (1, 0, 1, 0):
            self._write(self._untouched, self._values[number])
            span = self._untouched.pieces()[self._layout.piece][first:last]
            before = span.clone()
            self._require_answers(self._untouched, number)
            if not torch.equal(span, before):
                raise UnknownLayoutError("calls write between its weights")

    def _write(self, engine: Answering, values: Mapping[str, torch.Tensor]) -> None:
        self._layout.write(engine.pieces()[self._layout.piece], values)

    def _require_answers(self, engine: Answering, number: int) -> None:
        for late in (False, True):
            _require_same(engine.answers(late=late), self._answers[number], "answers")


def _require_same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], what: str) -> None:
    if len(found) != len(wanted) or not all(map(same_bits, found, wanted)):
        raise UnknownLayoutError(f"weights written to their places give other {what}")
