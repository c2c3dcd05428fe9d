"""What follows from an object is found out once, and forgotten with the object."""

from __future__ import annotations

import gc

from refitkit.recipe.weak_cache import cached_per_object


class Thing:
    """Known by its identity."""


def test_once_for_each_object_and_no_longer_than_that() -> None:
    asked: list[int] = []

    @cached_per_object
    def number(_: Thing) -> list[int]:
        asked.append(len(asked))
        return asked[-1:]

    first, second = Thing(), Thing()
    assert [number(first), number(second), number(first)] == [[0], [1], [0]]
    assert number.__name__ == "number"
    del first
    gc.collect()
    assert number(Thing()) == [2]
    assert number(second) == [1]
