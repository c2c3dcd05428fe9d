"""Check values that plugins return.

refitkit checks a value where it receives it. So the error names the plugin and the hook, and no
weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias, TypeVar

from refitkit.errors import PluginError, raised_as
from refitkit.model import LayerType, VerificationResult
from refitkit.protocols import (
    Backend,
    Engine,
    MappingStrategy,
    OpenedModule,
    Verifier,
    WeightTransform,
    WeightTransport,
)
from refitkit.protocols.ability import Ability, missing_methods

T = TypeVar("T")

OFFERS: Mapping[str, tuple[str, type]] = {
    "refitkit_mapping_strategies": ("strategy", MappingStrategy),
    "refitkit_verifiers": ("verifier", Verifier),
    "refitkit_weight_transforms": ("transform", WeightTransform),
    "refitkit_weight_transports": ("transport", WeightTransport),
    "refitkit_layer_types": ("layer type", LayerType),
    "refitkit_register_backends": ("backend", Backend),
}
"""For each hook with which plugins offer named objects: the noun for an object, and its type."""
_RANKED = {MappingStrategy, WeightTransform}
_SHORT = 40
"""Messages show shorter values as they are."""


def owned(hook: str, name: str, plugin: str) -> str:
    """Return the subject of a message: an object that a plugin offers.

    Args:
        hook: Name of the hook.
        name: Name of the object.
        plugin: Name of the plugin.
    """
    return f"The {OFFERS[hook][0]} {name!r} of the plugin {plugin!r} ({hook})"


def require_offer(item: Any, plugin: str, hook: str) -> None:
    """Check an object that a plugin offers by name.

    Args:
        item: The object; it has a name.
        plugin: Name of the plugin.
        hook: Name of the hook.

    Raises:
        PluginError: It lacks methods, or its priority is no number.
    """
    if hook not in OFFERS:
        return
    _, kind = OFFERS[hook]
    who = owned(hook, item.name, plugin)
    lacks = _lacks(kind, item)
    if lacks or not _is(kind, item):
        what = f"has no {' and no '.join(lacks)}" if lacks else f"is {shown(item)}"
        raise PluginError(f"{who} {what}.", hint=_see(kind))
    if kind in _RANKED and not isinstance(getattr(item, "priority", None), Real):
        raise PluginError(
            f"{who} has the priority {shown(getattr(item, 'priority', None))}.",
            hint="It must be a number: objects with lower ones come first.",
        )


Subject: TypeAlias = "str | Callable[[], str]"
"""Subject of a message, or a function that makes it, which may import all backends."""


def received(value: object, kind: type[T], who: Subject) -> T:
    """Return a value that a plugin gave, if it is of the right type.

    Args:
        value: The value.
        kind: Type or protocol that it has to have.
        who: Subject of the message, with plugin and hook.

    Raises:
        PluginError: It is something else, or lacks methods.
    """
    if _is(kind, value):
        return value  # type: ignore[return-value]
    lacks = _lacks(kind, value)
    without = f", which has no {' and no '.join(lacks)}" if lacks else ""
    raise PluginError(
        f"{_text(who)} gave {shown(value)}, not {_article(kind.__name__)}{without}.",
        hint=_see(kind),
    )


def _text(who: Subject) -> str:
    return who if isinstance(who, str) else who()


def received_module(value: object, who: Subject) -> OpenedModule:
    """Return an opened module that a plugin gave, if it is one and its engines are engines.

    Args:
        value: The module.
        who: Subject of the message, with plugin and hook.

    Raises:
        PluginError: It is something else.
    """
    found: OpenedModule = received(value, OpenedModule, who)  # type: ignore[type-abstract]
    doing = "The module cannot be opened"
    with raised_as(
        PluginError, lambda: f"{_text(who)} gave a module that cannot be asked", doing=doing
    ):
        backend, engines = found.backend, found.engines
    inside: list[tuple[str, Any, type]] = [("backend", backend, str), ("engines", engines, Mapping)]
    if isinstance(engines, Mapping):
        inside += [(f"engines[{name!r}]", engine, Engine) for name, engine in engines.items()]
    for name, one, kind in inside:
        if not _is(kind, one):
            what = f"gave a module whose {name} is {shown(one)}, not {_article(kind.__name__)}"
            raise PluginError(f"{_text(who)} {what}.", hint=_see(OpenedModule))
    return found


def received_bytes(value: object, who: Subject) -> Mapping[str, bytes]:
    """Return data by name that a plugin gave, if it is.

    Args:
        value: The data.
        who: Subject of the message, with plugin and hook.

    Raises:
        PluginError: It is something else.
    """
    found: Mapping[str, bytes] = received(value, Mapping, who)  # type: ignore[type-abstract]
    # another mapping may read each value from a file
    for name, data in found.items() if isinstance(found, dict) else ():
        if not isinstance(name, str) or not isinstance(data, bytes | bytearray | memoryview):
            what = f"gave {shown(data)} for {name!r}, not bytes by name"
            raise PluginError(f"{_text(who)} {what}.")
    return found


def received_verdict(value: object, who: str) -> VerificationResult:
    """Return a verifier's result, if its fields have the right types and agree.

    Args:
        value: The result.
        who: Subject of the message, with plugin and hook.

    Raises:
        PluginError: It is something else.
    """
    found = received(value, VerificationResult, who)
    # ``model_construct`` makes one without validation
    wrong = f"{who} gave a {VerificationResult.__name__} with wrong fields"
    with raised_as(PluginError, wrong, doing="The weights cannot be verified"):
        facts = {name: getattr(found, name) for name in VerificationResult.model_fields}
        VerificationResult.model_validate(facts)
    failed = [repr(measure.name) for measure in found.measures if not measure.ok]
    if found.ok and failed:
        what = f"ok is True, but measures are not: {', '.join(failed)}"
        raise PluginError(f"{who} gave a verdict that contradicts itself: {what}.")
    return found


def shown(value: object) -> str:
    """Return a value, or what kind of object it is, as one short phrase."""
    is_short = isinstance(value, bool | int | float | str) and len(str(value)) < _SHORT
    return repr(value) if value is None or is_short else _article(type(value).__name__)


def _is(kind: type, value: object) -> bool:
    """Whether a value is of a type, or has all methods of a protocol."""
    return not _lacks(kind, value) if isinstance(kind, Ability) else isinstance(value, kind)


def _lacks(kind: type, value: object) -> list[str]:
    return missing_methods(kind, value) if isinstance(kind, Ability) else []


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _see(kind: type) -> str:
    home = kind.__module__.split(".")[1] if kind.__module__.startswith("refitkit.") else ""
    return f"See refitkit.{home}.{kind.__name__}." if home else ""
