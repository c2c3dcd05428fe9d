"""The plugin host: who is registered, in which order, and whose fault a failure is."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from refitkit import hookspecs
from refitkit.config import Config
from refitkit.errors import PluginError, raise_if_resource, raised_as, resources

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from refitkit.model import Event


GROUP = "refitkit"
"""The entry-point group in which plugins are found."""

BUILTINS = (
    "weights",
    "merges",
    "checks",
    "rules",
    "strategies",
    "verify",
    "aotinductor",
    "torch_tensorrt",
)
"""Built-in plugins, by their module in ``refitkit.builtin``."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that could be registered.

    Attributes:
        name: The name to switch it off by.
        origin: ``built-in``, ``explicit``, or the distribution that brings it, with its version.
        module: The module that it is, or is in.
        load: Gives it; imports it, where that has not happened yet.
        distribution: Name of the distribution that brings it; empty where none does.
        version: Its version.
    """

    name: str
    origin: str
    module: str
    load: Callable[[], object]
    distribution: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that was left out.

    Attributes:
        candidate: Which.
        error: Why.
    """

    candidate: Candidate
    error: PluginError


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One registered plugin.

    Attributes:
        name: The name to switch it off by.
        origin: ``built-in``, ``explicit``, or the distribution that brings it, with its version.
        hooks: Names of the hooks that it implements.
        module: The module that it is, or is in.
        distribution: Name of the distribution that brings it; empty where none does.
        version: Its version.
    """

    name: str
    origin: str
    hooks: tuple[str, ...]
    module: str = ""
    distribution: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that a plugin offers through a hook.

    Attributes:
        plugin: Name of the plugin.
        item: What it offers; has a ``name``.
    """

    plugin: str
    item: Any


class Host:
    """All plugins of one pipeline. Made by :func:`make_host`."""

    def __init__(self, manager: Manager, taken: Mapping[str, Candidate]) -> None:
        """Use ``make_host``."""
        self._manager = manager
        self._taken = taken
        self._callers: dict[tuple[str, str], pluggy.HookCaller] = {}

    def plugins(self) -> tuple[PluginInfo, ...]:
        """All registered plugins, in the order of registration."""
        return self._plugins

    @functools.cached_property
    def _plugins(self) -> tuple[PluginInfo, ...]:
        return tuple(
            self._info_of(name, plugin)
            for name, plugin in self._manager.list_name_plugin()
            if plugin is not None
        )

    def _info_of(self, name: str, plugin: object) -> PluginInfo:
        taken = self._taken[name]
        hooks = self._hooks_of(plugin)
        return PluginInfo(
            name, taken.origin, hooks, taken.module, taken.distribution, taken.version
        )

    def has(self, hook: str) -> bool:
        """Whether any plugin implements a hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def kind_of(self, hook: str) -> str:
        """``first`` or ``all``."""
        spec = getattr(self._manager.hook, hook).spec
        return "first" if spec.opts["firstresult"] else "all"

    def plugin(self, name: str) -> object:
        """The registered object or module of this name; None where there is none."""
        return self._manager.get_plugin(name)

    def candidate(self, name: str) -> Candidate:
        """What the registered plugin of this name was before it was registered.

        Raises:
            KeyError: There is none.
        """
        return self._taken[name]

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
            with blame(plugin, hook):
                listed = list(result)
            yield from ((plugin, item) for item in listed)

    def call_one(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """Call a hook of one plugin only; otherwise as ``call``."""
        caller = self._callers.get((plugin, hook))
        if caller is None:
            named = self._manager.list_name_plugin()
            others = [other for name, other in named if name != plugin and other is not None]
            caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
            self._callers[plugin, hook] = caller
        return caller(**arguments)

    def named(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Objects that plugins offer through a hook, by their name.

        Raises:
            PluginError: As ``offers`` does.
        """
        return {name: offer.item for name, offer in self.offers(hook, **arguments).items()}

    def offers(self, hook: str, **arguments: Any) -> dict[str, Offer]:
        """The same with the plugins that offer them.

        Raises:
            PluginError: Two plugins offer one of the same name; names both. Or an offer has no
                name.
        """
        owners: dict[str, str] = {}
        offers: dict[str, Offer] = {}
        for plugin, item in self.items(hook, **arguments):
            self.claim(owners, item, plugin, hook)
            offers[item.name] = Offer(plugin, item)
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


