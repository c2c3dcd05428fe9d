"""Built-in weight transports: ``stream`` and ``disk``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.protocols import WeightTransport


@hookimpl
def refitkit_weight_transports(config: Config) -> list[WeightTransport]:
    """Return the transports. Settings of the plugin ``transports``: ``roots`` for ``disk``."""
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.transports.disk import DiskTransport, roots_in
    from refitkit.builtin.transports.stream import StreamTransport

    return [StreamTransport(), DiskTransport(roots_in(config))]
