import torch

import refitkit
from refitkit.protocols import Mapped, SlotValue
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class Clamped:
    """Serves the slot "gate" with the weight "gate", limited to [0, 1]."""

    name, priority = "clamped", 5  # before the strategy "recipe", which has 10

    def map(self, request):
        values, declined = {}, {}
        for row in request.wanted:
            if row.slot.name != "gate":
                declined[row.slot.key] = "it is not a gate"
                continue
            values[row.slot.key] = SlotValue(
                row.slot, self.name, ("gate",), lambda: request.source.get("gate").clamp(0, 1)
            )
        return Mapped(values, declined)


class Gates:
    name = "gates"

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self):
        return [Clamped()]


module = planned_module([OpenEngine("model", {"gate": torch.zeros(2), "bias": torch.zeros(2)})])
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), Gates()])
compiled = pipeline.load(module)
new = {"gate": torch.tensor([0.5, 3.0]), "bias": torch.tensor([0.5, 3.0])}
report = pipeline.refit(compiled, new).report
for row in report.ledger:
    print(row.slot, row.strategy, compiled.read(row.slot))
# gate clamped tensor([0.5000, 1.0000])
# bias recipe tensor([0.5000, 3.0000])
