"""The name of the backend."""

from __future__ import annotations

NAME = "aotinductor"
