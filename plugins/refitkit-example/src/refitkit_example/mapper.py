"""The mapper: computes the converter's constants from new weights."""

from refitkit.model import Slot
from refitkit.protocols import Mapped, MapRequest, SlotValue, WeightSource
from refitkit_example.op import LAYER, gates


class GateStrategy:
    """Serves the constants that the converter adds, and nothing else."""

    name, priority = "example-gate", 20

    def map(self, request: MapRequest) -> Mapped:
        """A value for each slot of a gate, and a reason for each other slot."""
        values, declined = {}, {}
        for row in request.wanted:
            layer, _, role = row.slot.name.rpartition(" ")
            fqn = layer.removeprefix(LAYER)
            if role != "CONSTANT" or fqn == layer:
                declined[row.slot.key] = "it holds no gates"
            elif fqn not in request.source.names():
                declined[row.slot.key] = f"the source has no {fqn!r}"
            else:
                values[row.slot.key] = _value(row.slot, request.source, fqn)
        return Mapped(values, declined)


def _value(slot: Slot, source: WeightSource, fqn: str) -> SlotValue:
    return SlotValue(slot, GateStrategy.name, (fqn,), lambda: gates(source.get(fqn)))
