import torch

import refitkit
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import ScenePlugin, planned_module


class Cache:
    """Keeps results that were computed with the present weights."""

    name = "cache"

    def __init__(self):
        self.results = {}

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report):
        print("dropping", len(self.results), "results after", report.outcome)
        self.results.clear()


cache = Cache()
pipeline = refitkit.Pipeline(plugins=[ScenePlugin(), cache])
compiled = pipeline.load(planned_module([OpenEngine("model", {"weight": torch.zeros(2)})]))
cache.results["a question"] = "an answer of the old weights"
pipeline.refit(compiled, {"weight": torch.ones(2)})
print(cache.results)
# dropping 1 results after committed
# {}
