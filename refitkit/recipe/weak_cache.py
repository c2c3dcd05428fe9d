"""Cache values derived from immutable objects, such as plans, as long as the objects live."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable


Key = TypeVar("Key")
Derived = TypeVar("Derived")


def cached_per_object(derive: Callable[[Key], Derived]) -> Callable[[Key], Derived]:
    """A function that computes its result once for each object.

    The cache holds objects weakly: it drops a result when its object is freed.

    Args:
        derive: Takes one object, which must hash by identity and never change. Its result must not
            be None, and must not reference the object, or the object is never freed.
    """
    cache: WeakKeyDictionary[Key, Derived] = WeakKeyDictionary()

    @wraps(derive)
    def cached(key: Key) -> Derived:
        result = cache.get(key)
        if result is None:
            # two threads may both compute it: the results are equal, and the last one is kept
            result = cache[key] = derive(key)
        return result

    return cached
