"""The scheme: how the weights of one model were quantized, as a value and as JSON.

:func:`refitkit_quant.scheme_of` reads a scheme from a quantized model. For each quantized weight it
has the name in a float checkpoint, the rule, and the entries that the exported program reads in its
place. The settings of the plugin, ``Config(plugin_settings={"quant": {...}})``, follow at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, field_validator
from refitkit.errors import ConfigError, Problem, raise_if_resource
from refitkit.files.replacing import replacing
from refitkit.model.base import Frozen
from refitkit.model.slot import Dim, DtypeName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.config import Config


FORMAT: Literal["refitkit-quant/1"] = "refitkit-quant/1"
"""Name and version of the JSON format."""

Size: TypeAlias = Annotated[int, Field(ge=1)]


class TensorSpec(Frozen):
    """Name, dtype and shape of a tensor.

    Attributes:
        name: FQN of the tensor.
        dtype: Name of the dtype without ``torch.``.
        shape: Size of each dimension.
    """

    name: str
    dtype: DtypeName
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Int8WeightOnly(Frozen):
    """The rule of torchao's ``Int8WeightOnlyConfig``: symmetric, with scales in float32.

    Attributes:
        kind: Name of the rule.
        granularity: Unit that has a scale: a row, a group in a row, or the whole tensor.
        group_size: Number of elements in a group; None without groups.
    """

    kind: Literal["int8-weight-only"] = "int8-weight-only"
    granularity: Literal["row", "group", "tensor"]
    group_size: Size | None = None


class IntxWeightOnly(Frozen):
    """The rule of torchao's ``IntxWeightOnlyConfig``, with unpacked values in int8.

    Attributes:
        kind: Name of the rule.
        bits: Number of bits of a value.
        group_size: Number of elements of a row that share a scale; None: the whole row.
        mapping: Formula of scale and zero point from the smallest and largest value.
        algorithm: Method that chooses scales: ``affine`` or ``hqq_scale_only``.
        scale_dtype: Dtype of scales; None: the dtype of the float weight.
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
        tool: Tool that quantized it.
        weight: Float weight as in a checkpoint.
        also: Other names of the float weight if it was tied. A checkpoint may use any of them.
        rule: Rule that quantizes it.
        parts: Entries that the exported program reads instead, in the order in which torchao
            unwraps the quantized tensor.
    """

    tool: Literal["torchao"] = "torchao"
    weight: TensorSpec
    also: tuple[str, ...] = ()
    rule: Rule
    parts: tuple[TensorSpec, ...]

    @property
    def entries(self) -> tuple[TensorSpec, ...]:
        """The entries that the program reads."""
        return self.parts


class ModeloptWeight(Frozen):
    """A weight that NVIDIA ModelOpt quantized, with the calibration of its layer.

    Attributes:
        tool: Tool that quantized it.
        weight: Weight, which the program reads in float.
        format: Quantized format: ``fp8`` (E4M3) or ``int8``.
        axis: Dimension whose indices each have a scale; None: one scale for the tensor.
        amax: Largest absolute value that the format represents: ``_amax`` of the weight's
            quantizer.
        amax_is: ``max``: the largest absolute value of the weight. ``given``: another method, such
            as the smallest error, so a source has to contain it.
        input_amax: ``_amax`` of the quantizer of the layer's input; None without one.
    """

    tool: Literal["modelopt"] = "modelopt"
    weight: TensorSpec
    format: Literal["fp8", "int8"]
    axis: int | None = None
    amax: TensorSpec
    amax_is: Literal["max", "given"] = "max"
    input_amax: TensorSpec | None = None

    @property
    def entries(self) -> tuple[TensorSpec, ...]:
        """The entries that the program reads."""
        own = (self.weight, self.amax)
        return own if self.input_amax is None else (*own, self.input_amax)


QuantizedWeight: TypeAlias = Annotated[TorchaoWeight | ModeloptWeight, Field(discriminator="tool")]


class Scheme(Frozen):
    """How all quantized weights of one model were quantized.

    Attributes:
        format: Always :data:`FORMAT`.
        versions: Versions of the tools that quantized, by the name of the distribution.
        weights: One entry for each quantized weight.
    """

    format: Literal["refitkit-quant/1"] = FORMAT
    versions: dict[str, str] = Field(default_factory=dict)
    weights: tuple[QuantizedWeight, ...]

    def save(self, path: str | Path) -> None:
        """Write the scheme to a JSON file.

        Raises:
            RefitError: The file cannot be written; the message has the reason.
        """
        # Imported on first use, to keep the import of the plugin fast.
        from refitkit.files.archive import saying_why

        path = Path(path)
        with saying_why(path), replacing(path) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Scheme:
        """The scheme in a file that ``save`` wrote.

        Raises:
            ConfigError: The file cannot be read, or is not a scheme; lists every problem.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as exc:
            raise_if_resource(exc, f"The scheme {str(path)!r} cannot be read")
            raise ConfigError(f"The scheme {str(path)!r} cannot be read: {exc}.") from exc
        except ValidationError as exc:
            message = f"{str(path)!r} is not a quantization scheme."
            raise ConfigError(message, problems=problems_of(exc)) from exc


def problems_of(error: ValidationError, prefix: str = "") -> Iterator[Problem]:
    """The errors of pydantic as problems.

    Args:
        error: Error of a validation.
        prefix: Path of the validated value, for the subjects.
    """
    for one in error.errors():
        where = ".".join(map(str, one["loc"]))
        # pydantic gives no location for an error of the whole value.
        subject = f"{prefix}.{where}" if prefix and where else prefix or where or "scheme"
        yield Problem(subject, one["type"].replace("_", " "), hint=one["msg"])


# -- settings of the plugin -----------------------------------------------------------------------

PLUGIN = "quant"
"""Name of this plugin."""

WHERE = f"plugin_settings.{PLUGIN}"
"""Path of the settings, for messages."""


class QuantSettings(Frozen):
    """The settings in ``plugin_settings["quant"]``.

    Attributes:
        scheme: Scheme of the model: a ``Scheme``, the same as plain data, or the path of its file.
            None: the plugin quantizes nothing.
        error_limit: Largest quantization error that passes, relative to the largest absolute
            element of the weight.
    """

    scheme: Scheme | None = None
    error_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @field_validator("scheme", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        # A text or path in the settings names a file.
        return Scheme.load(value) if isinstance(value, str | Path) else value

    @classmethod
    def of(cls, config: Config) -> QuantSettings:
        """The settings of a pipeline.

        Raises:
            ConfigError: A setting does not exist or is invalid; lists all of them.
        """
        given = config.plugin_settings.get(PLUGIN, {})
        try:
            return cls.model_validate(given)
        except ValidationError as exc:
            message = "The settings of refitkit-quant are invalid."
            raise ConfigError(message, problems=problems_of(exc, WHERE)) from exc
