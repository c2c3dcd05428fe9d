"""Compilation settings of Torch-TensorRT, from engines and from the user's options.

The module has four groups of functions:

1. ``settings_from`` turns the plain settings of an engine's metadata into upstream's
   ``CompilationSettings``. ``shared_settings`` and ``check_refittable`` check the settings.
2. ``settings_text`` gives the settings that plans depend on, as text.
3. ``plain_options`` and ``settings_from_options`` do the same for the user's options.
4. ``key_of_options`` and ``key_of_settings`` compute keys of the plan cache.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import json
import platform
import sys
import types
import typing
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import _get_qualified_name

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.metadata import DeviceValue, EnumValue
from refitkit.errors import (
    ConfigError,
    NotRefittableError,
    Problem,
    UnsupportedTargetError,
    raise_if_resource,
)
from refitkit.protocols import PlanKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping


_RETIRED = frozenset(
    {
        "use_python_runtime",
        "enabled_precisions",
        "use_explicit_typing",
        "runtime_cache_path",
        "dynamic_shapes_kernel_specialization_strategy",
        "cuda_graph_strategy",
    }
)
"""Fields of 2.11 to 2.13 that 2.14 no longer has. 2.14 ignores them when it reads settings."""

_IRRELEVANT_FIELDS = frozenset(
    {
        *("device", "workspace_size", "timing_cache_path", "lazy_engine_init", "dryrun"),
        *("cache_built_engines", "reuse_cached_engines", "num_avg_timing_iters"),
        *("offload_module_to_cpu", "pass_through_build_failures", "use_python_runtime"),
        *("dynamically_allocate_resources", "max_aux_streams", "optimization_level"),
        *("strip_engine_weights", "immutable_weights", "refit_identical_engine_weights"),
        *("enable_weight_streaming", "version_compatible", "hardware_compatible"),
        *("dla_sram_size", "dla_local_dram_size", "dla_global_dram_size", "engine_capability"),
        *("tiling_optimization_level", "l2_limit_for_tiling", "sparse_weights", "disable_tf32"),
        *("runtime_cache_path", "dynamic_shapes_kernel_specialization_strategy"),
        *("cuda_graph_strategy", "enable_cross_compile_for_windows"),
        *("autocast_calibration_dataloader",),
    }
)
"""Fields that change neither the partitioning of a model nor the names of slots."""


def settings_from(fields: Mapping[str, Any], engine: str) -> Any:
    """The installed version's ``CompilationSettings`` with these fields.

    Missing fields get the installed version's defaults, as in upstream.

    Args:
        fields: Fields as in :class:`~refitkit.builtin.torch_tensorrt.metadata.Metadata`.
        engine: Name of the engine, for error messages.

    Raises:
        UnsupportedTargetError: Fields are unknown or have another type, or the device is missing.
    """
    cls = _settings_class()
    wanted = {one.name: one.type for one in dataclasses.fields(cls)}
    problems = []
    values = {}
    # every field is checked: upstream would set any value, and fail later in another place
    for name, encoded in fields.items():
        if name in _RETIRED and name not in wanted:
            continue
        if name not in wanted:
            problems.append(Problem(name, "unknown setting", repr(encoded)[:80]))
            continue
        value = _upstream_value(encoded)
        if not matches_type(value, wanted[name]):
            problems.append(Problem(name, "type", repr(encoded)[:80], str(wanted[name])))
        values[name] = value
    if "device" not in fields:
        problems.append(Problem("device", "missing"))
    if problems:
        raise UnsupportedTargetError(
            f"The installed version does not know the settings of the engine {engine!r}.",
            problems=problems,
            hint="If a newer Torch-TensorRT compiled the engine, install that version.",
        )
    try:
        return cls(**values)
    except Exception as exc:
        raise_if_resource(exc, f"The settings of the engine {engine!r} cannot be read")
        raise UnsupportedTargetError(
            f"torch_tensorrt refuses the settings of the engine {engine!r}: {exc}"
        ) from exc


def shared_settings(settings: Mapping[str, Any]) -> Any:
    """The settings that all engines share.

    Args:
        settings: The ``CompilationSettings`` of each engine, by name of the engine; at least one.

    Raises:
        UnsupportedTargetError: The settings differ. Lists every differing field of every engine.
    """
    (first, wanted), *others = settings.items()
    texts = {name: _texts(one) for name, one in others}
    reference = _texts(wanted)
    problems = [
        Problem(f"{name}: {key}", "differs", text.get(key, "nothing"), reference.get(key, "none"))
        for name, text in texts.items()
        for key in sorted(text.keys() | reference.keys())
        if text.get(key) != reference.get(key)
    ]
    if problems:
        raise UnsupportedTargetError(
            f"The engines of the module were compiled with other settings than {first!r}.",
            problems=problems,
            hint="Compile the whole model in one call.",
        )
    return wanted


def check_refittable(settings: Any, engine: str) -> None:
    """Check that engines with these settings can take new weights.

    Engines without weights (``strip_engine_weights``) can: they compute with zeros until the first
    full refit.

    Args:
        settings: A ``CompilationSettings``.
        engine: Name of the engine, for error messages.

    Raises:
        NotRefittableError: The engines cannot take new weights. Names the flags to set.
    """
    problems = []
    if getattr(settings, "immutable_weights", True):
        wanted = "immutable_weights=False"
        problems.append(Problem(engine, "immutable weights", "immutable_weights=True", wanted))
    if getattr(settings, "refit_identical_engine_weights", False):
        problems.append(
            Problem(
                engine,
                "refit with identical weights only",
                "refit_identical_engine_weights=True",
                "refit_identical_engine_weights=False",
                "in TensorRT a refit with other weights is undefined behavior",
            )
        )
    if problems:
        flags = ", ".join(problem.wanted for problem in problems)
        raise NotRefittableError(
            "The compilation settings of the module do not allow other weights.",
            problems=problems,
            hint=f"Recompile it with {flags}.",
        )


def is_stripped(settings: Any) -> bool:
    """Whether engines with these settings have no weights until the first full refit."""
    return bool(getattr(settings, "strip_engine_weights", False))


def settings_text(settings: Any) -> dict[str, str]:
    """The settings that partitioning and slot names depend on, as text, for fingerprints."""
    texts = _texts(settings)
    return {name: text for name, text in texts.items() if name not in _IRRELEVANT_FIELDS}


def _texts(settings: Any) -> dict[str, str]:
    return {name: _text(value) for name, value in sorted(vars(settings).items())}


def _text(value: Any) -> str:
    # a set has no order of its own, and equal settings must have equal fingerprints
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_text(one) for one in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(one) for one in value) + "]"
    if isinstance(value, OpOverload):  # its own text lacks the namespace of torch
        return f"torch.ops.{value}"
    return str(value)


def _upstream_module(name: str) -> Any:
    upstream.torch_tensorrt()
    return importlib.import_module(f"torch_tensorrt.{name}")


def _settings_class() -> Any:
    return _upstream_module("dynamo._settings").CompilationSettings


def _upstream_value(encoded: Any) -> Any:
    """Upstream's value for a value of the metadata; unknown ones stay as they are."""
    if isinstance(encoded, EnumValue):
        return _enum_member(encoded)
    if isinstance(encoded, DeviceValue):
        return _device(encoded)
    if isinstance(encoded, str) and encoded.startswith("torch.") and encoded.count(".") == 1:
        # only dtypes become values: any other attribute of torch stays text
        dtype = getattr(torch, encoded.removeprefix("torch."), encoded)
        return dtype if isinstance(dtype, torch.dtype) else encoded
    if isinstance(encoded, frozenset):
        return {_upstream_value(one) for one in encoded}
    return encoded


