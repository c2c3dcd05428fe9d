"""Settings of this plugin: ``Config(plugin_settings={"quant": {...}})``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, field_validator
from refitkit.errors import ConfigError
from refitkit.model.base import Frozen

from refitkit_quant.scheme import Scheme, problems_of

if TYPE_CHECKING:
    from refitkit.config import Config

PLUGIN = "quant"
"""Name of this plugin."""

WHERE = f"plugin_settings.{PLUGIN}"
"""Where its settings are, for messages."""


class Settings(Frozen):
    """What may stand in ``plugin_settings["quant"]``.

    Attributes:
        scheme: How the weights of the model were quantized: what ``scheme_of`` gave, the same as
            plain data, or the path of its file. None: this plugin quantizes nothing.
        error_limit: Largest error of quantization that passes, relative to the largest absolute
            element of the weight. 1: as large as that element.
    """

    scheme: Scheme | None = None
    error_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @field_validator("scheme", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return Scheme.load(value) if isinstance(value, str | Path) else value

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Those of a pipeline.

        Raises:
            ConfigError: A setting does not exist or cannot be meant; names all of them.
        """
        given = config.plugin_settings.get(PLUGIN, {})
        try:
            return cls.model_validate(given)
        except ValidationError as exc:
            message = "These settings of refitkit-quant cannot be used."
            raise ConfigError(message, problems=problems_of(exc, WHERE)) from exc
