"""Name of the backend. A module of its own, so that reading the name imports no torch."""

from __future__ import annotations

NAME = "aotinductor"
