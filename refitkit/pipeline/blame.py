"""Whose fault it is that an engine failed to stage: its own, or that of a value it was given.

Values are computed when an engine asks for them, so what a strategy does wrong fails there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refitkit.errors import PluginError, RefitError, raise_if_resource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.protocols import SlotValue


def require_sound(values: Iterable[SlotValue], failure: Exception) -> None:
    """Compute values again, one after another, until one fails as staging did.

    Nothing is looked for where the failure is one that was meant, or the system refused a resource,
    which the next value would meet, too.

    Args:
        values: What the engine was given.
        failure: Why it could not stage them.

    Raises:
        PluginError: One fails in the same way, or gives no tensor; names its strategy and its slot.
        ResourceError: The system refused a resource.
    """
    if isinstance(failure, RefitError):
        return
    raise_if_resource(failure, "New values cannot be staged")
    for value in values:
        said = _fault_of(value, failure)
        if said:
            slot = f"{value.slot.engine}/{value.slot.name}"
            message = f"The strategy {value.strategy!r} {said} for the slot {slot}."
            hint = "Report it to its authors, or leave it out of Config.strategies."
            raise PluginError(message, hint=hint) from failure


def _fault_of(value: SlotValue, failure: Exception) -> str:
    """What is wrong with a value; empty where nothing is that staging failed of."""
    try:
        found: object = value.load()
    except Exception as exc:  # noqa: BLE001 - it is compared with the other
        if (type(exc), str(exc)) == (type(failure), str(failure)):
            return f"failed with {type(exc).__name__}: {exc},"
        return ""
    return "" if isinstance(found, torch.Tensor) else f"gave a {type(found).__name__}, no tensor,"
