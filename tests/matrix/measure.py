"""What works in the environment that runs this, as JSON: one model, one process.

usage: python measure.py MODEL
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from cached_map import applied_by_upstream, cached_map
from models import trained, zoo

from refitkit.builtin.torch_tensorrt import LAYER_TYPES, upstream
from refitkit.builtin.torch_tensorrt.name_map import NameMapStrategy
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.model import Fingerprint, LedgerRow, PlanData, Slot, SlotState
from refitkit.program import KeptProgram, facts_of
from refitkit.program.bits import same_bits
from refitkit.program.facts import tensors_of
from refitkit.protocols import MapRequest
from refitkit.recipe import RefitPlan, TensorMap

if TYPE_CHECKING:
    from collections.abc import Mapping

Values = dict[tuple[str, str], torch.Tensor]


@dataclass
class Engine:
    """An engine as far as ``name-map`` is concerned."""

    name: str
    name_map: Mapping[str, Any] | None


@dataclass
class Module:
    """A module as far as ``name-map`` is concerned."""

    engines: Mapping[str, Engine]


def main() -> None:
    """Measure one model and print one line of JSON."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    try:
        measure(sys.argv[1], found)
    except Exception as exc:  # noqa: BLE001 - whatever a version cannot do is the result
        found["failed"] = f"{type(exc).__name__}: {exc}"[:2000]
    sys.stdout.write("\nRESULT " + json.dumps(found) + "\n")


def measure(name: str, found: dict[str, Any]) -> None:
    """Fill in what is found, step after step; what is missing at the end did not work."""
    upstream.import_headless()
    found["import"] = True
    make, inputs = zoo()[name]
    with torch.no_grad():
        old = torch.export.export(make(0), inputs)
        new = torch.export.export(trained(make(1), 7), inputs)
    settings = _settings(immutable_weights=False)
    before = networks_of(old, settings)
    after = networks_of(new, settings)
    found["engines"] = len(before)
    found["slots"] = sum(len(network.slots) for network, _ in before.values())
    found["recorded"] = sum(len(network.recorded) for network, _ in before.values())
    found["only_recorded"] = [
        slot
        for network, _ in before.values()
        for slot in sorted(network.recorded.keys() - network.scanned.keys())
    ]
    values = _scanned(before), _scanned(after)
    found["same_names"] = values[0].keys() == values[1].keys()
    weights = {key for key in values[0] if not _same(values[0][key], values[1].get(key))}
    found["weights"] = len(weights)
    _judge_maps(found, (old, new), before, after, weights, settings)
    if name == "resnet18":
        found["build"] = _builds_alike(old, new)


def networks_of(
    program: torch.export.ExportedProgram, settings: Any
) -> dict[str, tuple[Network, dict[str, torch.Tensor]]]:
    """Network and lowered state of each engine, by its name."""
    from refitkit.builtin.torch_tensorrt.parts import lower, partition_program

    layers = {layer.name: layer for layer in LAYER_TYPES}
    parts = partition_program(lower(program, settings), settings).parts
    return {
        part.name: (Network(part, settings, layers), dict(part.module.state_dict()))
        for part in parts
        if part.structure.accelerated
    }


def _settings(*, immutable_weights: bool) -> Any:
    import torch_tensorrt
    from torch_tensorrt.dynamo import CompilationSettings

    device = torch_tensorrt.Device("cuda:0")
    return CompilationSettings(immutable_weights=immutable_weights, min_block_size=1, device=device)


def _scanned(networks: Mapping[str, tuple[Network, Any]]) -> Values:
    return {
        (engine, slot): value.clone()
        for engine, (network, _) in networks.items()
        for slot, value in network.scanned.items()
    }


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or (one.dtype, one.numel()) != (other.dtype, other.numel()):
        return False
    return same_bits(one.reshape(-1).contiguous(), other.reshape(-1).contiguous())


def _judge_maps(
    found: dict[str, Any],
    programs: tuple[torch.export.ExportedProgram, torch.export.ExportedProgram],
    before: Mapping[str, tuple[Network, Any]],
    after: Mapping[str, tuple[Network, dict[str, torch.Tensor]]],
    weights: set[tuple[str, str]],
    settings: Any,
) -> None:
    """Upstream's use of the cached maps and ours against the rebuild, by bits."""
    maps = {name: cached_map(network) for name, (network, _) in before.items()}
    found["maps"] = sum(one is not None for one in maps.values())
    if not found["maps"]:
        return
    truth = _scanned(after)
    try:
        upstreams = {
            (engine, slot): value
            for engine, one in maps.items()
            for slot, value in applied_by_upstream(one or {}, after[engine][1], settings).items()
        }
        found["upstream_wrong"] = _wrong(upstreams, truth)
    except KeyError as exc:  # batch norms without weight and bias
        found["upstream_failed"] = f"KeyError: {exc}"
    mapped = _mapped(programs, before, maps)
    ours = {key: value.load() for key, value in mapped.values.items()}
    found["served"] = len(ours.keys() & weights)
    found["wrong"] = _wrong(ours, truth)
    reasons = (mapped.declined[key] for key in sorted(weights - ours.keys()))
    found["declined"] = Counter(reasons).most_common(12)


def _wrong(values: Values, truth: Values) -> list[str]:
    return [
        slot for (engine, slot), value in values.items() if not _same(value, truth[engine, slot])
    ]


def _mapped(
    programs: tuple[torch.export.ExportedProgram, torch.export.ExportedProgram],
    before: Mapping[str, tuple[Network, Any]],
    maps: Mapping[str, Mapping[str, Any] | None],
) -> Any:
    old, new = programs
    facts = facts_of(old)
    slots: list[Slot] = [slot for network, _ in before.values() for slot in network.slots]
    rows = tuple(LedgerRow(slot=slot, state=SlotState.UNMAPPED) for slot in slots)
    data = PlanData(
        backend="torch_tensorrt",
        leaves=facts.leaves,
        ties=facts.ties,
        ledger=rows,
        fingerprint=Fingerprint(graph=facts.graph, slots=""),
    )
    module: Any = Module({name: Engine(name, one) for name, one in maps.items()})
    plan, source = RefitPlan(data, {}), TensorMap(tensors_of(new))
    request = MapRequest(plan, module, source, rows, program=KeptProgram.of(old))
    return NameMapStrategy().map(request)


def _builds_alike(old: torch.export.ExportedProgram, new: torch.export.ExportedProgram) -> bool:
    """Whether the old network with the new values builds the same engine bytes as the new one."""
    settings = _settings(immutable_weights=True)  # refittable engines cannot be built without a GPU
    before, after = networks_of(old, settings), networks_of(new, settings)
    for name, (network, _) in before.items():
        other = after[name][0]
        wanted = other.build()
        network.point(other.scanned)
        if network.build() != wanted:
            return False
    return True


if __name__ == "__main__":
    main()
