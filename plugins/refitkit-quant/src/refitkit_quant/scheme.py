"""How the weights of one model were quantized: a value to keep beside its engine, as JSON.

A scheme is read off the quantized model by :func:`refitkit_quant.scheme_of`. It says of each
quantized weight what a float checkpoint calls it, by which rule it is quantized, and which entries
the exported program reads in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, ValidationError
from refitkit.errors import ConfigError, Problem, raise_if_resource
from refitkit.files.replacing import replacing
from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT: Literal["refitkit-quant/1"] = "refitkit-quant/1"
"""Name and version of the format."""

Size: TypeAlias = Annotated[int, Field(ge=1)]


class Entry(Frozen):
    """A tensor by name.

    Attributes:
        name: Its FQN.
        dtype: torch's name without the ``torch.``.
        shape: Sizes of all dimensions.
    """

    name: str
    dtype: DtypeName
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Int8WeightOnly(Frozen):
    """torchao's ``Int8WeightOnlyConfig``: symmetric, with scales in float32.

    Attributes:
        kind: Which rule this is.
        granularity: What has a scale of its own: a row, a group of a row, or the whole tensor.
        group_size: Elements of a group; None where there are no groups.
    """

    kind: Literal["int8-weight-only"] = "int8-weight-only"
    granularity: Literal["row", "group", "tensor"]
    group_size: Size | None = None


class IntxWeightOnly(Frozen):
    """torchao's ``IntxWeightOnlyConfig``, its values as int8, not packed.

    Attributes:
        kind: Which rule this is.
        bits: Bits of a value.
        group_size: Elements of a row that share a scale; None: the whole row does.
        mapping: How scale and zero point follow from the least and the largest value.
        algorithm: How they are chosen: ``affine``, or ``hqq_scale_only``.
        scale_dtype: dtype of scales where it is not that of the float weight.
    """

    kind: Literal["intx-weight-only"] = "intx-weight-only"
    bits: Annotated[int, Field(ge=1, le=8)]
    group_size: Size | None = None
    mapping: Literal["symmetric", "asymmetric", "symmetric_no_clipping_err"]
    algorithm: Literal["affine", "hqq_scale_only"] = "affine"
    scale_dtype: DtypeName | None = None


Rule: TypeAlias = Annotated[Int8WeightOnly | IntxWeightOnly, Field(discriminator="kind")]


class TorchaoWeight(Frozen):
    """A weight that torchao quantized.

    Attributes:
        tool: Who quantized it.
        weight: The float weight, as a checkpoint has it.
        also: Other names of the float tensor, where it was tied: a checkpoint may have one of them.
        rule: How it is quantized.
        parts: What the exported program reads instead, in the order of the tensor's own parts.
    """

    tool: Literal["torchao"] = "torchao"
    weight: Entry
    also: tuple[str, ...] = ()
    rule: Rule
    parts: tuple[Entry, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the program reads of it."""
        return self.parts


class ModeloptWeight(Frozen):
    """A weight that NVIDIA ModelOpt quantizes, and the calibration of its layer.

    Attributes:
        tool: Who quantized it.
        weight: The weight, which the program reads in float.
        format: What it becomes: ``fp8`` (E4M3) or ``int8``.
        axis: The dimension of which each index has a scale of its own; None: one for the tensor.
        amax: The largest absolute value that is represented: its quantizer's ``_amax``.
        amax_is: ``max``, the largest of the weight; ``given``, chosen in another way, such as for
            the least error: then a source has to have it.
        input_amax: The same of the layer's input; None where that is not quantized.
    """

    tool: Literal["modelopt"] = "modelopt"
    weight: Entry
    format: Literal["fp8", "int8"]
    axis: int | None = None
    amax: Entry
    amax_is: Literal["max", "given"] = "max"
    input_amax: Entry | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the program reads of it."""
        own = (self.weight, self.amax)
        return own if self.input_amax is None else (*own, self.input_amax)


QuantizedWeight: TypeAlias = Annotated[TorchaoWeight | ModeloptWeight, Field(discriminator="tool")]


class Scheme(Frozen):
    """How all quantized weights of one model were quantized.

    Attributes:
        format: Always :data:`FORMAT`.
        versions: Versions of what quantized, by distribution.
        weights: One entry for each quantized weight.
    """

    format: Literal["refitkit-quant/1"] = FORMAT
    versions: dict[str, str] = Field(default_factory=dict)
    weights: tuple[QuantizedWeight, ...]

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            RefitError: It cannot be written there; says why.
        """
        from refitkit.files.archive import saying_why

        path = Path(path)
        with saying_why(path), replacing(path) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Scheme:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: It cannot be read, or is no scheme; says where.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as exc:
            raise_if_resource(exc, f"The scheme {str(path)!r} cannot be read")
            raise ConfigError(f"The scheme {str(path)!r} cannot be read: {exc}.") from exc
        except ValidationError as exc:
            message = f"{str(path)!r} is no scheme of quantization."
            raise ConfigError(message, problems=problems_of(exc)) from exc


def problems_of(error: ValidationError, prefix: str = "") -> Iterator[Problem]:
    """What pydantic found, as problems."""
    for one in error.errors():
        where = ".".join(map(str, one["loc"]))
        subject = f"{prefix}.{where}" if prefix and where else prefix or where or "scheme"
        yield Problem(subject, one["type"].replace("_", " "), hint=one["msg"])
