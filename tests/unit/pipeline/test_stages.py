"""The small stages: load, partition, check, the choice of a verifier, and the clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit.config import Config
from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    PluginError,
    Problem,
    SourceError,
    UnsupportedTargetError,
    WeightMismatchError,
)
from refitkit.host import make_host
from refitkit.model import (
    Event,
    OutputMeasure,
    StageFailed,
    StageFinished,
    StageStarted,
    VerificationResult,
)
from refitkit.pipeline.checks import check_weights
from refitkit.pipeline.context import Context
from refitkit.pipeline.mapping import partition
from refitkit.pipeline.targets import open_target, open_weights
from refitkit.pipeline.verify import as_inputs, choose, problems_of
from refitkit.protocols import Tools
from refitkit.recipe import TensorMap
from tests.fakes import FakeEngine, FakePlugin, OpenEngine, make_module, plan_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.protocols import OpenedModule, WeightSource

CONFIG = Config()
TOOLS = Tools()


class Opener:
    """A plugin that opens everything and remembers what it was asked."""

    name = "opener"

    def __init__(self) -> None:
        self.asked: list[object] = []

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> WeightSource | None:
        self.asked.append(source)
        return TensorMap({}, "opened")

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> OpenedModule | None:
        self.asked.append(target)
        return make_module()


# -- load -------------------------------------------------------------------------------------


def test_a_string_that_names_a_file_is_handed_on_as_a_path(tmp_path: Path) -> None:
    file, opener = tmp_path / "w.bin", Opener()
    file.touch()
    host = make_host(plugins=[opener])
    for thing in (str(file), file, str(tmp_path)):
        open_weights(Context(host, CONFIG), thing)
        open_target(Context(host, CONFIG), thing)
    assert opener.asked == [file] * 4 + [tmp_path] * 2


def test_any_other_string_is_handed_on_as_it_is() -> None:
    """``hub://name`` may be a plugin's own way to say where weights are."""
    opener = Opener()
    host = make_host(plugins=[opener])
    open_weights(Context(host, CONFIG), "hub://name")
    open_target(Context(host, CONFIG), "hub://name")
    assert opener.asked == ["hub://name"] * 2


def test_a_source_is_taken_as_it_is() -> None:
    source, opener = TensorMap({}), Opener()
    assert open_weights(Context(make_host(plugins=[opener]), CONFIG), source) is source
    assert opener.asked == []


NOT_WEIGHTS = [7, None, b"bytes", [torch.ones(1)], object(), "no such file", Path("no such file")]


@pytest.mark.parametrize("thing", NOT_WEIGHTS, ids=lambda thing: type(thing).__name__)
def test_what_nobody_can_read_is_a_source_error(thing: object) -> None:
    with pytest.raises(SourceError) as info:
        open_weights(Context(make_host(), CONFIG), thing)
    if "no such" in str(thing):
        assert "no file 'no such file'" in str(info.value)
    else:
        assert type(thing).__name__ in str(info.value)
        assert "state_dict" in info.value.hint


@pytest.mark.parametrize("thing", NOT_WEIGHTS, ids=lambda thing: type(thing).__name__)
def test_what_nobody_can_open_is_an_unsupported_target(thing: object) -> None:
    with pytest.raises(UnsupportedTargetError):
        open_target(Context(make_host(), CONFIG), thing)


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", ""], ids=["long", "nul", "empty"])
def test_a_string_that_can_be_no_file_is_handled(text: str) -> None:
    with pytest.raises(SourceError):
        open_weights(Context(make_host(), CONFIG), text)
    with pytest.raises(UnsupportedTargetError):
        open_target(Context(make_host(), CONFIG), text)


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    file = tmp_path / "weights.odd"
    file.write_bytes(b"odd")
    with pytest.raises(SourceError, match=r"weights\.odd"):
        open_weights(Context(make_host(), CONFIG), file)
    with pytest.raises(UnsupportedTargetError, match=r"weights\.odd"):
        open_target(Context(make_host(), CONFIG), file)


def test_a_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        open_weights(Context(make_host(), CONFIG), tmp_path)


# -- partition --------------------------------------------------------------------------------


class Cutter:
    """A plugin that cuts every program into parts of these names."""

    name = "cutter"

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    @refitkit.hookimpl
    def refitkit_partition(self, backend: str) -> dict[str, str] | None:
        return dict.fromkeys(self.parts, backend) if backend == "mine" else None


def cut(parts: tuple[str, ...], engines: int | None, backend: str = "mine") -> Any:
    module = make_module(engines) if engines is not None else None
    host = make_host(plugins=[Cutter(*parts)])
    who, parts_found = partition(Context(host, CONFIG), None, module, backend, {}, TOOLS)  # type: ignore[arg-type]
    assert "(refitkit_partition)" in who
    return parts_found


def test_parts_that_match_the_engines() -> None:
    assert cut(("e0", "e1"), 2) == {"e0": "mine", "e1": "mine"}


def test_parts_without_a_module_are_taken_as_they_are() -> None:
    assert cut(("x",), None) == {"x": "mine"}


def test_parts_that_do_not_match() -> None:
    with pytest.raises(PlanMismatchError) as info:
        cut(("e1", "e2"), 2)
    assert {(p.subject, p.kind) for p in info.value.problems} == {
        ("e0", "no part for this engine"),
        ("e2", "no engine for this part"),
    }


def test_a_module_without_engines_matches_no_parts() -> None:
    with pytest.raises(PlanMismatchError):
        cut(("x",), 0)


def test_a_backend_that_nobody_cuts_for() -> None:
    with pytest.raises(PluginError, match="'other'"):
        cut(("x",), None, backend="other")


