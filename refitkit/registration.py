"""Taking one plugin in: what is checked, what is warned of, and whose a later failure is."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import pluggy

from refitkit import hookspecs
from refitkit.errors import PluginError, raised_as

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager


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
