"""The base class of all models that are stored or shown."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """An immutable model. An unknown or misspelt field raises a ``ValidationError``."""

    # JSON has no inf and nan: they are written as strings
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
