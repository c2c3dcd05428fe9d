"""A module that a session imports: builds fail while a file is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from refitkit.builtin.torch_tensorrt.networks import Network

BROKEN = Path(os.environ["REFITKIT_TEST_BROKEN"])
_point = Network.point


def _broken(self: Network, values: Any) -> None:
    """Point layers to values, and ask for an output that nothing gives: TensorRT refuses that."""
    _point(self, values)
    if BROKEN.exists():
        network = self._interpreter.ctx.net
        while network.num_outputs:
            network.unmark_output(network.get_output(0))


Network.point = _broken  # type: ignore[method-assign]
