"""Weight transports: how the weights of a live update reach the process that serves.

A plugin offers transports with the hook ``refitkit_weight_transports``. A receiver
(:class:`refitkit.WeightReceiver`) opens one by name, and asks it for the buckets of each update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from refitkit.protocols.sources import WeightSource


@runtime_checkable
class WeightTransport(Protocol, metaclass=Ability):
    """A way for weights to reach this process: files, a process group, memory of the device."""

    @property
    def name(self) -> str:
        """Name of the transport: ``backend`` in ``init_info``."""

    def open(
        self, init_info: Mapping[str, Any], open_weights: Callable[[object], WeightSource]
    ) -> TransportConnection:
        """Return a connection to a trainer.

        Called by ``init_weight_transfer_engine``. A peer chose ``init_info``: check it, and name
        each wrong field. Never unpickle what a peer sends.

        Args:
            init_info: Plain data that the trainer sent, without ``backend``.
            open_weights: Opens weights of any kind with the plugins of the pipeline.

        Raises:
            ConfigError: A field is missing, unknown or wrong; lists all of them.
        """


class TransportConnection(Protocol, metaclass=Ability):
    """An open connection to one trainer."""

    def receive(self, update_info: Mapping[str, Any]) -> Iterable[Mapping[str, torch.Tensor]]:
        """Return the buckets that one call of ``update_weights`` announces, one after another.

        Called while the old weights serve. The receiver stages a bucket before it asks for the next
        one, and keeps no tensor of it longer than it needs to: the memory may be used again.

        Args:
            update_info: Plain data that the trainer sent.

        Raises:
            ConfigError: A field is missing, unknown or wrong; lists all of them.
            SourceError: The weights cannot be read. Any other exception becomes a ``PluginError``
                that names the transport.
        """

    def close(self) -> None:
        """End the connection. Its errors are ignored."""
