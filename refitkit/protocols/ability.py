"""The metaclass of protocols whose members refitkit looks for in each refit."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol


class Ability(type(Protocol)):  # type: ignore[misc]  # typing does not name the metaclass
    """Finds the members of a protocol once. ``typing`` does so in each check, up to Python 3.11.

    One refit makes dozens of checks, and they took a third of the time of a small one.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        """Return whether an object has all members; a method that is None does not count."""
        return all(
            getattr(instance, name, None) is not None if is_method else hasattr(instance, name)
            for name, is_method in _members(cls)
        )


def missing_methods(protocol: type, instance: object) -> list[str]:
    """Names of the methods that an object lacks. No property is evaluated."""
    methods = (name for name, is_method in _members(protocol) if is_method)
    return [name for name in methods if not callable(getattr(instance, name, None))]


@cache
def _members(protocol: type) -> tuple[tuple[str, bool], ...]:
    """Return the members of a protocol, and whether each is a method."""
    found: dict[str, Any] = {}
    for base in protocol.__mro__:
        if base not in {Protocol, object} and base.__name__ != "Generic":
            found |= {**vars(base), **found}
            found |= dict.fromkeys(getattr(base, "__annotations__", {}), None)
    own = {name: value for name, value in found.items() if not name.startswith("_")}
    return tuple((name, callable(value)) for name, value in own.items())
