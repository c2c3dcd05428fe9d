"""What a module consists of, apart from its weights: a model, its inputs and its options."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from refitkit import ConfigError, Problem, ToolchainError
from refitkit.model import Slot

if TYPE_CHECKING:
    from collections.abc import Mapping


class Data(BaseModel):
    """A frozen value that a saved file contains."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Options(Data):
    """Options of the backend.

    Attributes:
        weights: ``constants``: a refit compiles the model for the new weights, and calls are fast.
            ``inputs``: a refit copies the weights, and calls are slower.
        threads: Number of threads of a call. None: OpenVINO chooses.
        precision: Precision of the arithmetic. ``bf16`` is faster where the processor has it.
        hint: Whether OpenVINO optimizes the time of one call, or calls per second.
    """

    weights: Literal["constants", "inputs"] = "constants"
    threads: PositiveInt | None = None
    precision: Literal["f32", "bf16"] = "f32"
    hint: Literal["latency", "throughput"] = "latency"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Check the options of a user.

        Raises:
            ConfigError: Options do not exist, or have wrong values. It lists all of them.
        """
        try:
            return cls.model_validate(dict(options))
        except ValidationError as exc:
            problems = [
                Problem(".".join(map(str, one["loc"])), "option", hint=one["msg"])
                for one in exc.errors()
            ]
            raise ConfigError(
                "The backend 'openvino' cannot use these options.",
                problems=problems,
                hint=f"Options are: {', '.join(cls.model_fields)}.",
            ) from exc

    def properties(self) -> dict[str, Any]:
        """Return the options as OpenVINO takes them."""
        found = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": self.hint.upper()}
        return found | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})


class TensorSpec(Data):
    """One input or output of the program: a name, a dtype of torch, a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Manifest(Data):
    """Description of a module, which a saved file contains.

    Attributes:
        format: Name and version of the format.
        slots: One slot for each weight, in the order of the model's inputs.
        inputs: Inputs of a call; they follow the weights among the model's inputs.
        outputs: Outputs of a call.
        in_spec: Structure of the inputs, as ``torch.utils._pytree.treespec_dumps`` writes it.
        out_spec: Structure of the outputs.
        fingerprint: Identity of the program without its weights: ``ProgramFacts.graph``.
        options: Options of the backend.
        versions: Versions of the software that converted the program, by package.
        attachments: Names of the attachments in the file.
    """

    format: Literal["refitkit-openvino/1"] = "refitkit-openvino/1"
    slots: tuple[Slot, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_spec: str
    out_spec: str
    fingerprint: str
    options: Options
    versions: dict[str, str] = Field(default_factory=dict)
    attachments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A model without weights: its description, and the two files of OpenVINO's IR format."""

    manifest: Manifest
    xml: bytes
    constants: bytes


def load_openvino() -> Any:
    """Return the module ``openvino``.

    Raises:
        ToolchainError: It is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as exc:
        raise ToolchainError(
            f"OpenVINO cannot be imported: {exc}.", hint="Install it: pip install openvino."
        ) from exc
