"""Weights and scales that belong together by ModelOpt's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

WEIGHT_AMAX = ".weight_quantizer._amax"
INPUT_AMAX = ".input_quantizer._amax"
WEIGHT = ".weight"
_ON_LONE_SCALE = "pass both: a scale belongs to the weight that it was measured with"
_ON_LONE_WEIGHT = (
    "pass both, or set the scheme of the model in plugin_settings.quant to compute the scale"
)


def incomplete_pairs(leaves: Iterable[str], names: Collection[str]) -> Iterator[Problem]:
    """Problems with scales without their weight in a source, and weights without their scale.

    The scale of a layer's input need not come with the weight: it may keep its value.

    Args:
        leaves: FQNs of all leaves of the program.
        names: FQNs of all entries of the source.
    """
    # A dict keeps the order, and looks names up fast.
    known = dict.fromkeys(leaves)
    for leaf in known:
        for suffix in (WEIGHT_AMAX, INPUT_AMAX):
            if leaf.endswith(suffix):
                weight = leaf.removesuffix(suffix) + WEIGHT
                # Layers without weights have input scales, too.
                if weight not in known:
                    continue
                # A scale alone would change the meaning of the old weight.
                if leaf in names and weight not in names:
                    yield scale_without_weight(leaf, weight)
                elif suffix == WEIGHT_AMAX and weight in names and leaf not in names:
                    yield Problem(weight, "weight without scale", wanted=leaf, hint=_ON_LONE_WEIGHT)


def scale_without_weight(scale: str, weight: str) -> Problem:
    """The problem that a source has a scale but not its weight."""
    return Problem(scale, "scale without weight", wanted=weight, hint=_ON_LONE_SCALE)
