"""What a check says when something does not keep its contract."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from refitkit.errors import RefitError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Breach(AssertionError):  # noqa: N818 - to a test runner it is a failed assertion, no error
    """Something does not keep its contract.

    Attributes:
        contract: What asks for it: a member of :mod:`refitkit.protocols`, such as ``Engine.stage``.
        found: What was seen, in one sentence.
        advice: What to do.
    """

    def __init__(self, contract: str, found: str, advice: str) -> None:
        super().__init__(f"{contract}: {found} {advice}")
        self.contract = contract
        self.found = found
        self.advice = advice


class SuiteError(Exception):
    """A suite was not filled in well enough to say anything of what it is for."""


def skip(reason: str) -> NoReturn:
    """End a check that does not apply."""
    import pytest  # noqa: PLC0415 - suites can be imported without it

    pytest.skip(reason)


@contextmanager
def refusal(contract: str, what: str, advice: str) -> Iterator[None]:
    """Expect a typed error from the body.

    Args:
        contract: What asks for it.
        what: What was asked for, as the beginning of a sentence that goes on with "was ...".
        advice: What to do.

    Raises:
        Breach: Nothing was raised, or what nobody can tell from a bug.
    """
    try:
        yield
    except RefitError:
        return
    except Exception as exc:
        found = f"{what} was answered with {type(exc).__name__}: {exc}."
        advice = f"Raise an error of refitkit.errors. {advice}"
        raise Breach(contract, found, advice) from exc
    raise Breach(contract, f"{what} was accepted.", advice)
