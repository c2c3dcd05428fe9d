"""The name of the plugin that adds the built-in commands."""

from __future__ import annotations

COMMANDS = "cli"