def _enum_member(encoded: EnumValue) -> Any:
    enum = getattr(_upstream_module("_enums"), encoded.enum)
    try:
        return enum(encoded.value)
    except Exception:  # noqa: BLE001 - upstream's enums raise any error
        # ``matches_type`` refuses this, so the error lists it with all other problems
        return encoded


def _device(encoded: DeviceValue) -> Any:
    cls = upstream.torch_tensorrt().Device
    # the constructor takes a specification, not the pickled fields
    device = cls.__new__(cls)
    kinds = {"gpu_id": int, "dla_core": int, "allow_gpu_fallback": bool}
    for name, value in encoded.fields:
        real = _upstream_value(value)
        matches = type(real) is kinds[name] if name in kinds else _is_device_type(name, real)
        if not matches:
            return encoded
        setattr(device, name, real)
    return device


def _is_device_type(name: str, value: Any) -> bool:
    kind = _upstream_module("_enums").DeviceType
    return name == "device_type" and isinstance(value, kind)


def matches_type(value: Any, wanted: Any) -> bool:
    """Whether a value has the type that a field of upstream's dataclass declares."""
    origin = typing.get_origin(wanted)
    if origin in {typing.Union, types.UnionType}:
        return any(matches_type(value, one) for one in typing.get_args(wanted))
    # upstream declares collections of ops and dtypes; in metadata ops are names
    if origin is not None and issubclass(origin, collections.abc.Collection):
        several = isinstance(value, (set, frozenset, list, tuple))
        return several and all(isinstance(one, str) or _is_enum(one) for one in value)
    return isinstance(wanted, type) and _is_instance(value, wanted)


