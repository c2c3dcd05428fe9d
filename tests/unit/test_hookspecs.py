"""Every hook is documented, as its kind and its arguments are, and used by some test."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from refitkit import hookspecs

HOOKS = {
    name: value
    for name, value in vars(hookspecs).items()
    if name.startswith("refitkit_") and inspect.isfunction(value)
}
TESTS = Path(__file__).parent


def options(hook: Any) -> dict[str, Any]:
    """What ``@hookspec`` was given."""
    found: dict[str, Any] = hook.refitkit_spec
    return found


def sections(hook: Any) -> dict[str, str]:
    """Google-style sections of a docstring by title; the text before them under ''."""
    parts = re.split(r"(?m)^(Args|Returns|Raises|Yields):$", inspect.getdoc(hook) or "")
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_these_are_the_hooks() -> None:
    """A new hook needs a test of its own; then add it here."""
    assert set(HOOKS) == {
        "refitkit_check",
        "refitkit_event",
        "refitkit_layer_types",
        "refitkit_load_module",
        "refitkit_load_weights",
        "refitkit_mapping_strategies",
        "refitkit_partition",
        "refitkit_register_backends",
        "refitkit_register_commands",
        "refitkit_verifiers",
        "refitkit_weight_transforms",
        "refitkit_weight_transports",
        "refitkit_weights_changed",
    }


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_states_its_kind(name: str) -> None:
    stated = re.findall(r"\bKind: (first|all)\.", sections(HOOKS[name])[""])
    assert stated == ["first" if options(HOOKS[name])["firstresult"] else "all"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_when_it_is_called(name: str) -> None:
    assert "Called" in sections(HOOKS[name])[""]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_documents_its_arguments_in_order(name: str) -> None:
    documented = re.findall(r"(?m)^    (\w+): ", sections(HOOKS[name]).get("Args", ""))
    assert documented == list(inspect.signature(HOOKS[name]).parameters)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_returns_something_says_what(name: str) -> None:
    returns = inspect.signature(HOOKS[name]).return_annotation
    assert ("Returns" in sections(HOOKS[name])) == (returns != "None")
    if options(HOOKS[name])["firstresult"]:
        assert "None" in returns
        assert "None when" in sections(HOOKS[name])["Returns"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_annotated_and_without_defaults(name: str) -> None:
    for parameter in inspect.signature(HOOKS[name]).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.default is inspect.Parameter.empty


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_implemented_in_some_test(name: str) -> None:
    """Implemented as a plugin would: with the decorator, right above."""
    written = "\n".join(
        path.read_text() for path in [*TESTS.parent.rglob("test_*.py"), TESTS.parent / "fakes.py"]
    )
    assert re.search(rf"@(refitkit\.)?hookimpl.*\n\s*def {name}\(", written)
