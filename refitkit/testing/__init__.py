"""The conformance kit: suites that whoever writes a plugin inherits, and runs with pytest.

The author writes a factory, and an *oracle*: a way to see what happened that goes past the code
under test. Everything else is inherited. See ``docs/guides/testing-plugins.md``.

Importing this imports no torch and no built-in plugin: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refitkit.testing.backend import BackendSuite
    from refitkit.testing.breach import Breach
    from refitkit.testing.check import CheckResult, run
    from refitkit.testing.engine import EngineSuite
    from refitkit.testing.source import SourceSuite
    from refitkit.testing.strategy import StrategySuite
    from refitkit.testing.transform import TransformSuite
    from refitkit.testing.verifier import VerifierSuite

_HOMES = {
    "BackendSuite": "backend",
    "Breach": "breach",
    "CheckResult": "check",
    "EngineSuite": "engine",
    "SourceSuite": "source",
    "StrategySuite": "strategy",
    "TransformSuite": "transform",
    "VerifierSuite": "verifier",
    "run": "check",
}

__all__ = [
    "BackendSuite",
    "Breach",
    "CheckResult",
    "EngineSuite",
    "SourceSuite",
    "StrategySuite",
    "TransformSuite",
    "VerifierSuite",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'refitkit.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"refitkit.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
