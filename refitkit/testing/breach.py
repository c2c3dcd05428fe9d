"""How checks report: a broken contract, an incomplete suite, a skip, an expected refusal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from refitkit.errors import RefitError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Breach(AssertionError):  # noqa: N818 - test runners show it as a failure, not as an error
    """The code under test breaks a contract. The message is ``contract: found advice``.

    Attributes:
        contract: Member of :mod:`refitkit.protocols` that is broken, such as ``Engine.stage``.
        found: Observed behaviour, in one sentence; its subject may be "it", the contract.
        advice: Action for the author, as an imperative sentence.
    """

    def __init__(self, contract: str, found: str, advice: str) -> None:
        super().__init__(f"{contract}: {found} {advice}")
        self.contract = contract
        self.found = found
        self.advice = advice


class SuiteError(Exception):
    """The author's part of a suite is incomplete or wrong, so a check has no meaning."""


def skip(reason: str) -> NoReturn:
    """Skip a check that does not apply, with a reason."""
    import pytest  # noqa: PLC0415 - suites can be imported without pytest

    pytest.skip(reason)


@contextmanager
def refusal(contract: str, what: str, advice: str) -> Iterator[None]:
    """Expect the body to raise an error of :mod:`refitkit.errors`.

    Args:
        contract: Protocol member that has to refuse.
        what: Refused input, as the subject of a sentence: "<what> was accepted."
        advice: Text of :attr:`Breach.advice`.

    Raises:
        Breach: The body raised nothing, or another exception, which callers take for a bug.
    """
    try:
        yield
    except RefitError:
        return
    except Exception as exc:
        found = f"{what} raised {type(exc).__name__}: {exc}."
        advice = f"Raise an error of refitkit.errors. {advice}"
        raise Breach(contract, found, advice) from exc
    raise Breach(contract, f"{what} was accepted.", advice)
