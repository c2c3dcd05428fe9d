"""What the pipeline lends to backends, strategies and openers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.model import Step
from refitkit.protocols import Tools

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host


def tools_for(host: Host, config: Config, verb: str, stage: str) -> Tools:
    """Layer types of all plugins, and a way to tell of progress in one stage of one verb.

    Raises:
        PluginError: Two plugins offer a layer type of the same name; names both.
    """
    return Tools(
        layer_types=host.named("refitkit_layer_types"),
        progress=lambda text: host.emit(Step(verb, stage, text)),
        check_finite=config.check_finite,
    )
