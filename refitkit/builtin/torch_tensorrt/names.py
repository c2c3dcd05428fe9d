"""Names of the backends."""

from __future__ import annotations

NAME = "torch_tensorrt"
NETWORK = "tensorrt_network"