@resources("Plugins cannot be looked for")
def make_host(
    config: Config | None = None,
    plugins: Iterable[object] = (),
    *,
    on_broken: Callable[[BrokenPlugin], None] | None = None,
) -> Host:
    """A host with the built-ins, then what is installed, then explicit plugins.

    For hooks of kind *first* the latest registered is asked first, so explicit plugins win over
    installed ones, and those over built-ins.

    Args:
        config: Says which plugins are switched off.
        plugins: Objects or modules with hook implementations.
        on_broken: Told of each plugin that cannot be taken in, which is then left out.

    Raises:
        PluginError: A plugin cannot be imported or registered, and ``on_broken`` is None; names it.
    """
    off = (config or Config()).switched_off()
    manager = Manager()
    taken: dict[str, Candidate] = {}
    for candidate in candidates(plugins):
        if candidate.name in off:
            continue
        try:
            _take_in(manager, taken, candidate)
        except PluginError as exc:
            if on_broken is None:
                raise
            on_broken(BrokenPlugin(candidate, exc))
    return Host(manager, taken)


def _take_in(manager: Manager, taken: dict[str, Candidate], candidate: Candidate) -> None:
    name = candidate.name
    if name in taken:
        raise PluginError(
            f"Two plugins are called {name!r}: one is {taken[name].origin}, the other "
            f"{candidate.origin}.",
            hint="Rename one, or uninstall it.",
        )
    plugin = candidate.load()
    try:
        register_plugin(manager, name, plugin)
    except PluginError:
        if manager.has_plugin(name):  # what is wrong showed only afterwards
            manager.unregister(name=name)
        raise
    taken[name] = candidate


def candidates(plugins: Iterable[object] = ()) -> Iterator[Candidate]:
    """All plugins that there are, in the order of registration; none of them is imported.

    Args:
        plugins: Explicit ones.
    """
    for name in BUILTINS:
        yield _built_in(name)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        yield _installed(entry)
    for plugin in plugins:
        yield _explicit(plugin)


def _explicit(plugin: object) -> Candidate:
    return Candidate(name_of(plugin), "explicit", module_of(plugin), lambda: plugin)


def _built_in(name: str) -> Candidate:
    module = f"refitkit.builtin.{name}"
    return Candidate(name, "built-in", module, lambda: importlib.import_module(module))


def _installed(entry: EntryPoint) -> Candidate:
    dist = entry.dist
    origin = f"{dist.name} {dist.version}" if dist else "an unknown distribution"
    return Candidate(
        name=entry.name,
        origin=origin,
        module=entry.value.partition(":")[0],
        load=lambda: _loaded(entry, origin),
        distribution=dist.name if dist else "",
        version=dist.version if dist else "",
    )


def _loaded(entry: EntryPoint, origin: str) -> object:
    try:
        return entry.load()
    except Exception as exc:
        raise_if_resource(exc, f"{entry.value!r} of {origin} cannot be imported")
        raise PluginError(
            f"The plugin {entry.name!r} of {origin} cannot be imported: "
            f"{type(exc).__name__}: {exc}",
            hint=f"Mend or uninstall it; to go on without it: --no-plugin {entry.name}.",
        ) from exc


# MERGED registration: Taking one plugin in: what is checked, what is warned of, and whose a later
# failure is.


