"""Recipes on their way out of a session: as JSON, their tensors as safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from refitkit.model import Guard, LedgerRow, OpCall
from refitkit.recipe import Recorded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LITERALS = "literals.safetensors"


def write_recording(recorded: Recorded, folder: Path) -> dict[str, Any]:
    """Plain data; tensors go into a file in this folder."""
    save_file(dict(recorded.literals), folder / _LITERALS)
    return {
        "rows": [row.model_dump(mode="json") for row in recorded.rows],
        "calls": [call.model_dump(mode="json") for call in recorded.calls],
        "guards": [guard.model_dump(mode="json") for guard in recorded.guards],
    }


def read_recording(folder: Path, data: Mapping[str, Any]) -> Recorded:
    """What ``write_recording`` wrote."""
    literals = load_file(folder / _LITERALS)
    return Recorded(
        rows=tuple(map(LedgerRow.model_validate, data["rows"])),
        calls=tuple(map(OpCall.model_validate, data["calls"])),
        guards=tuple(map(Guard.model_validate, data["guards"])),
        literals={name: value.clone() for name, value in literals.items()},
    )
