"""How saved modules and weights are printed, whatever backend or plugin they are of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from refitkit.cli.tables import facts, table
from refitkit.cli.text import count, shape, size
from refitkit.model.slot import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from refitkit.protocols import WeightSource

_CHECKSUM = re.compile("[0-9a-f]{40,}")
_SLOT_COLUMNS = ("name", "dtype", "shape", "device")


def print_described(console: Console, described: Mapping[str, Any]) -> None:
    """Print what a backend says of a saved module: plain values first, then its slots."""
    rest = {key: value for key, value in described.items() if key != "slots"}
    console.print(facts((key.replace("_", " "), _value(key, v)) for key, v in rest.items()))
    slots = described.get("slots")
    if slots:
        rows = [[_cell(slot, column) for column in _SLOT_COLUMNS] for slot in slots]
        console.print(table(_SLOT_COLUMNS, rows, count(len(rows), "slot")))


def described_weights(source: WeightSource) -> dict[str, Any]:
    """What weights hold, as plain data; only headers are read where the format has them."""
    tensors = []
    for name in sorted(source.names()):
        info = source.info(name)
        tensors.append(
            {
                "name": name,
                "dtype": info.dtype,
                "shape": info.shape,
                "bytes": info.count * ITEM_BYTES.get(info.dtype, 0),
                "unusable": info.unusable,
            }
        )
    return {"bytes": sum(tensor["bytes"] for tensor in tensors), "tensors": tensors}


def print_weights(console: Console, data: Mapping[str, Any]) -> None:
    """Print names, dtypes and shapes of weights."""
    columns = ("name", "dtype", "shape", "bytes")
    rows = [[_cell(tensor, column) for column in columns] for tensor in data["tensors"]]
    title = f"{count(len(rows), 'tensor')}, {size(data['bytes'])}"
    console.print(table(columns, rows, title))


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column == "shape":
        return shape(row.get("shape"))
    if column == "dtype" and row.get("unusable"):
        return f"not usable: {row['unusable']}"
    return str(row.get(column, ""))


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return size(value)
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_inner(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "\n".join(map(_inner, value)) or "none"
    return "none" if value is None else str(value)


def _inner(value: Any) -> str:
    """A value inside others, in a line; of a checksum as much as tells two apart."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inner(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_inner, value))})"
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if _CHECKSUM.fullmatch(text) else text
