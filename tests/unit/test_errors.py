"""The error tree: documented whole, and messages that say everything."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from refitkit import errors
from refitkit.errors import SHOWN_PROBLEMS, Problem, RefitError, VerificationError

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value)
    and issubclass(value, Exception)
    and value.__module__ == "refitkit.errors"
}


def documented_tree() -> dict[str, str]:
    """Parent of every error, by name, as drawn in the module's docstring."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^( {4}[│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            depth = len(found[1])
            parents[found[2]] = above.get(depth - 4, "Exception")
            above[depth] = found[2]
    return parents


def test_the_docstring_shows_every_error_under_its_parent() -> None:
    actual = {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}
    assert documented_tree() == actual


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_what_it_is(name: str) -> None:
    assert issubclass(CLASSES[name], RefitError)
    assert CLASSES[name].__doc__


def test_a_message_has_all_its_parts() -> None:
    problem = Problem("w", "shape", "(2,)", "(3,)", "transpose it")
    error = RefitError("It failed.", problems=[problem], hint="Do this.")
    assert str(error) == (
        "It failed.\n  - w: shape, found (2,), wanted (3,) (transpose it)\nDo this."
    )
    assert error.problems == (problem,)
    assert problem.as_dict() == {
        "subject": "w",
        "kind": "shape",
        "found": "(2,)",
        "wanted": "(3,)",
        "hint": "transpose it",
    }


def test_a_bare_error_is_its_message() -> None:
    assert str(RefitError("It failed.")) == "It failed."
    assert str(Problem("w", "missing")) == "w: missing"


@pytest.mark.parametrize("count", [SHOWN_PROBLEMS, SHOWN_PROBLEMS + 1, SHOWN_PROBLEMS + 100])
def test_long_lists_are_cut_in_the_message_only(count: int) -> None:
    error = RefitError("It failed.", problems=(Problem(f"w{n}", "missing") for n in range(count)))
    text = str(error)
    assert len(error.problems) == count
    assert text.count(": missing") == SHOWN_PROBLEMS
    hidden = count - SHOWN_PROBLEMS
    assert (f"and {hidden} more" in text) == (hidden > 0)


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("how", ["pickle", "copy"])
def test_errors_survive_a_trip_between_processes(name: str, how: str) -> None:
    error = CLASSES[name]("It failed.", problems=[Problem("w", "missing")], hint="Do this.")
    if isinstance(error, VerificationError):
        error.report = {"any": "thing"}
    again = pickle.loads(pickle.dumps(error)) if how == "pickle" else copy.copy(error)  # noqa: S301
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_verification_error_carries_its_report() -> None:
    assert VerificationError("x", report=3).report == 3
    assert VerificationError("x").report is None
