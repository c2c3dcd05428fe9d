"""Check the fields of ``init_info`` and ``update_info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping


def require_fields(what: str, given: Mapping[str, Any], wanted: Mapping[str, type]) -> None:
    """Raise ConfigError unless there are exactly the wanted fields, of their types.

    Args:
        what: Name of the mapping, for the message.
        given: The fields.
        wanted: Types by name.
    """
    problems = [
        Problem(name, "missing", wanted=kind.__name__)
        for name, kind in wanted.items()
        if name not in given
    ]
    problems += [
        Problem(name, "type", type(given[name]).__name__, kind.__name__)
        for name, kind in wanted.items()
        if name in given and not isinstance(given[name], kind)
    ]
    problems += [Problem(str(name), "no such field") for name in given if name not in wanted]
    if problems:
        names = ", ".join(wanted) or "none"
        raise ConfigError(f"{what} is wrong.", problems=problems, hint=f"Its fields: {names}.")
