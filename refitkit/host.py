"""The plugin host: who is registered, in which order, and whose fault a failure is."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from refitkit.config import Config
from refitkit.errors import PluginError, raise_if_resource, resources
from refitkit.registration import Manager, blame, module_of, name_of, register_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pluggy

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
