import torch

import refitkit
from refitkit.protocols import PlanDraft
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import recipe_row


class LayersModule(FakeModule):
    backend = "layers"


class LayersBackend:
    """Makes one engine for each layer of a model."""

    name = "layers"

    def compile(self, program, options, tools):
        graph = program.module()

        def answer(module, *inputs):
            weights = {
                f"{name}.{slot}": value
                for name, engine in module.engines.items()
                for slot, value in engine.live.items()
            }
            return torch.func.functional_call(graph, weights, inputs)

        engines = [OpenEngine(name, weights) for name, weights in parts_of(program).items()]
        return LayersModule(engines, answer=answer)

    def draft(self, parts, module, tools):
        rows = [
            recipe_row(slot, f"{name}.{slot.name}")
            for name in parts
            for slot in module.engines[name].slots.values()
        ]
        return PlanDraft(tuple(rows))

    def describe(self, path):
        return None

    def attachments(self, path):
        return {}


def parts_of(program):
    """Weights by the name of the layer, then by the name in the layer."""
    parts = {}
    for fqn, weight in program.state_dict.items():
        layer, _, name = fqn.rpartition(".")
        parts.setdefault(layer, {})[name] = weight
    return parts


class Layers:
    name = "layers"

    @refitkit.hookimpl
    def refitkit_register_backends(self, register):
        register(LayersBackend())

    @refitkit.hookimpl
    def refitkit_partition(self, program, backend):
        return parts_of(program) if backend == "layers" else None


model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)).eval()
program = torch.export.export(model, (torch.ones(1, 2),))
compiled = refitkit.Pipeline(plugins=[Layers()]).compile(program, "layers")
for row in compiled.plan.ledger:
    print(row.slot.engine, row.slot.name, *row.sources)
# 0 weight 0.weight
# 0 bias 0.bias
# 1 weight 1.weight
# 1 bias 1.bias
