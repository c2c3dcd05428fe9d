"""Services of the pipeline that objects of plugins may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from refitkit.model import LayerType


@dataclass(frozen=True)
class Tools:
    """Services of the pipeline for backends, strategies, verifiers and module loaders.

    Attributes:
        layer_types: Types of network layers that hold weights, of all plugins, by name.
        progress: Reports progress. Call it with one line of text for each long step, never for
            each tensor.
        check_finite: Whether each element of a new value must be finite if the present one is.
        direct: Whether engines may take weights past their vendor's own way of refitting, where
            that is proved to give the same.
        cache: Folder of what takes long to find out and can be found out again; the settings name
            it. None: keep nothing.
        shared: Weights of another process that ``load_module`` has to serve from, instead of those
            of the target; see ``SharesWeights``. None: those of the target.
        may_import: Whether a file may name a module, by its full name, to be imported: it is of an
            installed plugin that is in use. A file must not choose other code to run.
    """

    layer_types: Mapping[str, LayerType] = field(default_factory=dict)
    progress: Callable[[str], None] = field(default=lambda _: None)
    check_finite: bool = True
    direct: bool = True
    cache: Path | None = None
    shared: object = None
    may_import: Callable[[str], bool] = field(default=lambda _: False)
