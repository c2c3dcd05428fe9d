"""A bite: a check, a broken object that it has to catch, and the message that it has to raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bite:
    """A broken object for one check.

    Attributes:
        check: Name of the check.
        broken: A suite for the broken object.
        says: Regular expression that matches the message.
        good: The same suite for a correct object, which passes the check.
    """

    check: str
    broken: type
    says: str
    good: type

    @property
    def name(self) -> str:
        return f"{self.check}-{self.broken.__name__}"


def attempt(suite: type, check: str) -> Any:
    """Run one check on a new instance of its suite, as pytest does."""
    return getattr(suite(), check)()


def checks_of(suite: type) -> set[str]:
    """Names of all checks of a suite."""
    return {name for name in dir(suite) if name.startswith("test_")}
