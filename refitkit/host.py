"""Find plugins, register them in a fixed order, and name the plugin when a hook fails.

This module hides pluggy from the rest of refitkit. Read it in this order: ``make_host`` registers
built-in, installed and explicit plugins; ``Host`` calls their hooks; ``register_plugin`` checks
one plugin and wraps its hooks, so that each failure becomes a ``PluginError`` with a name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from refitkit import hookspecs
from refitkit.config import Config
from refitkit.distributions import contains_module
from refitkit.errors import PluginError, raise_if_resource, raised_as, resources
from refitkit.offered import received, require_offer
from refitkit.version import __version__

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
    "transports",
    "verify",
    "aotinductor",
    "torch_tensorrt",
)
"""Built-in plugins, by the name of their module in ``refitkit.builtin``."""

_BUILT_IN, _EXPLICIT = "built-in", "explicit"
_EVENT = "refitkit_event"
_ON_REFITKIT = re.compile(r"\s*refitkit\s*([^\w.\s-]|$)", re.IGNORECASE)
"""The start of a requirement on refitkit, not on a package whose name begins with it."""
_log = logging.getLogger("refitkit")
_logged: set[tuple[str, str]] = set()
"""Plugins, and what was logged about the versions that they need."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that was found and may be registered.

    Attributes:
        name: Name that switches the plugin off.
        origin: ``built-in``, ``explicit``, or the plugin's distribution and its version.
        module: Module that is the plugin or contains it.
        load: Returns the plugin, and imports it first if necessary.
        distribution: Name of the plugin's distribution; empty if it has none.
        version: Version of that distribution.
        requires: Returns the requirements of that distribution, as its metadata has them.
        contains: Returns whether a module, given by name, is of that distribution and in the
            plugin's top-level package. The plugin must have been loaded.
    """

    name: str
    origin: str
    module: str
    load: Callable[[], object]
    distribution: str = ""
    version: str = ""
    requires: Callable[[], Iterable[str]] = tuple
    contains: Callable[[str], bool] = lambda _: False

    def misfit(self) -> str:
        """The versions of refitkit that the distribution needs, if this is another one; or ''."""
        return misfit(self.requires())


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that was left out because it is broken.

    Attributes:
        candidate: The plugin.
        error: Reason why it was left out.
    """

    candidate: Candidate
    error: PluginError


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One registered plugin.

    Attributes:
        name: Name that switches the plugin off.
        origin: ``built-in``, ``explicit``, or the plugin's distribution and its version.
        hooks: Names of the hooks that the plugin implements, sorted.
        module: Module that is the plugin or contains it.
        distribution: Name of the plugin's distribution; empty if it has none.
        version: Version of that distribution.
        ignored: Names of hooks with ``optionalhook=True`` that this refitkit does not have, sorted.
        misfit: ``needs refitkit>=2, this is refitkit 1.0``, if the distribution requires another
            version of refitkit; else empty.
    """

    name: str
    origin: str
    hooks: tuple[str, ...]
    module: str = ""
    distribution: str = ""
    version: str = ""
    ignored: tuple[str, ...] = ()
    misfit: str = ""


@dataclass(frozen=True, slots=True)
class PluginOffer:
    """An object that a plugin offers through a hook, such as a verifier.

    Attributes:
        plugin: Name of the plugin.
        item: The object; it has a ``name``.
    """

    plugin: str
    item: Any


NOBODY = ("", None)
"""No plugin, and no result."""
_last = threading.local()
"""Of each thread: ``given`` is the last result of a hook that is not None, with its plugin."""


class Host:
    """All plugins of one pipeline. :func:`make_host` creates it."""

    def __init__(
        self,
        manager: Manager,
        registered: Mapping[str, Candidate],
        config: Config,
        installed: tuple[Candidate, ...],
    ) -> None:
        """Create a host; call ``make_host`` instead.

        Args:
            manager: Manager with all plugins registered.
            registered: Candidates that were registered, by name.
            config: Settings of the plugins.
            installed: Installed plugins that were loaded, also if explicit ones replace them.
        """
        self._installed = installed
        self._manager = manager
        self._config = config
        self._registered = registered
        self._callers: dict[tuple[str, str], pluggy.HookCaller] = {}
        self._offers: dict[str, Mapping[str, PluginOffer]] = {}
        self._deaf: set[str] = set()  # listeners that have failed

    def plugins(self) -> tuple[PluginInfo, ...]:
        """All registered plugins, in the order of registration."""
        return self._plugins

    # Cached because every call of ``collect`` iterates over it.
    @functools.cached_property
    def _plugins(self) -> tuple[PluginInfo, ...]:
        return tuple(
            self._info_of(name, plugin)
            for name, plugin in self._manager.list_name_plugin()
            if plugin is not None
        )

    def _info_of(self, name: str, plugin: object) -> PluginInfo:
        found = self._registered[name]
        callers = self._manager.get_hookcallers(plugin) or ()
        return PluginInfo(
            name,
            found.origin,
            tuple(sorted(caller.name for caller in callers if caller.has_spec())),
            found.module,
            found.distribution,
            found.version,
            tuple(sorted(caller.name for caller in callers if not caller.has_spec())),
            found.misfit(),
        )

    def has(self, hook: str) -> bool:
        """Whether any plugin implements a hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def kind_of(self, hook: str) -> str:
        """The kind of a hook: ``first`` or ``all``."""
        spec = getattr(self._manager.hook, hook).spec
        return "first" if spec.opts["firstresult"] else "all"

    def plugin(self, name: str) -> object:
        """The registered object or module of this name; None if there is none."""
        return self._manager.get_plugin(name)

    def candidate(self, name: str) -> Candidate:
        """The candidate from which the plugin of this name was registered.

        Raises:
            KeyError: No plugin has this name.
        """
        return self._registered[name]

    def may_import(self, module: str) -> bool:
        """Whether a file may name a module to import: it is of an installed plugin that is in use.

        Args:
            module: Name of the module, with all dots. It is not imported.
        """
        return any(one.contains(module) for one in self._installed)

    def first(self, hook: str, kind: Any, **arguments: Any) -> tuple[str, Any]:
        """Call a hook of kind *first*.

        Args:
            hook: Name of the hook.
            kind: Type or protocol of what plugins have to return.
            arguments: Arguments of the hook.

        Returns:
            Name of the plugin with the first result that is not None, and the result. If there is
            none, ``("", None)``.

        Raises:
            RefitError: An implementation raised it.
            PluginError: An implementation raised any other exception, or returned something else;
                names the plugin.
        """
        _last.given = NOBODY
        try:
            result = self.call(hook, **arguments)
            plugin, given = _last.given
        finally:
            _last.given = NOBODY  # it may hold weights
        if result is None:
            return NOBODY
        if given is not result:  # one that wraps the others has replaced it
            found = getattr(self._manager.hook, hook).get_hookimpls()
            plugin = " or ".join(p.plugin_name for p in found if p.wrapper or p.hookwrapper)
        return plugin, received(result, kind, f"The plugin {plugin!r} ({hook})")

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook.

        Returns:
            The first result that is not None for a hook of kind *first*, a list of all results for
            a hook of kind *all*.

        Raises:
            RefitError: An implementation raised it.
            PluginError: An implementation raised any other exception; names the plugin.
        """
        return getattr(self._manager.hook, hook)(**arguments)

    @property
    def has_listeners(self) -> bool:
        """Whether any plugin gets events."""
        return bool(self._listeners)

    def emit(self, event: Event) -> None:
        """Send a progress event to all listeners. One that fails is logged, and the work goes on.

        Args:
            event: The event.
        """
        interrupt: BaseException | None = None
        for name, tell in self._listeners:
            try:
                tell(event=event)
            except Exception as exc:  # noqa: BLE001 - it is logged
                if name not in self._deaf:  # each event would say the same
                    self._deaf.add(name)
                    text = "A listener of the plugin %s failed, and the work goes on: %s"
                    _log.warning(text, name, exc, exc_info=exc)
            except BaseException as exc:  # noqa: BLE001 - raised once all have the event
                interrupt = interrupt or exc
        if interrupt is not None:
            raise interrupt

    @functools.cached_property
    def _listeners(self) -> tuple[tuple[str, Callable[..., Any]], ...]:
        """All listeners by plugin, in the order of calls; one call where some wrap others."""
        found = getattr(self._manager.hook, _EVENT).get_hookimpls()
        names = [one.plugin_name for one in reversed(found)]
        if any(one.wrapper or one.hookwrapper for one in found):
            return ((" or ".join(map(repr, names)), functools.partial(self.call, _EVENT)),)
        return tuple((repr(name), functools.partial(self.call_one, name, _EVENT)) for name in names)

    def collect(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a hook of kind *all*, one plugin after another.

        Yields:
            ``(plugin, result)`` for each plugin whose result is not None, built-ins first.
        """
        for info in self.plugins():
            if hook in info.hooks:
                results = self.call_one(info.name, hook, **arguments)
                yield from ((info.name, item) for item in results if item is not None)

    def items(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a hook of kind *all* whose results are lists.

        Yields:
            ``(plugin, item)`` for each item of each list.

        Raises:
            RefitError: An implementation raised it, possibly while its items were iterated.
            PluginError: An implementation raised any other exception, or did not return an
                iterable.
        """
        for plugin, result in self.collect(hook, **arguments):
            if not isinstance(result, Iterable):
                kind = type(result).__name__
                raise PluginError(f"The plugin {plugin!r} returned {kind} from {hook}, not a list.")
            # A generator runs the plugin's code here, outside the wrapped hook.
            with named_failures(plugin, hook):
                listed = list(result)
            yield from ((plugin, item) for item in listed)

    def named_items(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a hook like ``items``, and check that each item has a name of its own.

        Yields:
            ``(plugin, item)`` for each item of each list.

        Raises:
            RefitError: As for ``items``.
            PluginError: Two plugins offer items of the same name, or an item has no name.
        """
        owners: dict[str, str] = {}
        for plugin, item in self.items(hook, **arguments):
            self.claim(owners, item, plugin, hook)
            yield plugin, item

    def call_one(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """Call a hook of one plugin only; results and errors are those of ``call``."""
        caller = self._callers.get((plugin, hook))
        if caller is None:
            # pluggy cannot call one plugin, only all but some; the caller is cached for speed.
            named = self._manager.list_name_plugin()
            others = [other for name, other in named if name != plugin and other is not None]
            caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
            self._callers[plugin, hook] = caller
        return caller(**arguments)

    def named(self, hook: str) -> dict[str, Any]:
        """Objects that plugins offer through a hook, by their name.

        Raises:
            PluginError: As for ``offers``.
        """
        return {name: offer.item for name, offer in self.offers(hook).items()}

    def offers(self, hook: str) -> Mapping[str, PluginOffer]:
        """Objects that plugins offer through a hook, by their name.

        The hook takes the settings, or nothing. It is called once, because every refit needs its
        answer several times.

        Raises:
            PluginError: Two plugins offer objects of the same name, or an object has no name.
        """
        offers = self._offers.get(hook)
        if offers is None:
            spec = getattr(self._manager.hook, hook).spec
            given = {"config": self._config} if "config" in spec.argnames else {}
            named = self.named_items(hook, **given)
            offers = {item.name: PluginOffer(plugin, item) for plugin, item in named}
            # only if all of them are valid, so that an error is raised again by the next call
            self._offers[hook] = offers
        return offers

    @staticmethod
    def claim(owners: dict[str, str], item: Any, plugin: str, hook: str) -> None:
        """Record that a plugin offers an object under the object's name.

        Args:
            owners: Names of plugins by the names of their objects; gets one more entry.
            item: The object.
            plugin: Name of the plugin.
            hook: Name of the hook, for error messages.

        Raises:
            PluginError: Another plugin has claimed the name, or the object has no name.
        """
        name = getattr(item, "name", None)
        if not isinstance(name, str):
            raise PluginError(f"The plugin {plugin!r} offers {item!r} in {hook}, without a name.")
        require_offer(item, plugin, hook)
        if name in owners:
            raise PluginError(
                f"The plugins {owners[name]!r} and {plugin!r} both offer {name!r} in {hook}.",
                hint=f"Switch one of them off: no_plugins={{{plugin!r}}} or --no-plugin {plugin}.",
            )
        owners[name] = plugin


# -- finding plugins ---------------------------------------------------------------------------


@resources("Plugins cannot be looked for")
def make_host(
    config: Config | None = None,
    plugins: Iterable[object] = (),
    *,
    on_broken: Callable[[BrokenPlugin], None] | None = None,
) -> Host:
    """Create a host with the built-in, then the installed, then the explicit plugins.

    For hooks of kind *first* the plugin that was registered last is asked first. So explicit
    plugins win over installed ones, and installed ones over built-ins. An explicit plugin replaces
    an installed one that is the same module, or an object of the same class and ``name``. Without
    a ``name`` it is registered under the name of the installed one.

    Args:
        config: Names the plugins that are switched off, and has settings of the others.
        plugins: Explicit plugins: objects or modules with hook implementations.
        on_broken: Called with each plugin that cannot be imported or registered. The host is then
            created without that plugin.

    Raises:
        PluginError: A plugin cannot be imported or registered, and ``on_broken`` is None. The
            message names the plugin.
    """
    config = config or Config()
    off = config.switched_off()
    # A plugin that is switched off must not replace an installed one.
    explicit = [plugin for plugin in plugins if name_of(plugin) not in off]
    # values: the names of the installed plugins that they replace, once those are found
    replaced = dict.fromkeys(map(_identity, explicit), "")
    manager = Manager()
    registered: dict[str, Candidate] = {}
    installed: list[Candidate] = []
    # before they are loaded: a plugin that is switched off is not even imported
    found = [candidate for candidate in candidates(explicit) if candidate.name not in off]
    firsts = {one.name: one for one in reversed(found) if _is_installed(one)}
    if on_broken is None:
        # before any is imported, because the import of the first may fail
        for candidate in found:
            _require_first(candidate, firsts)
    for candidate in found:
        try:
            _require_first(candidate, firsts)
            _register_candidate(manager, registered, candidate, replaced)
        except PluginError as exc:
            if on_broken is None:
                raise
            on_broken(BrokenPlugin(candidate, exc))
        else:
            installed += [candidate] if _is_installed(candidate) else []
    return Host(manager, registered, config, tuple(installed))


def _is_installed(candidate: Candidate) -> bool:
    return candidate.origin not in {_BUILT_IN, _EXPLICIT}


def _require_first(candidate: Candidate, firsts: Mapping[str, Candidate]) -> None:
    """Raise a ``PluginError`` for an installed plugin whose name another installed one has."""
    if _is_installed(candidate) and firsts[candidate.name] is not candidate:
        raise _same_name(firsts[candidate.name], candidate)


def _register_candidate(
    manager: Manager,
    registered: dict[str, Candidate],
    candidate: Candidate,
    replaced: dict[tuple[object, str], str],
) -> None:
    """Register a candidate, unless an explicit plugin replaces it.

    Args:
        manager: Manager that gets the plugin.
        registered: Registered candidates by name; gets one more entry.
        candidate: The candidate.
        replaced: Identities of the explicit plugins; gets the names of the installed plugins that
            they replace.

    Raises:
        PluginError: The plugin cannot be imported or registered, or its name is taken.
    """
    _require_free_name(candidate, registered)
    with _misfit_first(candidate):
        plugin = candidate.load()
    # A built-in is never replaced quietly: users switch it off by name.
    if _identity(plugin) in replaced and candidate.origin != _BUILT_IN:
        if candidate.origin != _EXPLICIT:
            replaced[_identity(plugin)] = candidate.name
            return
        if not _own_name(plugin) and replaced[_identity(plugin)]:
            # Users configure the plugin by its published name, however it was passed.
            candidate = replace(candidate, name=replaced[_identity(plugin)])
            _require_free_name(candidate, registered)
    try:
        with _misfit_first(candidate):
            register_plugin(manager, candidate.name, plugin)
    except PluginError:
        # pluggy registers a plugin before it finds that a hook does not exist
        if manager.has_plugin(candidate.name):
            manager.unregister(name=candidate.name)
        raise
    registered[candidate.name] = candidate
    _log_misfit(candidate)


def _require_free_name(candidate: Candidate, registered: Mapping[str, Candidate]) -> None:
    if candidate.name in registered:
        raise _same_name(registered[candidate.name], candidate)


def _same_name(one: Candidate, other: Candidate) -> PluginError:
    installed = [two.distribution for two in (one, other) if two.distribution]
    hint = f"Uninstall one: pip uninstall {installed[-1]}." if installed else "Rename one."
    return PluginError(
        f"Two plugins are called {one.name!r}: one is {one.origin}, the other {other.origin}.",
        hint=hint,
    )


# -- plugins for other versions of refitkit -------------------------------------------------------


def misfit(requirements: Iterable[str]) -> str:
    """The requirements on refitkit that this version does not meet; empty if there are none.

    Args:
        requirements: Lines ``Requires-Dist`` of a distribution, such as ``refitkit>=0.2``.
    """
    # a regular expression first: most requirements are on other packages, and parsing takes time
    named = [line for line in requirements if _ON_REFITKIT.match(line)]
    if not named:
        return ""
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415

    unmet = []
    for line in named:
        try:
            required = Requirement(line)
        except InvalidRequirement:  # pip would have refused it, so others can report it
            continue
        applies = required.marker is None or required.marker.evaluate({"extra": ""})
        if applies and not required.specifier.contains(__version__, prereleases=True):
            unmet.append(f"refitkit{required.specifier}")
    if not unmet:
        return ""
    return f"needs {' and '.join(unmet)}, this is refitkit {__version__}"


@contextmanager
def _misfit_first(candidate: Candidate) -> Iterator[None]:
    """Name another required version of refitkit first, if the plugin cannot be loaded."""
    try:
        yield
    except PluginError as exc:
        wrong = candidate.misfit()
        if not wrong:
            raise
        raise PluginError(
            f"The plugin {candidate.name!r} of {candidate.origin} {wrong}. {exc.message}",
            hint=f"Install versions that fit: pip install --upgrade {candidate.distribution} "
            f"refitkit. Or switch it off: --no-plugin {candidate.name}.",
        ) from exc.__cause__


def _log_misfit(candidate: Candidate) -> None:
    """Log once that a plugin requires another version of refitkit, though it could be loaded."""
    wrong = candidate.misfit()
    if wrong and (candidate.name, wrong) not in _logged:
        _logged.add((candidate.name, wrong))
        _log.warning("The plugin %r of %s %s.", candidate.name, candidate.origin, wrong)


def _identity(plugin: object) -> tuple[object, str]:
    """A key for comparison: the module itself or the class of an object, and its own name."""
    is_itself = inspect.ismodule(plugin) or inspect.isclass(plugin)
    # one class can have several plugins, such as configured objects, which their names tell apart
    return plugin if is_itself else type(plugin), _own_name(plugin)


def candidates(plugins: Iterable[object] = ()) -> Iterator[Candidate]:
    """All plugins that exist, in the order of registration. Imports none of them.

    Args:
        plugins: Explicit plugins.
    """
    for name in BUILTINS:
        yield _built_in(name)
    # Sorted, because entry points have no defined order.
    yield from sorted(map(_installed, entry_points(group=GROUP)), key=_by_name)
    for plugin in plugins:
        yield _explicit(plugin)


def _by_name(candidate: Candidate) -> tuple[str, str]:
    return candidate.name, candidate.origin


def _built_in(name: str) -> Candidate:
    module = f"refitkit.builtin.{name}"
    return Candidate(name, _BUILT_IN, module, lambda: importlib.import_module(module))


def _installed(entry: EntryPoint) -> Candidate:
    dist = entry.dist
    origin = f"{dist.name} {dist.version}" if dist else "an unknown distribution"
    module = entry.value.partition(":")[0].strip()
    return Candidate(
        name=entry.name,
        origin=origin,
        module=module,
        load=lambda: _imported(entry, origin),
        distribution=dist.name if dist else "",
        version=dist.version if dist else "",
        requires=lambda: getattr(dist, "requires", None) or (),
        contains=lambda name: contains_module(dist, module, name),
    )


def _imported(entry: EntryPoint, origin: str) -> object:
    try:
        return entry.load()
    except Exception as exc:
        raise_if_resource(exc, f"{entry.value!r} of {origin} cannot be imported")
        raise PluginError(
            f"The plugin {entry.name!r} of {origin} cannot be imported: "
            f"{type(exc).__name__}: {exc}",
            hint=f"Fix or uninstall it, or switch it off: --no-plugin {entry.name}.",
        ) from exc


def _explicit(plugin: object) -> Candidate:
    return Candidate(name_of(plugin), _EXPLICIT, module_of(plugin), lambda: plugin)


def name_of(plugin: object) -> str:
    """The name of an explicit plugin: its ``name``, or else that of its module or class."""
    return _own_name(plugin) or getattr(plugin, "__name__", "") or type(plugin).__name__


def _own_name(plugin: object) -> str:
    name = getattr(plugin, "name", None)
    return name if isinstance(name, str) else ""


def module_of(plugin: object) -> str:
    """The name of the module that is the plugin, or that defines its class."""
    return plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__


# -- registering one plugin --------------------------------------------------------------------


class Manager(pluggy.PluginManager):
    """A pluggy manager that knows all hooks and their deprecated arguments.

    A specification marks deprecated arguments with pluggy's ``warn_on_impl_args``. The warning of
    pluggy does not name the plugin. So the manager removes the marks, and ``register_plugin`` warns
    instead.

    Attributes:
        deprecated: For each hook, the warnings about its deprecated arguments, by argument.
    """

    def __init__(self) -> None:
        """Add the hook specifications; no plugin is registered."""
        super().__init__(hookspecs.PROJECT)
        self.deprecated: dict[str, Mapping[str, Warning]] = {}
        # The last step, because it calls ``parse_hookspec_opts``.
        self.add_hookspecs(hookspecs)

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        """Options of a specification as pluggy reads them, without the marks of arguments."""
        options = super().parse_hookspec_opts(module_or_class, name)
        if options is None:
            return None
        self.deprecated[name] = options.get("warn_on_impl_args") or {}
        return {**options, "warn_on_impl_args": None}


def register_plugin(manager: Manager, name: str, plugin: object) -> None:
    """Register a plugin, and warn about deprecated arguments that its hooks take.

    Raises:
        PluginError: The object is not a valid plugin. The message names it and the reason.
    """
    hint = f"See docs/reference/hooks.md, or switch the plugin off: --no-plugin {name}."
    # pluggy would register a class, and call its methods without ``self``.
    if inspect.isclass(plugin):
        raise PluginError(f"The plugin {name!r} is a class: register an instance of it.")
    # pluggy would ignore a hook that is not marked, and nobody would notice
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


def _lacks_mark(manager: Manager, plugin: object, attribute: str) -> bool:
    is_function = inspect.isroutine(getattr(plugin, attribute, None))
    return is_function and manager.parse_hookimpl_opts(plugin, attribute) is None


def _finish(manager: Manager, name: str, plugin: object, hint: str) -> None:
    for caller in manager.get_hookcallers(plugin) or ():
        # pluggy registers hooks of any name and waits for a specification.
        if not caller.has_spec():
            if _is_optional(caller, plugin):
                continue
            message = f"The plugin {name!r} implements {caller.name}, which is not a hook."
            raise PluginError(message, hint=hint)
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin:
                _warn_of_deprecated(manager, name, implementation, caller.name)
                _name_failures(name, implementation, caller)


def _is_optional(caller: pluggy.HookCaller, plugin: object) -> bool:
    """Whether a plugin marks its implementation of a hook with ``optionalhook=True``."""
    return all(one.optionalhook for one in caller.get_hookimpls() if one.plugin is plugin)


def _warn_of_deprecated(
    manager: Manager, name: str, implementation: pluggy.HookImpl, hook: str
) -> None:
    for argument, warning in manager.deprecated[hook].items():
        if argument in implementation.argnames:
            # The warning points at the plugin's code, because its authors have to act.
            code = inspect.unwrap(implementation.function).__code__
            message = f"The plugin {name!r} takes the argument {argument!r} of {hook}: {warning}"
            warnings.warn_explicit(message, type(warning), code.co_filename, code.co_firstlineno)


def _name_failures(name: str, implementation: pluggy.HookImpl, caller: pluggy.HookCaller) -> None:
    """Replace a plugin's hook by one whose errors name the plugin; pluggy's do not."""
    around = implementation.wrapper or implementation.hookwrapper
    is_first = bool(caller.spec and caller.spec.opts["firstresult"])
    wrapped = _with_named_failures(
        name, caller.name, implementation.function, around=around, is_first=is_first
    )
    setattr(implementation, "function", wrapped)  # noqa: B010 - typed as final, but a slot


def _with_named_failures(
    plugin: str, hook: str, function: Callable[..., Any], *, around: bool, is_first: bool
) -> Callable[..., Any]:
    """The same function; its failures are ``PluginError`` and name the plugin.

    Of a hook of kind *first*, the result is noted for ``Host.first``.
    """

    @functools.wraps(function)
    def hook_function(*arguments: Any) -> Any:
        try:
            result = function(*arguments)
        except Exception:  # entering a context on each call would cost more than many hooks do
            with named_failures(plugin, hook):
                raise
        if is_first and result is not None:
            _last.given = plugin, result
        return result

    @functools.wraps(function)
    def hook_wrapper(*arguments: Any) -> Any:
        # A wrapper can also fail after its ``yield``, when pluggy resumes it.
        with named_failures(plugin, hook):
            return (yield from function(*arguments))

    return hook_wrapper if around else hook_function


def named_failures(plugin: str, hook: str) -> AbstractContextManager[None]:
    """Raise failures of the body as ``PluginError`` that names the plugin and the hook."""
    hint = f"Report it to the plugin's authors, or switch the plugin off: --no-plugin {plugin}."
    doing = f"{hook} of {plugin!r} cannot be called"
    return raised_as(PluginError, f"The plugin {plugin!r} failed in {hook}", hint=hint, doing=doing)
