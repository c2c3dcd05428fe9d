import torch

import refitkit
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import planned_module


class Demo:
    """Opens the target "demo://zeros"."""

    name = "demo"

    @refitkit.hookimpl
    def refitkit_load_module(self, target):
        if target != "demo://zeros":
            return None
        return planned_module([OpenEngine("model", {"weight": torch.zeros(2)})])


compiled = refitkit.Pipeline(plugins=[Demo()]).load("demo://zeros")
print(list(compiled.engines), compiled.read("weight"))
# ['model'] tensor([0., 0.])
