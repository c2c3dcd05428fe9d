"""The conformance kit: pytest suites that authors of plugins inherit.

The author writes a factory, and an *oracle*: a way to read results that does not call the code
under test. All checks are inherited. See ``docs/guides/testing-plugins.md``.

To read the kit, start with :mod:`~refitkit.testing.breach` (how a check reports a broken contract)
and one suite, such as :mod:`~refitkit.testing.source`. :mod:`~refitkit.testing.oracles`,
:mod:`~refitkit.testing.fakes` and :mod:`~refitkit.testing.scenes` are tools that suites and tests
share. :mod:`~refitkit.testing.check` runs suites without a test file.

Importing this package imports neither torch nor a built-in plugin: names are resolved on first use.
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

# Keep this lazy: pytest loads refitkit.testing.plugin, and so this package, in every run.
_MODULES = {
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
    if name not in _MODULES:
        raise AttributeError(f"module 'refitkit.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"refitkit.testing.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