# -- check ------------------------------------------------------------------------------------


class Checker:
    """A plugin whose check does what it is told."""

    name = "checker"

    def __init__(self, result: Any) -> None:
        self.result = result

    @refitkit.hookimpl
    def refitkit_check(self) -> Any:
        return self.result() if callable(self.result) else self.result


def check(result: Any) -> None:
    module = make_module()
    source = TensorMap(dict(module.engines["e0"].live.items()))
    host = make_host(plugins=[Checker(result)])
    check_weights(Context(host, CONFIG), plan_for(module), module, source, partial=False)


@pytest.mark.parametrize("result", [None, [], (), iter([])])
def test_no_problem_is_no_error(result: Any) -> None:
    check(result)


def test_a_check_may_be_a_generator() -> None:
    def problems() -> Iterator[Problem]:
        yield Problem("a", "one")
        yield Problem("b", "two")

    with pytest.raises(WeightMismatchError) as info:
        check(problems)
    assert [p.subject for p in info.value.problems] == ["a", "b"]


def test_a_generator_that_fails_is_the_plugins_fault() -> None:
    def problems() -> Iterator[Problem]:
        yield Problem("a", "one")
        raise ValueError("half way")

    with pytest.raises(PluginError, match=r"'checker'.*refitkit_check.*half way"):
        check(problems)


@pytest.mark.parametrize("result", [3, Problem("a", "one"), ["text"], [None]], ids=repr)
def test_what_is_no_list_of_problems_is_the_plugins_fault(result: Any) -> None:
    with pytest.raises(PluginError, match=r"'checker'.*refitkit_check"):
        check(result)


# -- verify -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "with_inputs", "kind", "chosen"),
    [
        (None, True, OpenEngine, "outputs"),
        (None, True, FakeEngine, "outputs"),
        (None, False, OpenEngine, "weights"),
        (None, False, FakeEngine, None),
        ("none", True, OpenEngine, None),
        ("weights", True, FakeEngine, "weights"),  # it refuses later, and says why
        ("outputs", False, OpenEngine, "outputs"),
    ],
)
def test_the_choice_of_a_verifier(
    wanted: str | None, with_inputs: bool, kind: Any, chosen: str | None
) -> None:
    found = choose(make_host(), wanted, make_module(2, kind=kind), with_inputs=with_inputs)
    assert (found.name if found else None) == chosen


def test_no_verifier_of_this_name() -> None:
    with pytest.raises(ConfigError, match="'x'") as info:
        choose(make_host(), "x", make_module(), with_inputs=False)
    assert "outputs, weights, none" in info.value.hint


def test_a_verifier_that_is_switched_off_is_not_chosen() -> None:
    host = make_host(Config(no_plugins=frozenset({"verify"})))
    assert choose(host, None, make_module(), with_inputs=True) is None


X = torch.ones(2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ((X,), ((X,), {})),
        ([X, 3], ((X, 3), {})),
        ((), ((), {})),
        ({"x": X}, ((), {"x": X})),
        (((X,), {"y": X}), ((X,), {"y": X})),
        (((), {}), ((), {})),
        ((X, {"y": X}), ((X, {"y": X}), {})),  # the model's own dict
        (([X], {"y": X}), (([X], {"y": X}), {})),
        (((X,), {3: X}), (((X,), {3: X}), {})),
        (((X,), {"y": X}, X), (((X,), {"y": X}, X), {})),
        ([(X,), {"y": X}], (((X,), {"y": X}), {})),  # a list is never a pair
    ],
)
def test_inputs_as_users_give_them(given: Any, expected: Any) -> None:
    assert as_inputs(given) == expected


@pytest.mark.parametrize("given", [X, "text", b"bytes", 3, {1, 2}], ids=repr)
def test_inputs_that_cannot_be_meant(given: Any) -> None:
    with pytest.raises(ConfigError, match=type(given).__name__) as info:
        as_inputs(given)
    assert "inputs=(x,)" in info.value.hint


def test_problems_of_a_verdict() -> None:
    measures = (
        OutputMeasure(name="a", ok=True),
        OutputMeasure(name="b", ok=False, note="is off"),
        OutputMeasure(name="c", ok=False),
    )
    result = VerificationResult(verifier="v", ok=False, measures=measures)
    assert problems_of(result) == [Problem("b", "is off"), Problem("c", "differs")]


def test_a_bad_verdict_without_measures_is_a_problem_all_the_same() -> None:
    assert problems_of(VerificationResult(verifier="v", ok=False, note="why")) == [
        Problem("v", "why")
    ]
    assert problems_of(VerificationResult(verifier="v", ok=False)) == [Problem("v", "failed")]


# -- clock ------------------------------------------------------------------------------------


class Ear:
    """A plugin that hears events."""

    name = "ear"

    def __init__(self) -> None:
        self.heard: list[Event] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        self.heard.append(event)


def test_a_stage_is_told_and_timed() -> None:
    ear = Ear()
    clock = Context.of(None, [ear]).clock("refit")
    with clock.stage("one"):
        assert ear.heard == [StageStarted("refit", "one")]
    assert [s.stage for s in clock.stages] == ["one"]
    assert ear.heard[1:] == [StageFinished("refit", "one", clock.stages[0].seconds)]


def test_a_stage_that_raises_is_timed_and_fails() -> None:
    ear = Ear()
    clock = Context.of(None, [ear, FakePlugin()]).clock("refit")
    with pytest.raises(ValueError, match="no"), clock.stage("one"):
        raise ValueError("no")
    assert [s.stage for s in clock.stages] == ["one"]
    assert ear.heard[1:] == [StageFailed("refit", "one", clock.stages[0].seconds)]
