import torch

import refitkit
from refitkit.model import OutputMeasure, VerificationResult
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class SmallNorm:
    """Accepts weights whose norm is at most 10."""

    name = "small-norm"

    def prepare(self, request):
        limit = 10.0  # compute references here: nothing has been written yet

        def check(module):
            slots = [(e, name) for e in module.engines.values() for name in e.slots]
            found = [(name, float(engine.read(name).norm())) for engine, name in slots]
            measures = tuple(
                OutputMeasure(name=name, ok=norm <= limit, max_abs_error=norm, limit=limit)
                for name, norm in found
            )
            return VerificationResult(
                verifier=self.name, ok=all(m.ok for m in measures), measures=measures
            )

        return check


class Norms:
    name = "norms"

    @refitkit.hookimpl
    def refitkit_verifiers(self):
        return [SmallNorm()]


module = planned_module([OpenEngine("model", {"weight": torch.zeros(2)})])
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), Norms()])
compiled = pipeline.load(module)
print(pipeline.refit(compiled, {"weight": torch.ones(2)}, verify="small-norm").report.outcome)
try:
    pipeline.refit(compiled, {"weight": torch.full((2,), 99.0)}, verify="small-norm")
except refitkit.VerificationError:
    print("rolled back to", compiled.read("weight"))
# committed
# rolled back to tensor([1., 1.])
