"""refitkit's conformance suites, collected because their names begin with Test."""

from __future__ import annotations

from refitkit_example.conformance import TestGateStrategy

__all__ = ["TestGateStrategy"]
