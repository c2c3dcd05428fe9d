import torch

import refitkit
from refitkit.protocols import PlanDraft
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import recipe_row


class MemoryModule(FakeModule):
    backend = "memory"


class MemoryBackend:
    """Keeps the weights of a program in memory, in one engine."""

    name = "memory"

    def compile(self, program, options, tools):
        graph = program.module()

        def answer(module, *inputs):
            return torch.func.functional_call(graph, module.engines["model"].live, inputs)

        return MemoryModule([OpenEngine("model", program.state_dict)], answer=answer)

    def draft(self, parts, module, tools):
        slots = module.engines["model"].slots.values()
        return PlanDraft(tuple(recipe_row(slot) for slot in slots))

    def describe(self, path):
        return None

    def attachments(self, path):
        return {}


class Memory:
    name = "memory"

    @refitkit.hookimpl
    def refitkit_register_backends(self, register):
        register(MemoryBackend())

    @refitkit.hookimpl
    def refitkit_partition(self, program, backend):
        return {"model": program} if backend == "memory" else None


model, later, x = torch.nn.Linear(2, 3).eval(), torch.nn.Linear(2, 3).eval(), torch.ones(1, 2)
pipeline = refitkit.Pipeline(plugins=[Memory()])
compiled = pipeline.compile(torch.export.export(model, (x,)), "memory")
pipeline.refit(compiled, later.state_dict())
print(torch.equal(compiled(x), later(x)))
# True
