from dataclasses import replace

import torch

import refitkit


class Converters:
    """Goes with converters of TensorRT layers: notes their version in each plan."""

    name, version = "my-converters", "1.2"

    @refitkit.hookimpl(wrapper=True)
    def refitkit_partition(self, backend):
        parts = yield  # the parts that another plugin returns
        if backend not in {"torch_tensorrt", "tensorrt_network"}:
            return parts
        planned = next(iter(parts.values()))  # all parts are this object
        for part, values in planned.values().items():
            for slot, value in values.items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise refitkit.CompileError(f"The slot {slot!r} of {part!r} overflows.")
                print(part, slot, tuple(value.shape))
        settings = {**planned.settings, self.name: self.version}
        return dict.fromkeys(parts, replace(planned, settings=settings))


model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU()).eval()
program = torch.export.export(model, (torch.ones(2, 4),))
pipeline = refitkit.Pipeline(plugins=[Converters()])
compiled = pipeline.compile(program, "tensorrt_network", {"min_block_size": 1})
print(compiled.plan.data.fingerprint.settings["my-converters"])
# _run_on_acc_0 0/linear_weight CONSTANT (24,)
# _run_on_acc_0 0/linear_bias CONSTANT (6,)
# 1.2
