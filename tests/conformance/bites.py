"""What a bite is: a check, something broken that it has to catch, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bite:
    """One broken thing.

    Attributes:
        check: Name of the check.
        broken: A suite for the broken thing.
        says: A pattern that the message has to match.
        good: The same suite for the same thing, not broken: there the check passes.
    """

    check: str
    broken: type
    says: str
    good: type

    @property
    def name(self) -> str:
        return f"{self.check}-{self.broken.__name__}"


def attempt(suite: type, check: str) -> Any:
    """Run one check as pytest would: a new instance for each."""
    return getattr(suite(), check)()


def checks_of(suite: type) -> set[str]:
    """Names of all checks of a suite."""
    return {name for name in dir(suite) if name.startswith("test_")}
