"""The plugin host: who is registered, in which order, and whose fault a failure is."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from refitkit import hookspecs
from refitkit.config import Config
from refitkit.errors import PluginError, raised_as

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from refitkit.model import Event

GROUP = "refitkit"
"""The entry-point group in which plugins are found."""

BUILTINS = ("weights", "checks", "rules", "strategies", "verify", "aotinductor", "torch_tensorrt")
"""Built-in plugins, by their module in ``refitkit.builtin``."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One registered plugin.

    Attributes:
        name: The name to switch it off by.
        origin: ``built-in``, ``explicit``, or the distribution that brings it, with its version.
        hooks: Names of the hooks that it implements.
    """

    name: str
    origin: str
    hooks: tuple[str, ...]


class Host:
    """All plugins of one pipeline. Made by :func:`make_host`."""

    def __init__(self, manager: pluggy.PluginManager, origins: dict[str, str]) -> None:
        """Use ``make_host``."""
        self._manager = manager
        self._origins = origins

    def plugins(self) -> tuple[PluginInfo, ...]:
        """All registered plugins, in the order of registration."""
        return self._plugins

    @functools.cached_property
    def _plugins(self) -> tuple[PluginInfo, ...]:
        return tuple(
            PluginInfo(name, self._origins[name], self._hooks_of(plugin))
            for name, plugin in self._manager.list_name_plugin()
            if plugin is not None
        )

    def plugin(self, name: str) -> object:
        """The registered object or module of this name; None where there is none."""
        return self._manager.get_plugin(name)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook.

        Returns:
            The first result that is not None, or a list of all, as the hook's kind is.

        Raises:
            RefitError: As the implementation raised it.
            PluginError: An implementation raised anything else; names its plugin.
        """
        return getattr(self._manager.hook, hook)(**arguments)

    def emit(self, event: Event) -> None:
        """Tell all listeners of progress."""
        self.call("refitkit_event", event=event)

    def collect(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a hook of kind *all* one plugin at a time: ``(plugin, result)``.

        Built-ins come first; results that are None are left out.
        """
        for info in self.plugins():
            if hook in info.hooks:
                results = self.call_one(info.name, hook, **arguments)
                yield from ((info.name, item) for item in results if item is not None)

    def items(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Everything that plugins list in a hook of kind *all*: ``(plugin, item)``.

        Raises:
            RefitError: As an implementation raised it, also while its items are iterated.
            PluginError: An implementation raised anything else, or gave no iterable.
        """
        for plugin, result in self.collect(hook, **arguments):
            if not isinstance(result, Iterable):
                kind = type(result).__name__
                raise PluginError(f"The plugin {plugin!r} returned {kind} from {hook}, not a list.")
            with _blame(plugin, hook):
                listed = list(result)
            yield from ((plugin, item) for item in listed)

    def call_one(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """Call a hook of one plugin only; otherwise as ``call``."""
        named = self._manager.list_name_plugin()
        others = [other for name, other in named if name != plugin and other is not None]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        return caller(**arguments)

    def named(self, hook: str) -> dict[str, Any]:
        """Objects that plugins offer through a hook, by their name.

        Raises:
            PluginError: Two plugins offer one of the same name; names both. Or an offer has no
                name.
        """
        owners: dict[str, str] = {}
        offers: dict[str, Any] = {}
        for plugin, item in self.items(hook):
            self.claim(owners, item, plugin, hook)
            offers[item.name] = item
        return offers

    @staticmethod
    def claim(owners: dict[str, str], item: Any, plugin: str, hook: str) -> None:
        """Note that a plugin offers something under a name.

        Raises:
            PluginError: The name is taken, or there is none.
        """
        name = getattr(item, "name", None)
        if not isinstance(name, str):
            raise PluginError(f"The plugin {plugin!r} offers {item!r} in {hook}, without a name.")
        if name in owners:
            raise PluginError(
                f"The plugins {owners[name]!r} and {plugin!r} both offer {name!r} in {hook}.",
                hint=f"Switch one of them off: no_plugins={{{plugin!r}}} or --no-plugin {plugin}.",
            )
        owners[name] = plugin

    def _hooks_of(self, plugin: object) -> tuple[str, ...]:
        callers = self._manager.get_hookcallers(plugin) or ()
        return tuple(sorted(caller.name for caller in callers))


def make_host(config: Config | None = None, plugins: Iterable[object] = ()) -> Host:
    """A host with the built-ins, then what is installed, then explicit plugins.

    For hooks of kind *first* the latest registered is asked first, so explicit plugins win over
    installed ones, and those over built-ins.

    Args:
        config: Says which plugins are switched off.
        plugins: Objects or modules with hook implementations.

    Raises:
        PluginError: A plugin cannot be imported or registered; names it.
    """
    off = (config or Config()).switched_off()
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    origins: dict[str, str] = {}
    for name, plugin, origin in _candidates(off, plugins):
        if name in off:
            continue
        if name in origins:
            raise PluginError(
                f"Two plugins are called {name!r}: one is {origins[name]}, the other {origin}.",
                hint="Rename one, or uninstall it.",
            )
        _register(manager, name, plugin)
        origins[name] = origin
    return Host(manager, origins)


def _candidates(
    off: frozenset[str], plugins: Iterable[object]
) -> Iterator[tuple[str, object, str]]:
    """``(name, plugin, origin)`` in the order of registration; what is off is not imported."""
    for name in BUILTINS:
        if name not in off:
            yield name, importlib.import_module(f"refitkit.builtin.{name}"), "built-in"
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name not in off:
            yield entry.name, _loaded(entry), _origin(entry)
    for plugin in plugins:
        yield _name_of(plugin), plugin, "explicit"


def _loaded(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as exc:
        raise PluginError(
            f"The plugin {entry.name!r} of {_origin(entry)} cannot be imported: "
            f"{type(exc).__name__}: {exc}",
            hint=f"Mend or uninstall it; to go on without it: --no-plugin {entry.name}.",
        ) from exc


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _register(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    hint = f"See docs/reference/hooks.md; to go on without it: --no-plugin {name}."
    if inspect.isclass(plugin):
        raise PluginError(f"The plugin {name!r} is a class: register an instance of it.")
    for attribute in dir(plugin):
        if attribute.startswith("refitkit_") and _lacks_mark(manager, plugin, attribute):
            raise PluginError(
                f"{attribute} of the plugin {name!r} is not marked as a hook.",
                hint="Decorate it with @refitkit.hookimpl, or give it another name.",
            )
    try:
        manager.register(plugin, name)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginError(f"The plugin {name!r} cannot be registered: {exc}", hint=hint) from exc
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            message = f"The plugin {name!r} implements {caller.name}, which is no hook."
            raise PluginError(message, hint=hint)
        _blame_failures(caller, name, plugin)


def _blame_failures(caller: pluggy.HookCaller, name: str, plugin: object) -> None:
    """Have failures of one plugin's hook name that plugin: pluggy does not tell whose they are."""
    for implementation in caller.get_hookimpls():
        if implementation.plugin is plugin:
            around = implementation.wrapper or implementation.hookwrapper
            blamed = _blaming(name, caller.name, implementation.function, around=around)
            setattr(implementation, "function", blamed)  # noqa: B010 - typed as final, but a slot


def _blaming(
    plugin: str, hook: str, function: Callable[..., Any], *, around: bool
) -> Callable[..., Any]:
    """The same function, whose failures are ``PluginError`` and name the plugin."""

    @functools.wraps(function)
    def blamed(*arguments: Any) -> Any:
        with _blame(plugin, hook):
            return function(*arguments)

    @functools.wraps(function)
    def blamed_wrapper(*arguments: Any) -> Any:
        with _blame(plugin, hook):
            return (yield from function(*arguments))

    return blamed_wrapper if around else blamed


def _blame(plugin: str, hook: str) -> AbstractContextManager[None]:
    hint = f"Report it to its authors; to go on without it: --no-plugin {plugin}."
    return raised_as(PluginError, f"The plugin {plugin!r} failed in {hook}", hint=hint)


def _lacks_mark(manager: pluggy.PluginManager, plugin: object, attribute: str) -> bool:
    is_function = inspect.isroutine(getattr(plugin, attribute, None))
    return is_function and manager.parse_hookimpl_opts(plugin, attribute) is None


def _name_of(plugin: object) -> str:
    given = getattr(plugin, "name", None) or getattr(plugin, "__name__", None)
    return given if isinstance(given, str) else type(plugin).__name__