def _is_instance(value: Any, wanted: type) -> bool:
    # type, not isinstance: a bool is an int in Python, but not in a setting
    if wanted is float:
        return type(value) in {int, float}
    if wanted in {bool, int, str}:
        return type(value) is wanted
    return isinstance(value, wanted) or (_is_dtype(wanted) and isinstance(value, torch.dtype))


def _is_enum(value: Any) -> bool:
    return isinstance(value, _upstream_module("_enums").dtype)


def _is_dtype(wanted: type) -> bool:
    return wanted is _upstream_module("_enums").dtype


# -- options of the user -------------------------------------------------------------------------

_RESERVED = {
    "immutable_weights": "a network takes new weights before it is built",
    "refit_identical_engine_weights": "a network takes new weights before it is built",
    "strip_engine_weights": "engines are built with their weights",
    "device": "planning runs no engine",
    "dryrun": "a dry run builds no engine",
    "enable_cross_compile_for_windows": "this backend does not support it",
    "cache_built_engines": "a refit replaces the engine cache",
    "reuse_cached_engines": "a refit replaces the engine cache",
}
"""Fields that a user cannot set as options, with the reason."""

IMPORTS = "imports"
"""Option of refitkit: modules to import in sessions, because they register ops or converters."""

_PATH_OPTIONS = frozenset({"timing_cache_path", "runtime_cache_path", "engine_cache_dir"})
"""Options that name files on the machine where they were set."""

