"""Weights and scales that ModelOpt's names show to belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

WEIGHT_AMAX = ".weight_quantizer._amax"
INPUT_AMAX = ".input_quantizer._amax"
WEIGHT = ".weight"
_ON_LONE_SCALE = "a scale belongs to the weights it was measured with: pass both"
_ON_LONE_WEIGHT = (
    "pass both, or give the scheme of the model in plugin_settings.quant: then it is computed"
)


def torn_apart(leaves: Iterable[str], names: Collection[str]) -> Iterator[Problem]:
    """Where a source has a scale of what a program reads and not its weight, or the reverse.

    The scale of an input may stay as it is when the weight is replaced.

    Args:
        leaves: FQNs of all that the program reads. Layers without weights have scales, too.
        names: FQNs of all that the source has.
    """
    known = dict.fromkeys(leaves)
    for leaf in known:
        for suffix in (WEIGHT_AMAX, INPUT_AMAX):
            if leaf.endswith(suffix):
                weight = leaf.removesuffix(suffix) + WEIGHT
                if weight not in known:
                    continue
                if leaf in names and weight not in names:
                    yield lone_scale(leaf, weight)
                elif suffix == WEIGHT_AMAX and weight in names and leaf not in names:
                    yield Problem(weight, "weight without scale", wanted=leaf, hint=_ON_LONE_WEIGHT)


def lone_scale(scale: str, weight: str) -> Problem:
    """A scale was given and not its weight."""
    return Problem(scale, "scale without weight", wanted=weight, hint=_ON_LONE_SCALE)
