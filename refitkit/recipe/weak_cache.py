"""What follows from an object that never changes, such as a plan: found out once."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable


Key = TypeVar("Key")
Found = TypeVar("Found")


def once_for_each(find: Callable[[Key], Found]) -> Callable[[Key], Found]:
    """Remember a function's result for every object, as long as the object is there.

    Args:
        find: Takes an object that is known by its identity. Its result must not hold the object.
    """
    known: WeakKeyDictionary[Key, Found] = WeakKeyDictionary()

    @wraps(find)
    def found(of: Key) -> Found:
        result = known.get(of)
        if result is None:
            result = known[of] = find(of)
        return result

    return found
