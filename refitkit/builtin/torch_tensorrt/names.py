"""Names of the backends, in a module that imports nothing."""

from __future__ import annotations

NAME = "torch_tensorrt"
NETWORK = "tensorrt_network"
