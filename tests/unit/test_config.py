"""Settings: defaults, what cannot be meant, and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from refitkit.config import NO_PLUGIN_VARIABLE, PLAN_CACHE_VARIABLE, TOLERANCES, Config
from refitkit.errors import ConfigError


def test_nothing_gives_the_defaults() -> None:
    config = Config.of(None)
    assert config == Config()
    assert config.check_finite
    assert config.rollback_limit is None
    assert config.strategies == ()
    assert config.tolerances == TOLERANCES


def test_a_config_is_taken_as_it_is() -> None:
    config = Config(check_finite=False)
    assert Config.of(config) is config


def test_plain_settings_become_a_config() -> None:
    config = Config.of({"no_plugins": ["a"], "strategies": ["recipe"], "rollback_limit": 5})
    assert config.no_plugins == {"a"}
    assert config.strategies == ("recipe",)
    assert config.rollback_limit == 5


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as info:
        Config.of({"chek_finite": True, "rollback_limit": -1, "strategies": 3})
    assert {p.subject for p in info.value.problems} == {
        "chek_finite",
        "rollback_limit",
        "strategies",
    }
    assert "chek_finite" in str(info.value)


@pytest.mark.parametrize(
    "settings",
    [
        5,
        "check_finite",
        {"no_plugins": "a,b"},  # a string is a sequence of letters: refused
        {"tolerances": {"float32": 1e-3}},
        {"tolerances": {"float32": (1e-3, 1e-3, 1e-3)}},
        {"check_finite": None},
        {1: 2},
    ],
)
def test_what_cannot_be_meant_is_a_config_error(settings: object) -> None:
    with pytest.raises(ConfigError) as info:
        Config.of(settings)  # type: ignore[arg-type]
    assert info.value.problems
    assert isinstance(info.value.__cause__, ValidationError)


@pytest.mark.parametrize(
    "pair", [(-1e-3, 0.0), (0.0, -1.0), (float("nan"), 0.0), (0.0, float("inf"))]
)
def test_a_tolerance_that_is_no_bound_is_a_config_error(pair: tuple[float, float]) -> None:
    with pytest.raises(ConfigError):
        Config.of({"tolerances": {"float32": pair}})


def test_a_tolerance_of_an_unknown_dtype_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="float23"):
        Config.of({"tolerances": {"float23": (0.0, 0.0)}})


def test_tolerances_of_some_dtypes_leave_the_others() -> None:
    config = Config.of({"tolerances": {"float16": (0.5, 0.5)}})
    assert config.tolerances == {**TOLERANCES, "float16": (0.5, 0.5)}


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Config().check_finite = False  # type: ignore[misc]


def test_the_defaults_are_not_shared() -> None:
    Config().tolerances["float32"] = (1.0, 1.0)
    assert Config().tolerances == TOLERANCES


@pytest.mark.parametrize(
    ("value", "names"),
    [("", set()), (" , ,", set()), ("a", {"a"}), (" a ,b,", {"a", "b"})],
)
def test_the_environment_is_added(
    monkeypatch: pytest.MonkeyPatch, value: str, names: set[str]
) -> None:
    monkeypatch.setenv(NO_PLUGIN_VARIABLE, value)
    assert Config(no_plugins=frozenset({"x"})).switched_off() == names | {"x"}


def test_without_environment_only_the_settings_count() -> None:
    assert Config(no_plugins=frozenset({"x"})).switched_off() == {"x"}


def test_plans_are_kept_nowhere_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLAN_CACHE_VARIABLE, raising=False)
    assert Config().cache_folder() is None
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, " ")
    assert Config().cache_folder() is None


def test_plans_are_kept_where_the_settings_say_or_else_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, "/from/environment")
    assert Config().cache_folder() == Path("/from/environment")
    assert Config.of({"plan_cache": "/from/settings"}).cache_folder() == Path("/from/settings")


@pytest.mark.parametrize(
    ("settings", "subject", "near"),
    [
        ({"rule": {}}, "rule", "rules"),
        ({"rules": {"subtre": "a"}}, "rules.subtre", "subtree"),
        (
            {"rules": {"pack": [{"into": "a", "parts": ["b"], "dims": 1}]}},
            "rules.pack.0.dims",
            "dim",
        ),
    ],
)
def test_a_setting_that_does_not_exist_is_told_with_what_may_be_meant(
    settings: dict[str, object], subject: str, near: str
) -> None:
    with pytest.raises(ConfigError) as info:
        Config.of(settings)
    problem = next(p for p in info.value.problems if p.subject == subject)
    assert problem.kind == "no such setting"
    assert problem.hint == f"did you mean {near!r}?"


def test_messages_have_no_words_of_the_library() -> None:
    with pytest.raises(ConfigError) as info:
        Config.of({"tolerances": {"float23": (0.0, 0.0)}, "xyzzy": 1})
    assert "Value error" not in str(info.value)
    assert "value error" not in str(info.value)
    assert "Extra inputs" not in str(info.value)
    assert "unknown dtypes: float23" in str(info.value)
