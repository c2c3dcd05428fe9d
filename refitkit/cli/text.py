"""Values as people read them."""

from __future__ import annotations

_STEP = 1024
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def shown(value: object) -> str:
    """A value as text that cannot move the cursor or change colours.

    Names of slots and tensors come from files. Line breaks stay; every other character that is
    not printable is escaped.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def size(count: int) -> str:
    """``1.5 MiB`` for 1572864 bytes."""
    amount, unit = float(count), 0
    while amount >= _STEP and unit < len(_UNITS) - 1:
        amount, unit = amount / _STEP, unit + 1
    return f"{count} bytes" if not unit else f"{amount:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """``12.3 ms``, ``1.23 s``: three digits, in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004
    if seconds >= 1e-3:  # noqa: PLR2004
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def shape(sizes: object) -> str:
    """``16 x 8``; ``scalar`` for a tensor without dimensions; ``?`` where nobody knows."""
    if not isinstance(sizes, list | tuple):
        return "?"
    return " x ".join(map(str, sizes)) or "scalar"


def count(number: int, noun: str) -> str:
    """``1 slot``, ``2 slots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
