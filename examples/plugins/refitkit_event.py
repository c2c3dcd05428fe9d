import torch

import refitkit
from refitkit.model import Failed, Finished


class Log:
    """Prints how each operation of the user ends."""

    name = "log"

    @refitkit.hookimpl
    def refitkit_event(self, event):
        if event.trial or event.parent:
            return  # refitkit runs this one itself
        if isinstance(event, Finished):
            print(event.verb, "succeeded:", event.result.summary)
        elif isinstance(event, Failed):
            print(event.verb, "failed:", type(event.error).__name__)


pipeline = refitkit.Pipeline(plugins=[Log()])
pipeline.diff({"weight": torch.zeros(2)}, {"weight": torch.ones(2)})
try:
    pipeline.diff({"weight": torch.zeros(2)}, "no/such/file.safetensors")
except refitkit.SourceError:
    pass
# diff succeeded: 1 changed
# diff failed: SourceError
