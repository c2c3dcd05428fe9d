"""The transport ``stream``: tensors of this process, or of an iterator in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.transports.fields import require_fields
from refitkit.errors import ConfigError, SourceError, raised_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refitkit.protocols import WeightSource

_EXPECTED = "pairs of a name and a tensor, or a dict of them"


class StreamTransport:
    """Takes tensors as they are: ``{"update_info": {"weights": state_dict_or_pairs}}``."""

    name = "stream"

    def open(
        self, init_info: Mapping[str, Any], open_weights: Callable[[object], WeightSource]
    ) -> StreamTransport:
        """Return itself: there is nothing to connect to."""
        del open_weights
        require_fields("init_info of 'stream'", init_info, {})
        return self

    def receive(self, update_info: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """Return each tensor as a bucket of its own.

        Args:
            update_info: ``weights``: a dict of tensors, or an iterable of pairs of a name and a
                tensor.

        Raises:
            ConfigError: It has other fields, or gives something else.
        """
        require_fields("update_info of 'stream'", update_info, {"weights": Iterable})
        for pair in _pairs(update_info["weights"]):
            if not isinstance(pair, tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
                raise ConfigError(f"'weights' gave a {type(pair).__name__}.", hint=_HINT)
            name, tensor = pair
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                kinds = f"{type(name).__name__} and {type(tensor).__name__}"
                raise ConfigError(f"'weights' gave a pair of {kinds}.", hint=_HINT)
            yield {name: tensor}

    def close(self) -> None:
        """Do nothing."""


def _pairs(weights: Any) -> Iterator[Any]:
    # the iterable is the caller's: what it raises is no fault of the plugin
    with raised_as(SourceError, "'weights' failed"):
        yield from weights.items() if isinstance(weights, Mapping) else weights


_HINT = f"It must give {_EXPECTED}."