class Manager(pluggy.PluginManager):
    """Knows all hooks, and which of their arguments are deprecated.

    A specification marks those with pluggy's ``warn_on_impl_args``. pluggy's own warning says where
    such an argument is used and not by whom, so the marks are taken off here and acted upon in
    ``register_plugin``.

    Attributes:
        deprecated: For each hook, what is to be said of its deprecated arguments, by argument.
    """

    def __init__(self) -> None:
        """Know the hooks, and no plugin."""
        super().__init__(hookspecs.PROJECT)
        self.deprecated: dict[str, Mapping[str, Warning]] = {}
        self.add_hookspecs(hookspecs)

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        """As pluggy does, without what it would warn of."""
        options = super().parse_hookspec_opts(module_or_class, name)
        if options is None:
            return None
        self.deprecated[name] = options.get("warn_on_impl_args") or {}
        return {**options, "warn_on_impl_args": None}


def register_plugin(manager: Manager, name: str, plugin: object) -> None:
    """Register a plugin, and warn where it takes deprecated arguments.

    Raises:
        PluginError: It is no plugin; names it and what is wrong.
    """
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
        _finish(manager, name, plugin, hint)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginError(f"The plugin {name!r} cannot be registered: {exc}", hint=hint) from exc


def _finish(manager: Manager, name: str, plugin: object, hint: str) -> None:
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            message = f"The plugin {name!r} implements {caller.name}, which is no hook."
            raise PluginError(message, hint=hint)
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin:
                _warn_of_deprecated(manager, name, implementation, caller.name)
                _blame_failures(name, implementation, caller.name)


def _warn_of_deprecated(
    manager: Manager, name: str, implementation: pluggy.HookImpl, hook: str
) -> None:
    """Warn where the plugin's own code is, as the warning is for its authors."""
    for argument, said in manager.deprecated[hook].items():
        if argument in implementation.argnames:
            code = inspect.unwrap(implementation.function).__code__
            message = f"The plugin {name!r} takes the argument {argument!r} of {hook}: {said}"
            warnings.warn_explicit(message, type(said), code.co_filename, code.co_firstlineno)


def _blame_failures(name: str, implementation: pluggy.HookImpl, hook: str) -> None:
    """Have failures of one plugin's hook name that plugin: pluggy does not tell whose they are."""
    around = implementation.wrapper or implementation.hookwrapper
    blamed = _blaming(name, hook, implementation.function, around=around)
    setattr(implementation, "function", blamed)  # noqa: B010 - typed as final, but a slot


def _blaming(
    plugin: str, hook: str, function: Callable[..., Any], *, around: bool
) -> Callable[..., Any]:
    """The same function, whose failures are ``PluginError`` and name the plugin."""

    @functools.wraps(function)
    def blamed(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:  # to enter a context at each call would cost more than many a hook
            with blame(plugin, hook):
                raise

    @functools.wraps(function)
    def blamed_wrapper(*arguments: Any) -> Any:
        with blame(plugin, hook):
            return (yield from function(*arguments))

    return blamed_wrapper if around else blamed


def blame(plugin: str, hook: str) -> AbstractContextManager[None]:
    """Turn failures inside into ``PluginError`` that name a plugin and a hook."""
    hint = f"Report it to its authors; to go on without it: --no-plugin {plugin}."
    doing = f"{hook} of {plugin!r} cannot be called"
    return raised_as(PluginError, f"The plugin {plugin!r} failed in {hook}", hint=hint, doing=doing)


def _lacks_mark(manager: Manager, plugin: object, attribute: str) -> bool:
    is_function = inspect.isroutine(getattr(plugin, attribute, None))
    return is_function and manager.parse_hookimpl_opts(plugin, attribute) is None


def name_of(plugin: object) -> str:
    """The name of an explicit plugin: what it says, or that of its module or class."""
    given = getattr(plugin, "name", None) or getattr(plugin, "__name__", None)
    return given if isinstance(given, str) else type(plugin).__name__


def module_of(plugin: object) -> str:
    """The module that a plugin is, or that its class is from."""
    return plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
