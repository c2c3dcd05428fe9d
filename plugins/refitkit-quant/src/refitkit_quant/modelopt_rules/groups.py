"""The groups for weights that ModelOpt quantizes: which entries a source has, and their values.

A source has a weight in one of two forms: in float, with or without its ``_amax``; or quantized
with its scale, as ModelOpt exports checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem, WeightMismatchError
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import Made, WeightGroup

from refitkit_quant.modelopt_rules import formulas
from refitkit_quant.pairs import scale_without_weight
from refitkit_quant.source import info_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit_quant.scheme import ModeloptWeight, TensorSpec
    from refitkit_quant.source import TransformSource

_FLOATS = {"float32", "float16", "bfloat16"}
_ON_TWICE = "pass one of them"
_ON_GIVEN = "pass it: its calibration was not 'max', so it does not follow from the weight"
_ON_ZERO = "zero cannot be a scale: pass a scale together with the weight"
_ON_INEXACT_SCALE = "ModelOpt did not write it: no {dtype} amax divided by {bound:g} gives it"


def weight_groups(weight: ModeloptWeight, source: TransformSource) -> list[WeightGroup]:
    """One group if the source has the weight, in float or quantized; none otherwise.

    Raises:
        WeightMismatchError: The source has a scale without its weight, or unusable entries; lists
            every problem.
    """
    checkpoint = CheckpointWeight(weight, source)
    problems = list(checkpoint.problems())
    if problems:
        raise WeightMismatchError("A weight does not fit its scheme.", problems=problems)
    return [checkpoint.group()] if checkpoint.has_weight else []


@dataclass(frozen=True)
class CheckpointWeight:
    """One weight of the scheme in one source.

    Attributes:
        weight: Weight of the scheme.
        source: Source that may have it.
    """

    weight: ModeloptWeight
    source: TransformSource

    @property
    def has_weight(self) -> bool:
        """Whether the source has the weight, in float or quantized."""
        return self.weight.weight.name in self.source.names

    @property
    def _is_stored(self) -> bool:
        """Whether the source has the weight quantized."""
        name = self.weight.weight.name
        return self.has_weight and self.source.info(name).dtype in formulas.STORED

    @property
    def _scale(self) -> str:
        """Name of the weight's scale in an exported checkpoint.

        ``quantizer_attr_names`` in ``modelopt/torch/quantization/utils/core_utils.py`` (0.47).
        """
        return f"{self.weight.weight.name}_scale"

    @property
    def _input_scale(self) -> str:
        """Name of the scale of the input in an exported checkpoint."""
        return f"{self.weight.weight.name.removesuffix('weight')}input_scale"

    # -- headers ----------------------------------------------------------------------------

    def problems(self) -> Iterator[Problem]:
        """Why the source cannot give the weight, from headers only."""
        name, names = self.weight.weight.name, self.source.names
        inputs = [] if self.weight.input_amax is None else [self.weight.input_amax.name]
        # Without the weight, any of its scales is an error.
        if not self.has_weight:
            for scale in (self.weight.amax.name, self._scale, *inputs, self._input_scale):
                if scale in names:
                    yield scale_without_weight(scale, name)
            return
        # The dtype of the entry decides between the two forms.
        yield from self._of_stored() if self._is_stored else self._of_float()
        for scale in inputs:
            if scale in names and self._input_scale in names:
                yield Problem(scale, "given twice", wanted=self._input_scale, hint=_ON_TWICE)
            elif self._input_scale in names:
                yield from self._misfits_of_scale(self._input_scale, self.weight.input_amax)

    def _of_stored(self) -> Iterator[Problem]:
        entry, names = self.weight.weight, self.source.names
        info = self.source.info(entry.name)
        if formulas.STORED[info.dtype] != self.weight.format:
            yield Problem(entry.name, "format", info.dtype, self.weight.format)
        if info.shape != entry.shape or info.unusable:
            found = info.unusable or str(info.shape)
            yield Problem(entry.name, "shape", found, str(entry.shape))
        if self._scale not in names:
            hint = "pass both: a quantized weight has no meaning without its scale"
            yield Problem(entry.name, "weight without scale", wanted=self._scale, hint=hint)
            return
        yield from self._misfits_of_scale(self._scale, self.weight.amax)
        if self.weight.amax.name in names:
            yield Problem(self._scale, "given twice", wanted=self.weight.amax.name, hint=_ON_TWICE)

    def _of_float(self) -> Iterator[Problem]:
        entry, amax, names = self.weight.weight, self.weight.amax, self.source.names
        yield from self.source.misfits(entry)
        if self._scale in names:
            hint = f"pass {amax.name}, or the weight as it was exported with this scale"
            yield Problem(self._scale, "scale of a quantized weight", f"{entry}", hint=hint)
        if amax.name in names:
            yield from self.source.misfits(amax)
        elif self.weight.amax_is == "given":
            yield Problem(entry.name, "weight without scale", wanted=amax.name, hint=_ON_GIVEN)

    def _misfits_of_scale(self, name: str, amax: TensorSpec | None) -> Iterator[Problem]:
        # Exported scales may have other shapes than amax, such as (1,) for ().
        info = self.source.info(name)
        wanted = info_of(amax).count if amax else 1
        if info.unusable or info.dtype not in _FLOATS:
            yield Problem(name, "dtype", info.unusable or info.dtype, "float32")
        if info.count != wanted:
            yield Problem(name, "shape", str(info.shape), f"{wanted} elements")

    # -- values -----------------------------------------------------------------------------

    def group(self) -> WeightGroup:
        """The weight and its amax; the amax of its input, too, if the source has its scale."""
        weight, names = self.weight, self.source.names
        own = (self._scale,) if self._is_stored else (weight.amax.name,)
        takes = [weight.weight.name, *(name for name in own if name in names)]
        gives = {entry.name: info_of(entry) for entry in (weight.weight, weight.amax)}
        if weight.input_amax is not None and self._input_scale in names:
            takes.append(self._input_scale)
            gives[weight.input_amax.name] = info_of(weight.input_amax)
        # Values are checked when the first group is made: groups() reads headers only.
        self.source.add_check(self._value_problems)
        return WeightGroup(tuple(takes), gives, self._make)

    def _make(self) -> Made:
        self.source.require_valid(self._value_problems)
        weight, source = self.weight, self.source
        amax = self._amax()
        # The error is measured against the exact weight, before its cast to the program's dtype.
        exact = self._exact()
        value = exact.to(dtype_of(weight.weight.dtype))
        values = {weight.weight.name: value, weight.amax.name: amax}
        if weight.input_amax is not None and self._input_scale in source.names:
            values[weight.input_amax.name] = self._from_scale(self._input_scale, weight.input_amax)
        dequantized = formulas.represented(value, amax, weight.format)
        return Made(values, (source.measure(weight.weight.name, exact, dequantized),))

    def _exact(self) -> torch.Tensor:
        """The weight in float; a quantized weight restored in float32, without further rounding."""
        value = self.source.read(self.weight.weight.name)
        if not self._is_stored:
            return value
        return formulas.restored(
            value, self.source.read(self._scale).reshape(self.weight.amax.shape)
        )

    def _amax(self) -> torch.Tensor:
        weight, source = self.weight, self.source
        if self._is_stored:
            return self._from_scale(self._scale, weight.amax)
        if weight.amax.name in source.names:
            return source.read(weight.amax.name)
        found = formulas.largest(source.read(weight.weight.name), weight.axis)
        return found.reshape(weight.amax.shape)

    def _from_scale(self, name: str, entry: TensorSpec) -> torch.Tensor:
        found = self._amax_for(name, entry)
        if found is None:
            raise WeightMismatchError(
                "A scale follows from no amax.", problems=[self._scale_problem(name, entry)]
            )
        return found

    def _amax_for(self, name: str, entry: TensorSpec) -> torch.Tensor | None:
        scale = self.source.read(name).reshape(entry.shape)
        return formulas.amax_for(scale, self.weight.format, dtype_of(entry.dtype))

    def _scale_problem(self, name: str, entry: TensorSpec) -> Problem:
        bound = formulas.BOUND[self.weight.format]
        hint = _ON_INEXACT_SCALE.format(dtype=entry.dtype, bound=bound)
        return Problem(name, "scale without amax", hint=hint)

    def _value_problems(self) -> Iterator[Problem]:
        """Problems of values: not finite, not usable as a scale, or a scale that no amax gives."""
        not_finite = list(self.source.not_finite(self.weight.weight.name))
        yield from not_finite
        scales = [(self._scale, self.weight.amax)] if self._is_stored else []
        if self.weight.input_amax is not None and self._input_scale in self.source.names:
            scales.append((self._input_scale, self.weight.input_amax))
        for name, entry in scales:
            if _why_not_positive(self.source.read(name)):
                yield Problem(name, "no scale", _why_not_positive(self.source.read(name)))
            elif self._amax_for(name, entry) is None:
                yield self._scale_problem(name, entry)
        if not not_finite and not self._is_stored:
            why = _why_not_positive(self._amax())
            # Without an amax in the source, its value follows from the weight.
            has_amax = self.weight.amax.name in self.source.names
            subject = self.weight.amax.name if has_amax else self.weight.weight.name
            if why:
                yield Problem(subject, "no scale", why, hint=_ON_ZERO)


def _why_not_positive(scale: torch.Tensor) -> str:
    """Why a scale is unusable; empty if all its elements are positive and finite."""
    # ModelOpt divides by amax, so that zero would give infinite values.
    good = torch.isfinite(scale) & (scale > 0)
    if good.all():
        return ""
    return f"{int((~good).sum())} of {scale.numel()} scales are zero, negative or not finite"
