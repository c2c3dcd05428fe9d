"""The host: registration, order, names, and whose fault a failure is."""

from __future__ import annotations

import dataclasses
import sys
import types
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import click
import pytest

import refitkit
from refitkit import host as host_module
from refitkit.config import NO_PLUGIN_VARIABLE, Config
from refitkit.errors import ConfigError, PluginError
from refitkit.host import BUILTINS, GROUP, make_host
from refitkit.model import StageStarted
from refitkit.recipe import TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENT = StageStarted("refit", "load")


@dataclasses.dataclass
class Distribution:
    """What an entry point knows of its distribution."""

    name: str
    version: str


@dataclasses.dataclass(frozen=True)
class Installed:
    """An installed plugin: an entry point that counts how often it is loaded."""

    name: str
    plugin: object
    dist: Distribution | None = None
    value: str = "some.module:plugin"
    loads: list[str] = dataclasses.field(default_factory=list)

    def load(self) -> object:
        self.loads.append(self.name)
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the given entry points the installed ones."""

    def installed(*entries: Any) -> None:
        def entry_points(*, group: str) -> tuple[Any, ...]:
            assert group == GROUP
            return entries

        monkeypatch.setattr(host_module, "entry_points", entry_points)

    installed()
    return installed


@pytest.fixture(autouse=True)
def _nothing_installed(install: Any) -> None:
    """Plugins of the developer's environment stay out."""


