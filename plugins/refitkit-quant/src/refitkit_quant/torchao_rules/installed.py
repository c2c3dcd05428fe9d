"""Which torchao is installed. Another one may round otherwise."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem

from refitkit_quant.settings import WHERE

if TYPE_CHECKING:
    from collections.abc import Mapping

TORCHAO = "torchao"


@cache
def installed() -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(TORCHAO)
    except PackageNotFoundError:
        return None


def require_version(versions: Mapping[str, str]) -> None:
    """Check that weights are quantized by the torchao that the scheme was read with.

    Args:
        versions: Those of the scheme.

    Raises:
        ConfigError: It is not installed, or its minor version is another one.
    """
    found, wanted = installed(), versions.get(TORCHAO, "")
    if found is None:
        raise ConfigError(
            "Weights are to be quantized as torchao does, and it is not installed.",
            hint="Install it: pip install 'refitkit-quant[torchao]'.",
        )
    if _minor(found) != _minor(wanted):
        raise ConfigError(
            "The scheme of quantization is of another torchao, which may round otherwise.",
            problems=[Problem(f"{WHERE}.scheme.versions.{TORCHAO}", "differs", found, wanted)],
            hint="Install that one, or read the scheme again with this one.",
        )


def _minor(text: str) -> list[str]:
    return text.split("+", maxsplit=1)[0].split(".")[:2]
