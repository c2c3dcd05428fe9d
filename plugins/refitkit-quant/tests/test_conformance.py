"""The suites of the conformance kit for this plugin."""

from __future__ import annotations

import pytest

pytest.importorskip("refitkit.testing")

from refitkit_quant.conformance import suites

for _suite in suites():
    globals()[f"Test{_suite.__name__}"] = _suite
