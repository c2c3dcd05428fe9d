"""What plans of these backends depend on, before they are made: keys of the plan cache."""

from __future__ import annotations

import json
import platform
import sys
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.options import IMPORTS, plain, versions
from refitkit.protocols import PlanKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_REGISTRY = "torch_tensorrt.dynamo.conversion._ConverterRegistry"
_OF_UPSTREAM = ("torch_tensorrt.", "modelopt.")


def key_of_options(options: Mapping[str, Any]) -> PlanKey | None:
    """Of a plan that a session makes; None where sessions import modules of the user's.

    Raises:
        ConfigError: An option has no text.
    """
    chosen = plain(options)
    if chosen.get(IMPORTS):
        return None
    return _key(json.dumps(chosen, sort_keys=True), "cpu", None)


def key_of_settings(settings: Mapping[str, str]) -> PlanKey | None:
    """Of a plan that is made in this process; None where converters of the user's may serve.

    Args:
        settings: Settings of the target on which slots depend, as text.
    """
    if any(not name.startswith(_OF_UPSTREAM) for name in _converters()):
        return None
    return _key(json.dumps(dict(settings), sort_keys=True), "cuda", settings)


def _key(text: str, device: str, settings: Mapping[str, str] | None) -> PlanKey:
    where = f"{platform.system()} {platform.machine()} {device}"
    return PlanKey(text=text, versions=versions(), platform=where, settings=settings)


def _converters() -> Iterator[str]:
    """Modules of all registered converters.

    ``DYNAMO_ATEN_CONVERTERS`` in ``dynamo/conversion/_ConverterRegistry.py``, 2.11 to 2.14.
    """
    registry = sys.modules.get(_REGISTRY)
    for found in getattr(registry, "DYNAMO_ATEN_CONVERTERS", {}).values():
        for one in found:
            yield f"{one.converter_implementation.__module__}."
