"""Weights whose memory was given to code that no recording can watch.

An address, a storage or a pickle can be read by a library in C, and its numbers come back as
literals of a converter. So once code of a third party has asked for one, a number that appears
afterwards may hold a weight. It is not taken for a literal of the graph: its origin is unknown.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from refitkit.recipe.origins import leaves_below

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

    from refitkit.recipe.origins import Origin

_TRUSTED = frozenset({"refitkit", "torch_tensorrt"})
"""Packages that ask for addresses and arrays only to hand them to TensorRT, or to compare them."""
_COPYING = "copy"
"""A package that asks to make another tensor, which is known by its memory."""
_TRANSPARENT = frozenset({"torch", *sys.stdlib_module_names})
"""Packages that ask on behalf of their caller."""
_SHOWN = 3


def is_trusted() -> bool:
    """Whether the code that asks for a tensor's memory is torch's, Torch-TensorRT's or refitkit's.

    To be called by the function that replaces the one that was asked.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - inspect.stack reads source files
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == _COPYING:
            return True
        if package not in _TRANSPARENT:
            return package in _TRUSTED
        frame = frame.f_back
    return True


class Unwatched:
    """What was given to code that cannot be watched, in one recording.

    Attributes:
        doubt: Why a number that appears now may hold a weight; empty if it cannot.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.doubt = ""

    def gave(self, origins: Iterable[Origin], how: str) -> None:
        """Note that somebody can read these values without being seen.

        Args:
            origins: The values.
            how: What was given of them: an address, a pickle.
        """
        self.doubt = self.doubt or _reason(origins, how)


def _reason(origins: Iterable[Origin], how: str) -> str:
    """Empty where no value follows from a leaf: then nothing was given that a refit changes."""
    names = sorted({name for origin in origins for name in leaves_below(origin) if name})
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"it is made of numbers that appeared after {how} of {shown}{more} was given to code that "
        "cannot be watched, and may hold its value"
    )
