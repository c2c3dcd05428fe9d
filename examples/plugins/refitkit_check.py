import torch

import refitkit
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class NotZero:
    """Refuses weights that are all zeros: somebody forgot to load a checkpoint."""

    name = "not-zero"

    @refitkit.hookimpl
    def refitkit_check(self, source):
        for name in source.names():
            if not source.get(name).any():
                yield refitkit.Problem(name, "all zeros")


module = planned_module([OpenEngine("model", {"a": torch.ones(2), "b": torch.ones(2)})])
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), NotZero()])
compiled = pipeline.load(module)
try:
    pipeline.refit(compiled, {"a": torch.zeros(2), "b": torch.zeros(2)})
except refitkit.WeightMismatchError as error:
    print(*error.problems, sep="\n")
print(compiled.read("a"))
# a: all zeros
# b: all zeros
# tensor([1., 1.])
