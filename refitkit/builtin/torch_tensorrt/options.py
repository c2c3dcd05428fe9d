"""The user's options as ``torch_tensorrt.dynamo.CompilationSettings``."""

from __future__ import annotations

import dataclasses
import platform
import sys
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import _get_qualified_name

from refitkit.builtin.torch_tensorrt.settings import fits
from refitkit.errors import ConfigError, Problem, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_OURS = {
    "immutable_weights": "networks are refitted before they are built",
    "refit_identical_engine_weights": "networks are refitted before they are built",
    "strip_engine_weights": "the engine is built with its weights",
    "device": "nothing runs here",
    "dryrun": "it would build nothing",
    "enable_cross_compile_for_windows": "it is not supported",
    "cache_built_engines": "refitting replaces it",
    "reuse_cached_engines": "refitting replaces it",
}
"""Fields that an option may not set, and why."""

IMPORTS = "imports"
"""Option of ours: modules that sessions import first, because they register ops or converters."""

_PATHS = frozenset({"timing_cache_path", "runtime_cache_path", "engine_cache_dir"})
"""Options that name files of the machine that they were given on."""

_PACKAGES = ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them: ops and dtypes by name.

    Raises:
        ConfigError: One cannot be written so; names all of them.
    """
    done: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in options.items():
        try:
            done[name] = _plain(value)
        except (TypeError, AttributeError, RuntimeError):
            problems.append(Problem(name, "type", type(value).__name__))
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)
    return done


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, OpOverload | OpOverloadPacket | BuiltinFunctionType):
        return _get_qualified_name(value)
    raise TypeError(value)


def trusted(options: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Options from a file, without those that a file may not decide.

    Paths of another machine are left out. Modules are imported where this process has imported
    them already: whoever wrote the file may not choose what runs here.

    Raises:
        UnsupportedTargetError: It wants modules to be imported that are not; lists them.
    """
    names = options.get(IMPORTS, [])
    listed = names if isinstance(names, list) else [names]
    problems = [
        Problem(str(name), "module that is not imported")
        for name in listed
        if not isinstance(name, str) or name not in sys.modules
    ]
    if problems:
        raise UnsupportedTargetError(
            f"{file!r} was made with modules that register ops or converters.",
            problems=problems,
            hint="A file cannot have them imported: if you trust them, import them first.",
        )
    return {name: value for name, value in options.items() if name not in _PATHS}


def settings_from_options(options: Mapping[str, Any]) -> Any:
    """Compilation settings for a network that is built without a GPU.

    Args:
        options: What ``plain`` gave.

    Raises:
        ConfigError: An option does not exist or is not for the user to set; names all of them.
    """
    import torch_tensorrt  # noqa: PLC0415 - imported by whoever calls this
    from torch_tensorrt.dynamo import CompilationSettings  # noqa: PLC0415

    fields = {field.name: field.type for field in dataclasses.fields(CompilationSettings)}
    given = {name: _meant(value) for name, value in options.items()}
    problems = [
        Problem(name, "not yours to set", hint=why)
        for name, why in _OURS.items()
        if name in options
    ]
    problems += unknown(options.keys() - _OURS.keys(), fields)
    problems += [
        Problem(name, "type", repr(value), str(fields[name]))
        for name, value in given.items()
        if name in fields and name not in _OURS and not fits(value, fields[name])
    ]
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)
    return CompilationSettings(
        **given, immutable_weights=True, device=torch_tensorrt.Device("cuda:0")
    )


def unknown(options: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    """A problem for each option that does not exist, in order."""
    for name in sorted(set(options) - set(known)):
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        yield Problem(name, "no such option", hint=hint)


def _meant(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return set(value) if isinstance(value, list) else value


def versions() -> dict[str, str]:
    """Versions of what makes an engine here."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
