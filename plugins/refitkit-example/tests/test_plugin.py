"""The plugin as it is installed, and its mapper by itself."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refitkit_example.mapper import GateStrategy
from refitkit_example.op import LAYER

import refitkit
from refitkit.model import LedgerRow, Slot, SlotState
from refitkit.protocols import Mapped, MapRequest
from refitkit.recipe import TensorMap


def mapped(*names: str, source: dict[str, torch.Tensor]) -> Mapped:
    """What the mapper answers for slots of these names."""
    slots = [Slot(engine="e", name=name, dtype="float32", shape=None, count=2) for name in names]
    rows = tuple(LedgerRow(slot=s, state=SlotState.UNMAPPED, reason="unseen") for s in slots)
    nobody: Any = SimpleNamespace()
    return GateStrategy().map(MapRequest(nobody, nobody, TensorMap(source), rows))


def test_it_is_found_by_its_entry_point() -> None:
    found = {info.name: info for info in refitkit.Pipeline().host.plugins()}["example"]
    assert found.origin.startswith("refitkit-example 0.")
    assert found.hooks == ("refitkit_layer_types", "refitkit_mapping_strategies")


def test_importing_it_imports_no_torch() -> None:
    code = "import refitkit_example, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gate_is_computed_of_its_weight() -> None:
    weight = torch.tensor([0.5, -30.0])
    found = mapped(f"{LAYER}a.b CONSTANT", source={"a.b": weight})
    (value,) = found.values.values()
    assert value.sources == ("a.b",)
    assert torch.equal(value.load(), torch.tanh(weight.double()).float())


def test_a_weight_that_is_missing_is_the_reason() -> None:
    found = mapped(f"{LAYER}a.b CONSTANT", source={"b": torch.ones(2)})
    assert not found.values
    assert list(found.declined.values()) == ["the source has no 'a.b'"]


@pytest.mark.parametrize("name", ["a.b CONSTANT", f"{LAYER}a.b KERNEL", f"x {LAYER}a.b CONSTANT"])
def test_slots_of_others_are_let_be(name: str) -> None:
    found = mapped(name, source={"a.b": torch.ones(2), name: torch.ones(2)})
    assert not found.values
    assert list(found.declined.values()) == ["it holds no gates"]
