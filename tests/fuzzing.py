"""What fuzzing of any kind of file shares: a mutant is tried for so long, and what comes of it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Verdict = tuple[str, str]
"""What came of it, ``fault: ...`` where that may not be; and more of it."""


class HungError(BaseException):
    """It took too long; nothing that the code under test catches."""


def tried(attempt: Callable[[], Verdict], seconds: int, kind: str, error: str) -> Verdict:
    """What comes of an attempt.

    Args:
        attempt: Gives a verdict.
        seconds: So long it may take.
        kind: What the mutant is, for faults.
        error: What errors have to be that are none of its verdicts.
    """

    def ring(*_: object) -> None:
        raise HungError

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        verdict, more = attempt()
    except HungError:
        return "fault: it hung", kind
    except Exception as exc:  # noqa: BLE001 - that is what is looked for
        return f"fault: {type(exc).__name__} is no {error}", f"{kind}: {exc}"[:300]
    finally:
        signal.alarm(0)
    return verdict, f"{kind}: {more}"


@pytest.fixture
def quiet_alarm() -> Iterator[None]:
    """The process's own alarm comes back."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
