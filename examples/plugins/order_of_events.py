import torch

import refitkit
from refitkit.model import (
    Aborted,
    Failed,
    Finished,
    StageFailed,
    StageFinished,
    StageStarted,
    Started,
)
from refitkit.protocols import PlanDraft
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module, recipe_row

SHOWN = {
    Started: "started",
    Finished: "finished",
    Failed: "failed",
    Aborted: "aborted",
    StageStarted: "stage {} started",
    StageFinished: "stage {} finished",
    StageFailed: "stage {} failed",
}


class Printer:
    """Prints events, those of an inner operation further to the right.

    Leaves out `Step`, and the stages of trials.
    """

    name = "printer"

    def __init__(self):
        self.depth = {"": -1}

    @refitkit.hookimpl
    def refitkit_event(self, event):
        if isinstance(event, Started):
            self.depth[event.id] = self.depth[event.parent] + 1
        text = SHOWN.get(type(event))
        if text is None or (event.trial and "stage" in text):
            return
        verb = f"{event.verb} (trial)" if event.trial else event.verb
        print("    " * self.depth[event.id] + verb, text.format(getattr(event, "stage", "")))


class Stop:
    """Stops a refit, as Ctrl-C does, if all weights are -1."""

    name = "stop"

    @refitkit.hookimpl
    def refitkit_check(self, source):
        if (source.get("weight") == -1).all():
            raise KeyboardInterrupt
        return []


class MemoryBackend:
    name = "memory"

    def compile(self, program, options, tools):
        graph = program.module()

        def answer(module, *inputs):
            return torch.func.functional_call(graph, module.engines["model"].live, inputs)

        return MemoryModule([OpenEngine("model", program.state_dict)], answer=answer)

    def draft(self, parts, module, tools):
        return PlanDraft(tuple(map(recipe_row, module.engines["model"].slots.values())))

    def describe(self, path):
        return None

    def attachments(self, path):
        return {}


class MemoryModule(FakeModule):
    backend = "memory"


class Memory:
    name = "memory"

    @refitkit.hookimpl
    def refitkit_register_backends(self, register):
        register(MemoryBackend())

    @refitkit.hookimpl
    def refitkit_partition(self, program, backend):
        return {"model": program} if backend == "memory" else None


pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), Memory(), Stop(), Printer()])
module = planned_module([OpenEngine("model", {"weight": torch.zeros(2)})])

print("-- a refit of a module that is not open yet")
pipeline.refit(module, {"weight": torch.ones(2)})

print("-- loading")
compiled = pipeline.load(module)

print("-- a refit that fails")
try:
    pipeline.refit(compiled, {"weight": torch.ones(99)})
except refitkit.WeightMismatchError:
    pass

print("-- a refit that is interrupted")
try:
    pipeline.refit(compiled, {"weight": -torch.ones(2)})
except KeyboardInterrupt:
    pass

print("-- a compilation, which proves its plan by trial")
program = torch.export.export(torch.nn.Linear(2, 2, bias=False), (torch.ones(1, 2),))
pipeline.compile(program, "memory")
# -- a refit of a module that is not open yet
# refit started
#     load started
#     load stage open started
#     load stage open finished
#     load finished
# refit stage load started
# refit stage load finished
# refit stage map started
# refit stage map finished
# refit stage check started
# refit stage check finished
# refit stage prepare started
# refit stage prepare finished
# refit stage stage started
# refit stage stage finished
# refit stage commit started
# refit stage commit finished
# refit stage verify started
# refit stage verify finished
# refit finished
# -- loading
# load started
# load stage open started
# load stage open finished
# load finished
# -- a refit that fails
# refit started
# refit stage load started
# refit stage load finished
# refit stage map started
# refit stage map finished
# refit stage check started
# refit stage check failed
# refit failed
# -- a refit that is interrupted
# refit started
# refit stage load started
# refit stage load finished
# refit stage map started
# refit stage map finished
# refit stage check started
# refit stage check failed
# refit aborted
# -- a compilation, which proves its plan by trial
# compile started
# compile stage compile started
# compile stage compile finished
# compile stage plan started
# compile stage plan finished
# compile stage prove started
#     verify (trial) started
#     verify (trial) finished
#     refit (trial) started
#     refit (trial) finished
#     refit (trial) started
#     refit (trial) finished
# compile stage prove finished
# compile finished