_PACKAGES = ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON data, with ops and dtypes by name.

    Raises:
        ConfigError: Options have values of other types. Names all of them.
    """
    done: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in options.items():
        try:
            done[name] = _plain_value(value)
        except (TypeError, AttributeError, RuntimeError):
            problems.append(Problem(name, "type", type(value).__name__))
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)
    return done


def _plain_value(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        # the order of such options has no effect, so equal options get equal plan keys
        return sorted(map(_plain_value, value), key=str)
    if isinstance(value, OpOverload | OpOverloadPacket | BuiltinFunctionType):
        return _get_qualified_name(value)
    raise TypeError(value)


def options_from_file(
    options: Mapping[str, Any], file: str, may_import: Callable[[str], bool]
) -> dict[str, Any]:
    """Options of a file, without those that a file must not set.

    Paths of another machine are removed. Modules in ``imports`` are allowed only if an installed
    plugin contains them or this process has already imported them, so that the author of a file
    cannot choose code to run.

    Args:
        options: Options as the file stores them.
        file: Name of the file, for error messages.
        may_import: ``Tools.may_import``.

    Raises:
        UnsupportedTargetError: The options name other modules. Lists them.
    """
    names = options.get(IMPORTS, [])
    listed = names if isinstance(names, list) else [names]
    problems = [
        Problem(str(name), "neither of an installed plugin nor imported")
        if isinstance(name, str)
        else Problem(repr(name), "no name of a module")
        for name in listed
        if not isinstance(name, str) or not (name in sys.modules or may_import(name))
    ]
    if problems:
        raise UnsupportedTargetError(
            f"{file!r} needs modules that register ops or converters.",
            problems=problems,
            hint="Install the plugins that contain them; a plugin that is switched off does not "
            "count. A file cannot import other modules: if you trust these, import them first.",
        )
    return {name: value for name, value in options.items() if name not in _PATH_OPTIONS}


def settings_from_options(options: Mapping[str, Any]) -> Any:
    """Compilation settings for a network that is built without a GPU.

    Args:
        options: Result of ``plain_options``, without ``imports``.

    Raises:
        ConfigError: Options are unknown, reserved, or have another type. Names all of them.
    """
    import torch_tensorrt  # noqa: PLC0415 - takes seconds to import
    from torch_tensorrt.dynamo import CompilationSettings  # noqa: PLC0415

    fields = {field.name: field.type for field in dataclasses.fields(CompilationSettings)}
    given = {name: _typed_value(value) for name, value in options.items()}
    problems = [
        Problem(name, "reserved by the backend", hint=why)
        for name, why in _RESERVED.items()
        if name in options
    ]
    problems += unknown_options(options.keys() - _RESERVED.keys(), fields)
    problems += [
        Problem(name, "type", repr(value), str(fields[name]))
        for name, value in given.items()
        if name in fields and name not in _RESERVED and not matches_type(value, fields[name])
    ]
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)
    # a refit sets weights in the network and builds again, so the engine itself is never refitted
    return CompilationSettings(
        **given, immutable_weights=True, device=torch_tensorrt.Device("cuda:0")
    )


def unknown_options(options: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    """A problem for each option that does not exist, sorted by name."""
    for name in sorted(set(options) - set(known)):
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        yield Problem(name, "no such option", hint=hint)


def _typed_value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return set(value) if isinstance(value, list) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that engines depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# -- keys of the plan cache ----------------------------------------------------------------------

_REGISTRY = "torch_tensorrt.dynamo.conversion._ConverterRegistry"
_UPSTREAM_PREFIXES = ("torch_tensorrt.", "modelopt.")


def key_of_options(options: Mapping[str, Any]) -> PlanKey | None:
    """The cache key of a plan that a session makes.

    Args:
        options: The user's options.

    Returns:
        The key; None if sessions import the user's modules, which a key cannot describe.

    Raises:
        ConfigError: An option cannot be written as JSON.
    """
    chosen = plain_options(options)
    # the text of the key does not contain the code of the modules
    if chosen.get(IMPORTS):
        return None
    return _plan_key(json.dumps(chosen, sort_keys=True), "cpu", None)


def key_of_settings(settings: Mapping[str, str]) -> PlanKey | None:
    """The cache key of a plan that is made in this process.

    Args:
        settings: Result of ``settings_text`` for the target.

    Returns:
        The key; None if converters of the user are registered, which a key cannot describe.
    """
    if any(not name.startswith(_UPSTREAM_PREFIXES) for name in _converter_modules()):
        return None
    return _plan_key(json.dumps(dict(settings), sort_keys=True), "cuda", settings)


def _plan_key(text: str, device: str, settings: Mapping[str, str] | None) -> PlanKey:
    # weight names differ between CPU and GPU, see ``recording``
    where = f"{platform.system()} {platform.machine()} {device}"
    return PlanKey(text=text, versions=versions(), platform=where, settings=settings)


def _converter_modules() -> Iterator[str]:
    """Modules of all registered converters, each with a dot at the end.

    Source: ``DYNAMO_ATEN_CONVERTERS`` in ``dynamo/conversion/_ConverterRegistry.py``, 2.11 to 2.14.
    """
    # without the registry torch_tensorrt was not imported, so there are no converters
    registry = sys.modules.get(_REGISTRY)
    for found in getattr(registry, "DYNAMO_ATEN_CONVERTERS", {}).values():
        for one in found:
            yield f"{one.converter_implementation.__module__}."
