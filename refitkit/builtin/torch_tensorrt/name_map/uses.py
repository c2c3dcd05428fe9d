"""Engine weight names, read: in which module, by which operation, as which operand.

The forms are those of torch-tensorrt 2.11 and 2.12. ``to_trt_weights`` (``converter_utils.py``)
names weights of layers ``[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] KERNEL``;
constants are named by their converters, as ``c/linear_1_weight CONSTANT``. Before the ``/`` stands
the innermost module of the node, behind it the node of the lowered graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Op = Literal["convolution", "batch_norm", "linear", "addmm", "embedding", "layer_norm"]
Role = Literal["weight", "bias", "running_mean", "running_var", "scale", "shift"]


@dataclass(frozen=True)
class Use:
    """Where an operand is used.

    Attributes:
        module: Path of the innermost module; empty for the model itself.
        op: The operation.
        role: What it is to the operation; ``scale`` and ``shift`` are the two of a folded batch
            norm.
    """

    module: str
    op: Op
    role: Role

    def __str__(self) -> str:
        return f"the {self.role} of {self.op} in {self.module or 'the model itself'!r}"


_BATCH_NORM = r"(?:_native_batch_norm_legit_no_training|native_batch_norm|batch_norm)"
_FORMS: tuple[tuple[Op, Role, str], ...] = (
    (
        "convolution",
        "weight",
        r"\[CONVOLUTION\]-\[aten_ops\.convolution\.default\]-\[{module}/convolution{n}\] KERNEL",
    ),
    (
        "convolution",
        "bias",
        r"\[CONVOLUTION\]-\[aten_ops\.convolution\.default\]-\[{module}/convolution{n}\] BIAS",
    ),
    (
        "batch_norm",
        "scale",
        rf"\[SCALE\]-\[aten_ops\.{_BATCH_NORM}\.default\]-\[{{module}}/{_BATCH_NORM}{{n}}\] SCALE",
    ),
    (
        "batch_norm",
        "shift",
        rf"\[SCALE\]-\[aten_ops\.{_BATCH_NORM}\.default\]-\[{{module}}/{_BATCH_NORM}{{n}}\] SHIFT",
    ),
    # 2.11 leaves the folding to TensorRT
    ("batch_norm", "weight", rf"{{module}}/{_BATCH_NORM}{{n}}_weight CONSTANT"),
    ("batch_norm", "bias", rf"{{module}}/{_BATCH_NORM}{{n}}_bias CONSTANT"),
    ("batch_norm", "running_mean", rf"{{module}}/{_BATCH_NORM}{{n}}_running_mean CONSTANT"),
    ("batch_norm", "running_var", rf"{{module}}/{_BATCH_NORM}{{n}}_running_var CONSTANT"),
    ("linear", "weight", r"{module}/linear{n}_weight CONSTANT"),
    ("linear", "bias", r"{module}/linear{n}_bias CONSTANT"),
    ("addmm", "weight", r"{module}/addmm{n}_mm_other CONSTANT"),
    ("addmm", "bias", r"{module}/addmm{n}_constant_0 CONSTANT"),
    ("embedding", "weight", r"{module}/embedding{n}_embedding_tensor CONSTANT"),
    ("layer_norm", "weight", r"{module}/native_layer_norm{n}_weight CONSTANT"),
    ("layer_norm", "bias", r"{module}/native_layer_norm{n}_bias CONSTANT"),
)
_PATTERNS = tuple(
    (op, role, re.compile(form.format(module=r"(?P<module>[^/\[\]]*)", n=r"(?:_\d+)?")))
    for op, role, form in _FORMS
)


def use_of(slot: str) -> Use | None:
    """What an engine weight's name says; None where it has none of the known forms."""
    for op, role, pattern in _PATTERNS:
        found = pattern.fullmatch(slot)
        if found:
            return Use(found["module"], op, role)
    return None
