"""refitkit's suites, which pytest collects because their names begin with Test."""

from __future__ import annotations

import pytest

pytest.importorskip("openvino")

from refitkit_openvino.conformance import (
    TestEngineWithInputs,
    TestOpenVINOBackend,
    TestOpenVINOEngine,
)

__all__ = ["TestEngineWithInputs", "TestOpenVINOBackend", "TestOpenVINOEngine"]