class Weights:
    """A plugin that opens everything as a source with its own name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> TensorMap | None:
        return TensorMap({}, self.name)


class Listener:
    """A plugin that hears events, or fails."""

    def __init__(self, name: str, error: BaseException | None = None) -> None:
        self.name, self.error = name, error
        self.heard: list[object] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        self.heard.append(event)
        if self.error is not None:
            raise self.error


def opened_by(host: host_module.Host) -> str:
    arguments = {"source": {}, "config": Config(), "open_weights": None}
    source = host.call("refitkit_load_weights", **arguments)
    return str(source.description)


# -- order ------------------------------------------------------------------------------------


def test_the_built_ins_are_there_and_first() -> None:
    plugins = make_host(plugins=[Listener("mine")]).plugins()
    assert [p.name for p in plugins] == [*BUILTINS, "mine"]
    assert [p.origin for p in plugins] == ["built-in"] * len(BUILTINS) + ["explicit"]
    assert plugins[-1].hooks == ("refitkit_event",)


def test_built_in_weights_win_where_nobody_else_is() -> None:
    assert opened_by(make_host()) == "a state_dict of 0 entries"


def test_an_explicit_plugin_wins_over_a_built_in() -> None:
    assert opened_by(make_host(plugins=[Weights("mine")])) == "mine"


def test_a_later_explicit_plugin_wins_over_an_earlier_one() -> None:
    assert opened_by(make_host(plugins=[Weights("one"), Weights("two")])) == "two"


def test_explicit_wins_over_installed_and_installed_over_built_in(install: Any) -> None:
    install(Installed("zzz", Weights("installed")))
    assert opened_by(make_host()) == "installed"
    assert opened_by(make_host(plugins=[Weights("explicit")])) == "explicit"


def test_the_order_of_installed_plugins_is_that_of_their_names(install: Any) -> None:
    one, two = Installed("a", Weights("a")), Installed("b", Weights("b"))
    install(two, one)
    assert opened_by(make_host()) == "b"
    install(one, two)
    assert opened_by(make_host()) == "b"


def test_an_installed_plugin_is_named_with_its_distribution(install: Any) -> None:
    install(
        Installed("known", Listener("x"), Distribution("some-plugin", "1.2")),
        Installed("unknown", Listener("y")),
    )
    origins = {p.name: p.origin for p in make_host().plugins()}
    assert origins["known"] == "some-plugin 1.2"
    assert origins["unknown"] == "an unknown distribution"


def test_a_first_hook_asks_on_while_the_answer_is_none() -> None:
    class Shy(Weights):
        @refitkit.hookimpl
        def refitkit_load_weights(self, source: object) -> TensorMap | None:
            return None

    assert opened_by(make_host(plugins=[Weights("one"), Shy("shy")])) == "one"


@refitkit.hookimpl
def refitkit_event(event: object) -> None:
    """A hook of a module."""


def test_a_module_can_be_a_plugin() -> None:
    module = types.ModuleType("my_plugin")
    module.refitkit_event = refitkit_event  # type: ignore[attr-defined]
    assert make_host(plugins=[module]).plugins()[-1].name == "my_plugin"


def test_collect_tells_whose_result_is_whose() -> None:
    class Checks:
        def __init__(self, name: str, result: object) -> None:
            self.name, self.result = name, result

        @refitkit.hookimpl
        def refitkit_check(self) -> object:
            return self.result

    plugins = [Checks("a", [1]), Checks("b", None), Checks("c", [3])]
    host = make_host(Config(no_plugins=frozenset({"checks"})), plugins)
    names = (
        "plan",
        "module",
        "source",
        "partial",
        "unchanged",
        "deferred",
        "same_headers",
        "config",
    )
    arguments = dict.fromkeys(names)
    assert list(host.collect("refitkit_check", **arguments)) == [("a", [1]), ("c", [3])]


def test_call_one_calls_nobody_else() -> None:
    one, two = Listener("one"), Listener("two")
    make_host(plugins=[one, two]).call_one("one", "refitkit_event", event=EVENT)
    assert (one.heard, two.heard) == ([EVENT], [])


# -- broken plugins ---------------------------------------------------------------------------


def test_an_undecorated_hook_is_an_error_that_names_it() -> None:
    class Forgot:
        name = "forgetful"

        def refitkit_event(self, event: object) -> None:
            """Lacks its decorator."""

    with pytest.raises(PluginError, match=r"refitkit_event.*'forgetful'.*not marked") as info:
        make_host(plugins=[Forgot()])
    assert "hookimpl" in info.value.hint


def test_an_undecorated_hook_of_an_installed_plugin_names_the_entry_point(install: Any) -> None:
    module = types.ModuleType("deep.inside.plugin")
    module.refitkit_event = lambda event: None  # type: ignore[attr-defined]
    install(Installed("short-name", module))
    with pytest.raises(PluginError, match="short-name"):
        make_host()


def test_a_value_that_is_called_like_a_hook_is_let_be() -> None:
    class Versioned(Listener):
        refitkit_version = "1"

    assert make_host(plugins=[Versioned("v")]).plugins()[-1].hooks == ("refitkit_event",)


def test_an_unknown_hook_is_an_error() -> None:
    class Misspelt:
        name = "misspelt"

        @refitkit.hookimpl
        def refitkit_evnt(self, event: object) -> None: ...

    with pytest.raises(PluginError, match=r"'misspelt'.*refitkit_evnt.*not a hook"):
        make_host(plugins=[Misspelt()])


def test_an_unknown_argument_is_an_error() -> None:
    class Curious:
        name = "curious"

        @refitkit.hookimpl
        def refitkit_event(self, event: object, mood: object) -> None: ...

    with pytest.raises(PluginError, match=r"(?s)'curious'.*mood"):
        make_host(plugins=[Curious()])


def test_a_class_instead_of_an_instance_is_an_error() -> None:
    with pytest.raises(PluginError, match="Listener"):
        make_host(plugins=[Listener])


def test_two_explicit_plugins_of_one_name_are_an_error() -> None:
    with pytest.raises(PluginError, match=r"'twin'.*explicit.*explicit"):
        make_host(plugins=[Listener("twin"), Weights("twin")])


def test_an_installed_and_an_explicit_plugin_of_one_name_are_an_error(install: Any) -> None:
    install(Installed("twin", Listener("x"), Distribution("dist", "3")))
    with pytest.raises(PluginError, match=r"'twin'.*dist 3.*explicit"):
        make_host(plugins=[Weights("twin")])


def test_a_plugin_of_a_built_in_name_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"'weights'.*built-in.*explicit"):
        make_host(plugins=[Weights("weights")])


def test_a_built_in_can_be_replaced_by_one_of_its_name(install: Any) -> None:
    """The built-in is switched off, and with it everything else of that name."""
    install(Installed("better", Weights("better")))
    host = make_host(Config(no_plugins=frozenset({"weights"})))
    assert opened_by(host) == "better"
    assert "weights" not in {p.name for p in host.plugins()}


def added_to(host: host_module.Host) -> list[tuple[str, str]]:
    """Names and origins of plugins beside the built-in ones."""
    return [(one.name, one.origin) for one in host.plugins() if one.origin != "built-in"]


def test_an_explicit_plugin_replaces_itself_as_installed(install: Any) -> None:
    plugin = Listener("explicit-name")
    install(Installed("installed-name", plugin, Distribution("dist", "3")))
    host = make_host(plugins=[plugin])
    assert added_to(host) == [("explicit-name", "explicit")]
    host.emit(EVENT)
    assert plugin.heard == [EVENT]


def test_an_explicit_plugin_replaces_an_installed_one_of_its_class(install: Any) -> None:
    installed, explicit = Listener("same-name"), Listener("same-name")
    install(Installed("same-name", installed), Installed("other", Weights("other")))
    host = make_host(plugins=[explicit])
    assert added_to(host) == [("other", "an unknown distribution"), ("same-name", "explicit")]
    host.emit(EVENT)
    assert (installed.heard, explicit.heard) == ([], [EVENT])


def test_plugins_of_one_class_with_names_of_their_own_stay_both(install: Any) -> None:
    installed, explicit = Listener("one"), Listener("two")
    install(Installed("one", installed))
    host = make_host(plugins=[explicit])
    assert added_to(host) == [("one", "an unknown distribution"), ("two", "explicit")]
    host.emit(EVENT)
    assert (installed.heard, explicit.heard) == ([EVENT], [EVENT])


def test_an_explicit_module_keeps_the_name_that_it_is_installed_under(install: Any) -> None:
    module = types.ModuleType("my_plugin")
    module.refitkit_event = refitkit_event  # type: ignore[attr-defined]
    install(Installed("published", module))
    pipeline = refitkit.Pipeline({"plugin_settings": {"published": {}}}, plugins=[module])
    assert added_to(pipeline.host) == [("published", "explicit")]


def test_an_explicit_plugin_that_is_switched_off_replaces_nothing(install: Any) -> None:
    plugin = Listener("explicit-name")
    install(Installed("installed-name", plugin))
    host = make_host(Config(no_plugins=frozenset({"explicit-name"})), [plugin])
    assert added_to(host) == [("installed-name", "an unknown distribution")]
    host = make_host(Config(no_plugins=frozenset({"installed-name"})), [plugin])
    assert added_to(host) == [("explicit-name", "explicit")]


def test_two_explicit_plugins_that_replace_one_need_names(install: Any) -> None:
    class Nameless:
        @refitkit.hookimpl
        def refitkit_event(self, event: object) -> None: ...

    install(Installed("published", Nameless()))
    with pytest.raises(PluginError, match=r"'published'.*explicit.*explicit"):
        make_host(plugins=[Nameless(), Nameless()])


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "refitkit_no_such_module:plugin", GROUP)
    monkeypatch.setattr(host_module, "entry_points", lambda group: (entry,))
    with pytest.raises(PluginError, match=r"'broken'.*ModuleNotFoundError") as info:
        make_host()
    assert "--no-plugin broken" in info.value.hint
    assert isinstance(info.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("error", [SyntaxError("odd"), AttributeError("none"), RuntimeError("no")])
def test_a_plugin_that_fails_while_it_is_imported_is_named(install: Any, error: Exception) -> None:
    install(Installed("broken", error, Distribution("bad-dist", "0.1")))
    with pytest.raises(PluginError, match=rf"'broken' of bad-dist 0.1.*{type(error).__name__}"):
        make_host()


# -- switching off ----------------------------------------------------------------------------


def test_a_broken_plugin_that_is_switched_off_is_not_even_imported(install: Any) -> None:
    broken = Installed("broken", RuntimeError("no"))
    install(broken)
    make_host(Config(no_plugins=frozenset({"broken"})))
    assert broken.loads == []


@pytest.mark.parametrize("value", ["broken", " other , broken ", "broken,", ",,broken"])
def test_the_environment_switches_off_too(
    install: Any, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    broken = Installed("broken", RuntimeError("no"))
    install(broken)
    monkeypatch.setenv(NO_PLUGIN_VARIABLE, value)
    make_host()
    assert broken.loads == []


def test_the_environment_adds_to_the_settings(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Installed("a", RuntimeError("no")), Installed("b", RuntimeError("no")))
    monkeypatch.setenv(NO_PLUGIN_VARIABLE, "a")
    make_host(Config(no_plugins=frozenset({"b"})))


def test_an_explicit_plugin_can_be_switched_off() -> None:
    host = make_host(Config(no_plugins=frozenset({"mine"})), [Weights("mine")])
    assert opened_by(host) == "a state_dict of 0 entries"


@pytest.mark.parametrize("name", BUILTINS)
def test_every_built_in_can_be_switched_off(name: str) -> None:
    names = {p.name for p in make_host(Config(no_plugins=frozenset({name}))).plugins()}
    assert names == set(BUILTINS) - {name}


def test_a_built_in_that_is_switched_off_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "refitkit.builtin.aotinductor", None)  # importing it raises
    make_host(Config(no_plugins=frozenset({"aotinductor"})))
    with pytest.raises(ImportError):
        make_host()


# -- failing hooks ----------------------------------------------------------------------------


def told(host: host_module.Host) -> list[Any]:
    """Call the hook of all listeners, as other hooks are called."""
    found: list[Any] = host.call("refitkit_event", event=EVENT)
    return found


def test_a_failing_hook_names_plugin_hook_and_error() -> None:
    cause = ValueError("the reason")
    host = make_host(plugins=[Listener("fine"), Listener("broken", cause), Listener("also-fine")])
    with pytest.raises(
        PluginError, match=r"'broken'.*refitkit_event.*ValueError: the reason"
    ) as info:
        told(host)
    assert info.value.__cause__ is cause
    assert "--no-plugin broken" in info.value.hint


def test_the_right_one_of_two_plugins_of_one_class_is_named() -> None:
    for order in (["good", "bad"], ["bad", "good"]):
        plugins = [Listener(n, ValueError("x") if n == "bad" else None) for n in order]
        with pytest.raises(PluginError, match="'bad'"):
            told(make_host(plugins=plugins))


def test_the_plugin_is_named_when_what_it_calls_fails() -> None:
    def helper() -> None:
        raise KeyError("deep")

    class Deep:
        name = "deep"

        @refitkit.hookimpl
        def refitkit_event(self) -> None:
            helper()

    with pytest.raises(PluginError, match=r"'deep'.*refitkit_event"):
        told(make_host(plugins=[Deep(), Listener("other")]))


def test_a_failing_hook_of_one_plugin_is_named_too() -> None:
    host = make_host(plugins=[Listener("broken", ValueError("x"))])
    with pytest.raises(PluginError, match=r"'broken'.*refitkit_event"):
        host.call_one("broken", "refitkit_event", event=EVENT)


def test_a_failing_wrapper_is_named() -> None:
    class Wrapper:
        name = "wrapper"

        @refitkit.hookimpl(wrapper=True)
        def refitkit_event(self) -> Iterator[None]:
            yield
            raise ValueError("after")

    with pytest.raises(PluginError, match=r"'wrapper'.*refitkit_event"):
        told(make_host(plugins=[Wrapper()]))


def test_errors_of_refitkit_pass_through_as_they_are() -> None:
    error = ConfigError("as it is")
    with pytest.raises(ConfigError) as info:
        told(make_host(plugins=[Listener("x", error)]))
    assert info.value is error


@pytest.mark.parametrize("error", [ValueError("the reason"), ConfigError("the reason")])
def test_a_listener_that_fails_is_logged_once_and_the_others_hear(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = [Listener("first"), Listener("broken", error), Listener("last")]
    host = make_host(plugins=listeners)
    for _ in range(3):
        host.emit(EVENT)
    assert [len(one.heard) for one in listeners] == [3, 3, 3]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("refitkit", "WARNING")
    assert "the reason" in record.getMessage()
    assert "'broken'" in record.getMessage()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_passes_through_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as info:
        make_host(plugins=[Listener("x", error)]).emit(EVENT)
    assert info.value is error


# -- offers by name ---------------------------------------------------------------------------


@dataclasses.dataclass
class Offer:
    """Something with a name: as a strategy, verifier or backend."""

    name: Any

    def prepare(self, _request: Any) -> Any:
        raise NotImplementedError


class Offering:
    """A plugin that offers verifiers."""

    def __init__(self, name: str, offers: Any) -> None:
        self.name, self.offers = name, offers

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> Any:
        return self.offers


def test_offers_are_found_by_name() -> None:
    mine = Offer("mine")
    offered = make_host(plugins=[Offering("p", [mine]), Offering("q", ())]).named(
        "refitkit_verifiers"
    )
    assert offered.keys() == {"outputs", "weights", "engine-bytes", "mine"}
    assert offered["mine"] is mine


def test_offers_may_come_from_a_generator() -> None:
    class Lazy:
        name = "lazy"

        @refitkit.hookimpl
        def refitkit_verifiers(self) -> Iterator[Offer]:
            yield Offer("mine")

    assert "mine" in make_host(plugins=[Lazy()]).named("refitkit_verifiers")


def test_a_generator_that_fails_names_plugin_and_hook() -> None:
    class Lazy:
        name = "lazy"

        @refitkit.hookimpl
        def refitkit_verifiers(self) -> Iterator[Offer]:
            yield Offer("mine")
            raise TypeError("half way")

    with pytest.raises(PluginError, match=r"'lazy'.*refitkit_verifiers.*TypeError: half way"):
        make_host(plugins=[Lazy()]).named("refitkit_verifiers")


def test_two_offers_of_one_name_are_an_error_that_names_both_plugins() -> None:
    plugins = [Offering("p", [Offer("same")]), Offering("q", [Offer("same")])]
    with pytest.raises(PluginError, match=r"'p' and 'q' both offer 'same' in refitkit_verifiers"):
        make_host(plugins=plugins).named("refitkit_verifiers")


def test_an_offer_of_a_built_in_name_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"'verify' and 'p' both offer 'outputs'") as info:
        make_host(plugins=[Offering("p", [Offer("outputs")])]).named("refitkit_verifiers")
    assert "--no-plugin p" in info.value.hint


@pytest.mark.parametrize("offer", [object(), Offer(None), Offer(7)])
def test_an_offer_without_a_name_is_an_error(offer: object) -> None:
    with pytest.raises(PluginError, match=r"'p'.*without a name"):
        make_host(plugins=[Offering("p", [offer])]).named("refitkit_verifiers")


def test_offers_that_are_no_list_are_an_error() -> None:
    with pytest.raises(
        PluginError, match=r"'p' returned Offer from refitkit_verifiers, not a list"
    ):
        make_host(plugins=[Offering("p", Offer("x"))]).named("refitkit_verifiers")


# -- commands ---------------------------------------------------------------------------------


def test_a_plugin_may_add_commands() -> None:
    class Commands:
        name = "commands"

        @refitkit.hookimpl
        def refitkit_register_commands(self, cli: click.Group) -> None:
            cli.add_command(click.Command("mine"))

    group = click.Group()
    make_host(plugins=[Commands()]).call_one("commands", "refitkit_register_commands", cli=group)
    assert list(group.commands) == ["mine"]
