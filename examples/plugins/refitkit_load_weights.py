import torch

import refitkit
from refitkit.recipe import TensorMap


class Constant:
    """Opens "constant://0.5": a weight that has this value in each element."""

    name = "constant"

    @refitkit.hookimpl
    def refitkit_load_weights(self, source):
        if not isinstance(source, str) or not source.startswith("constant://"):
            return None
        text = source.removeprefix("constant://")
        try:
            number = float(text)
        except ValueError as error:
            message = f"{text!r} is not a number."
            raise refitkit.SourceError(message) from error
        return TensorMap({"weight": torch.full((2,), number)}, source)


pipeline = refitkit.Pipeline(plugins=[Constant()])
print(pipeline.diff("constant://1", "constant://1.5").rows[0].largest)
# 0.5
