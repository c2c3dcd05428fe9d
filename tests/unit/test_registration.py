"""Taking plugins in: deprecated arguments, and going on without those that are broken."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit import hookspecs
from refitkit import host as host_module
from refitkit.config import Config
from refitkit.errors import PluginError
from refitkit.host import BUILTINS, GROUP, BrokenPlugin, make_host
from refitkit.model import StageStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

SAID = "take 'event'; 'happening' goes in 0.3"


@pytest.fixture
def _happening(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release in which ``refitkit_event`` still has an argument that is on its way out."""

    @hookspecs.hookspec(warn_on_impl_args={"happening": DeprecationWarning(SAID)})
    def refitkit_event(event: object, happening: object) -> None:
        """As it is, with one argument more."""

    monkeypatch.setattr(hookspecs, "refitkit_event", refitkit_event)


class Old:
    name = "old"

    @refitkit.hookimpl
    def refitkit_event(self, event: object, happening: object) -> None:
        """Takes both."""


class OldWrapper:
    name = "old-wrapper"

    @refitkit.hookimpl(wrapper=True)
    def refitkit_event(self, happening: object) -> Iterator[None]:
        return (yield)


class New:
    name = "new"

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        """Takes what stays."""


@pytest.mark.usefixtures("_happening")
@pytest.mark.parametrize("plugin", [Old(), OldWrapper()], ids=lambda one: one.name)
def test_a_deprecated_argument_is_warned_of_with_plugin_hook_and_argument(plugin: Any) -> None:
    with pytest.warns(DeprecationWarning, match="takes the argument") as caught:
        make_host(plugins=[plugin, New()])
    (warning,) = caught
    said = f"The plugin '{plugin.name}' takes the argument 'happening' of refitkit_event: {SAID}"
    assert str(warning.message) == said
    assert warning.filename == __file__
    assert warning.lineno == type(plugin).refitkit_event.__code__.co_firstlineno


@pytest.mark.usefixtures("_happening")
def test_the_argument_still_comes() -> None:
    heard: list[object] = []

    class Hears:
        name = "hears"

        @refitkit.hookimpl
        def refitkit_event(self, happening: object) -> None:
            heard.append(happening)

    with pytest.warns(DeprecationWarning, match=SAID):
        host = make_host(plugins=[Hears()])
    host.call("refitkit_event", event=1, happening=2)
    assert heard == [2]


@pytest.mark.usefixtures("_happening")
def test_those_that_take_what_stays_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_host(plugins=[New()])


def test_no_hook_has_deprecated_arguments_that_are_not_its_own() -> None:
    for name, spec in vars(hookspecs).items():
        if name.startswith("refitkit_"):
            marked = spec.refitkit_spec["warn_on_impl_args"] or {}
            arguments = spec.__code__.co_varnames[: spec.__code__.co_argcount]
            assert marked.keys() <= set(arguments)
            assert all(isinstance(one, DeprecationWarning) for one in marked.values())


# -- going on without a broken one --------------------------------------------------------------


class Misspelt:
    name = "misspelt"

    @refitkit.hookimpl
    def refitkit_evnt(self, event: object) -> None: ...

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        raise AssertionError("it was to be left out")


def left_out(*plugins: object, **config: Any) -> tuple[list[BrokenPlugin], host_module.Host]:
    broken: list[BrokenPlugin] = []
    host = make_host(Config(**config), plugins, on_broken=broken.append)
    return broken, host


def test_a_plugin_that_cannot_be_registered_is_left_out_as_a_whole() -> None:
    (broken,), host = left_out(Misspelt(), New())
    assert (broken.candidate.name, broken.candidate.origin) == ("misspelt", "explicit")
    assert "refitkit_evnt" in str(broken.error)
    assert [info.name for info in host.plugins()] == [*BUILTINS, "new"]
    host.emit(StageStarted("refit", "load"))


def test_one_that_cannot_be_imported_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("gone", "no_module_of_this_name.inside:plugin", GROUP)
    monkeypatch.setattr(host_module, "entry_points", lambda group: (entry,))
    (broken,), host = left_out(New())
    assert broken.candidate.module == "no_module_of_this_name.inside"
    assert "ModuleNotFoundError" in str(broken.error)
    assert host.plugins()[-1].name == "new"


def test_the_second_of_two_of_one_name_is_left_out() -> None:
    (broken,), host = left_out(New(), New())
    assert "Two plugins are called 'new'" in str(broken.error)
    assert [info.name for info in host.plugins()].count("new") == 1


def test_without_anybody_to_tell_the_first_broken_one_is_an_error() -> None:
    with pytest.raises(PluginError, match="misspelt"):
        make_host(plugins=[New(), Misspelt()])


# -- what the host tells of hooks and plugins ---------------------------------------------------


def test_kinds_are_those_of_the_specifications() -> None:
    host = make_host()
    for name, spec in vars(hookspecs).items():
        if name.startswith("refitkit_"):
            first = spec.refitkit_spec["firstresult"]
            assert host.kind_of(name) == ("first" if first else "all")


def test_a_plugin_is_given_by_name() -> None:
    mine = New()
    host = make_host(plugins=[mine])
    assert host.plugin("new") is mine
    assert host.plugin("nobody") is None
