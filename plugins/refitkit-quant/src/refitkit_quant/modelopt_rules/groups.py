"""What a checkpoint has of a weight that ModelOpt quantizes, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem, WeightMismatchError
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import Made, WeightGroup

from refitkit_quant.given import info_of
from refitkit_quant.modelopt_rules import formulas
from refitkit_quant.pairs import lone_scale

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit_quant.given import Given
    from refitkit_quant.scheme import Entry, ModeloptWeight

_FLOATS = {"float32", "float16", "bfloat16"}
_ON_TWICE = "pass one of them"
_ON_GIVEN = "it was not calibrated with 'max', so it cannot be computed from the weight: pass it"
_ON_ZERO = "zero cannot be a scale: pass the weight together with a scale of your own"
_ON_ODD_SCALE = "no {dtype} amax, divided by {bound:g}, gives this scale: ModelOpt did not write it"


def offered(weight: ModeloptWeight, given: Given) -> list[WeightGroup]:
    """A group, if the source has the weight, in float or quantized; none, if it has nothing of it.

    Raises:
        WeightMismatchError: A scale without its weight, or what cannot be used; lists all of it.
    """
    checkpoint = Checkpoint(weight, given)
    problems = list(checkpoint.problems())
    if problems:
        raise WeightMismatchError("A weight does not fit its scheme.", problems=problems)
    return [checkpoint.group()] if checkpoint.has_weight else []


@dataclass(frozen=True)
class Checkpoint:
    """One weight, and what a source has of it."""

    weight: ModeloptWeight
    given: Given

    @property
    def has_weight(self) -> bool:
        """Whether it has the weight, in any form."""
        return self.weight.weight.name in self.given.names

    @property
    def _is_stored(self) -> bool:
        """Whether the weight comes quantized."""
        name = self.weight.weight.name
        return self.has_weight and self.given.info(name).dtype in formulas.STORED

    @property
    def _scale(self) -> str:
        """What an exported checkpoint calls the weight's scale.

        ``quantizer_attr_names`` in ``modelopt/torch/quantization/utils/core_utils.py`` (0.47).
        """
        return f"{self.weight.weight.name}_scale"

    @property
    def _input_scale(self) -> str:
        """What it calls the scale of the input."""
        return f"{self.weight.weight.name.removesuffix('weight')}input_scale"

    # -- headers ----------------------------------------------------------------------------

    def problems(self) -> Iterator[Problem]:
        """Why the weight cannot be made of what is given; headers only."""
        name, names = self.weight.weight.name, self.given.names
        inputs = [] if self.weight.input_amax is None else [self.weight.input_amax.name]
        if not self.has_weight:
            for scale in (self.weight.amax.name, self._scale, *inputs, self._input_scale):
                if scale in names:
                    yield lone_scale(scale, name)
            return
        yield from self._of_stored() if self._is_stored else self._of_float()
        for scale in inputs:
            if scale in names and self._input_scale in names:
                yield Problem(scale, "given twice", wanted=self._input_scale, hint=_ON_TWICE)
            elif self._input_scale in names:
                yield from self._misfits_of_scale(self._input_scale, self.weight.input_amax)

    def _of_stored(self) -> Iterator[Problem]:
        entry, names = self.weight.weight, self.given.names
        info = self.given.info(entry.name)
        if formulas.STORED[info.dtype] != self.weight.format:
            yield Problem(entry.name, "format", info.dtype, self.weight.format)
        if info.shape != entry.shape or info.unusable:
            found = info.unusable or str(info.shape)
            yield Problem(entry.name, "shape", found, str(entry.shape))
        if self._scale not in names:
            hint = "a quantized weight means nothing without it: pass both"
            yield Problem(entry.name, "weight without scale", wanted=self._scale, hint=hint)
            return
        yield from self._misfits_of_scale(self._scale, self.weight.amax)
        if self.weight.amax.name in names:
            yield Problem(self._scale, "given twice", wanted=self.weight.amax.name, hint=_ON_TWICE)

    def _of_float(self) -> Iterator[Problem]:
        entry, amax, names = self.weight.weight, self.weight.amax, self.given.names
        yield from self.given.misfits(entry)
        if self._scale in names:
            hint = f"pass {amax.name}, or the weight as it was exported with this scale"
            yield Problem(self._scale, "scale of a quantized weight", f"{entry}", hint=hint)
        if amax.name in names:
            yield from self.given.misfits(amax)
        elif self.weight.amax_is == "given":
            yield Problem(entry.name, "weight without scale", wanted=amax.name, hint=_ON_GIVEN)

    def _misfits_of_scale(self, name: str, amax: Entry | None) -> Iterator[Problem]:
        info = self.given.info(name)
        wanted = info_of(amax).count if amax else 1
        if info.unusable or info.dtype not in _FLOATS:
            yield Problem(name, "dtype", info.unusable or info.dtype, "float32")
        if info.count != wanted:
            yield Problem(name, "shape", str(info.shape), f"{wanted} elements")

    # -- values -----------------------------------------------------------------------------

    def group(self) -> WeightGroup:
        """The weight, its scale, and the scale of its input where that comes in another form."""
        weight, names = self.weight, self.given.names
        own = (self._scale,) if self._is_stored else (weight.amax.name,)
        takes = [weight.weight.name, *(name for name in own if name in names)]
        gives = {entry.name: info_of(entry) for entry in (weight.weight, weight.amax)}
        if weight.input_amax is not None and self._input_scale in names:
            takes.append(self._input_scale)
            gives[weight.input_amax.name] = info_of(weight.input_amax)
        self.given.watch(self._looks)
        return WeightGroup(tuple(takes), gives, self._make)

    def _make(self) -> Made:
        self.given.require(self._looks)
        weight, given = self.weight, self.given
        amax = self._amax()
        exact = self._exact()
        value = exact.to(dtype_of(weight.weight.dtype))
        values = {weight.weight.name: value, weight.amax.name: amax}
        if weight.input_amax is not None and self._input_scale in given.names:
            values[weight.input_amax.name] = self._from_scale(self._input_scale, weight.input_amax)
        meant = formulas.represented(value, amax, weight.format)
        return Made(values, (given.measure(weight.weight.name, exact, meant),))

    def _exact(self) -> torch.Tensor:
        """The weight as it was given, in float; where it comes quantized, not rounded once more."""
        value = self.given.read(self.weight.weight.name)
        if not self._is_stored:
            return value
        return formulas.restored(
            value, self.given.read(self._scale).reshape(self.weight.amax.shape)
        )

    def _amax(self) -> torch.Tensor:
        weight, given = self.weight, self.given
        if self._is_stored:
            return self._from_scale(self._scale, weight.amax)
        if weight.amax.name in given.names:
            return given.read(weight.amax.name)
        found = formulas.largest(given.read(weight.weight.name), weight.axis)
        return found.reshape(weight.amax.shape)

    def _from_scale(self, name: str, entry: Entry) -> torch.Tensor:
        found = self._amax_for(name, entry)
        if found is None:
            raise WeightMismatchError("A scale has no amax.", problems=[self._odd(name, entry)])
        return found

    def _amax_for(self, name: str, entry: Entry) -> torch.Tensor | None:
        scale = self.given.read(name).reshape(entry.shape)
        return formulas.amax_for(scale, self.weight.format, dtype_of(entry.dtype))

    def _odd(self, name: str, entry: Entry) -> Problem:
        bound = formulas.BOUND[self.weight.format]
        hint = _ON_ODD_SCALE.format(dtype=entry.dtype, bound=bound)
        return Problem(name, "scale without amax", hint=hint)

    def _looks(self) -> Iterator[Problem]:
        """Values that cannot be used: not finite, no scale, a scale that no amax has."""
        bad = list(self.given.not_finite(self.weight.weight.name))
        yield from bad
        scales = [(self._scale, self.weight.amax)] if self._is_stored else []
        if self.weight.input_amax is not None and self._input_scale in self.given.names:
            scales.append((self._input_scale, self.weight.input_amax))
        for name, entry in scales:
            if _not_positive(self.given.read(name)):
                yield Problem(name, "no scale", _not_positive(self.given.read(name)))
            elif self._amax_for(name, entry) is None:
                yield self._odd(name, entry)
        if not bad and not self._is_stored:
            why = _not_positive(self._amax())
            given = self.weight.amax.name in self.given.names
            subject = self.weight.amax.name if given else self.weight.weight.name
            if why:
                yield Problem(subject, "no scale", why, hint=_ON_ZERO)


def _not_positive(scale: torch.Tensor) -> str:
    """What is wrong with a scale; empty if all of it is positive and finite."""
    good = torch.isfinite(scale) & (scale > 0)
    if good.all():
        return ""
    return f"{int((~good).sum())} of {scale.numel()} scales are zero, negative or not finite"
