"""Tables on stdout. Text in them is never taken for markup: names of slots have brackets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table


RIGHT = frozenset({"bytes", "count", "largest", "relative", "seconds", "share", "time"})
"""Columns of numbers."""


def table(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str = "") -> Table:
    """A table; long names are broken, never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(
        title=shown(title) or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold"
    )
    for name in columns:
        made.add_column(name, overflow="fold", justify="right" if name in RIGHT else "left")
    for row in rows:
        made.add_row(*(shown(cell) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and values in two columns, without lines."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(shown(name), shown(value))
    return made


# MERGED text: Values as people read them.

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
