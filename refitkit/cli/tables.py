"""Format values and tables for people.

Text is never interpreted as rich markup, because names of slots contain brackets. ``shown`` escapes
everything that could control a terminal, because those names come from files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table


RIGHT = frozenset({"bytes", "count", "largest", "relative", "seconds", "share", "time"})
"""Names of columns with numbers, which are aligned to the right."""


def table(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str = "") -> Table:
    """A table of rich; long names are wrapped, never truncated."""
    # rich is imported inside functions, because --help and --json do not need it.
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(
        title=shown(title) or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold"
    )
    for name in columns:
        grid.add_column(name, overflow="fold", justify="right" if name in RIGHT else "left")
    for row in rows:
        grid.add_row(*(shown(cell) for cell in row))
    return grid


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and values in two columns, without lines."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(shown(name), shown(value))
    return grid


_STEP = 1024
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def shown(value: object) -> str:
    """A value as text that cannot move the cursor or change colours.

    Line breaks stay. Every other character that is not printable is escaped.
    """
    text = str(value)
    # Nearly all texts are printable, so most calls end here.
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
    """``12.3 ms`` or ``1.23 s``: three significant digits, in a suitable unit."""
    if seconds >= 1:
        # from 1000 on, .3g would write an exponent
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004
    if seconds >= 1e-3:  # noqa: PLR2004
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def shape(sizes: object) -> str:
    """``16 x 8``; ``scalar`` for a tensor without dimensions; ``?`` for an unknown shape."""
    if not isinstance(sizes, list | tuple):
        return "?"
    return " x ".join(map(str, sizes)) or "scalar"


def count(number: int, noun: str) -> str:
    """``1 slot`` or ``2 slots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
