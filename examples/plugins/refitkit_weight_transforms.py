import torch

import refitkit
from refitkit.model import TensorInfo
from refitkit.protocols import Made, WeightGroup
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class Scaled:
    """Computes "NAME" from "NAME.int8" and "NAME.scale"."""

    name, priority = "scaled", 50

    def groups(self, request):
        names = set(request.source.names())
        for leaf in request.plan.data.leaves:
            packed, scale = f"{leaf.fqn}.int8", f"{leaf.fqn}.scale"
            if {packed, scale} <= names:
                yield self._group(request.source, leaf, packed, scale)

    def _group(self, source, leaf, packed, scale):
        def make():
            value = source.get(packed).float() * source.get(scale)
            return Made({leaf.fqn: value})

        gives = {leaf.fqn: TensorInfo(dtype="float32", shape=leaf.shape)}
        return WeightGroup((packed, scale), gives, make)


class Int8:
    name = "int8"

    @refitkit.hookimpl
    def refitkit_weight_transforms(self):
        return [Scaled()]


module = planned_module([OpenEngine("model", {"weight": torch.zeros(2)})])
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), Int8()])
compiled = pipeline.load(module)
int8 = {
    "weight.int8": torch.tensor([4, -8], dtype=torch.int8),
    "weight.scale": torch.tensor(0.25),
}
report = pipeline.refit(compiled, int8).report
print(report.transforms[0].takes, compiled.read("weight"))
# ('weight.int8', 'weight.scale') tensor([ 1., -2.])
