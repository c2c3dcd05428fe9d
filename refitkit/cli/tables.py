"""Tables on stdout. Text in them is never taken for markup: names of slots have brackets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.cli.text import shown

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
