"""Compilation settings: from plain data, agreement of all engines, what they forbid."""

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
    from collections.abc import Collection, Iterable, Iterator, Mapping


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
"""Fields of 2.11 to 2.13 that 2.14 no longer has: it reads such settings without them."""

_WITHOUT_EFFECT = frozenset(
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
"""Fields that change neither how a model is cut into engines nor the names of slots."""


def settings_from(fields: Mapping[str, Any], engine: str) -> Any:
    """The installed version's ``CompilationSettings`` with these fields.

    Fields that are absent get the installed version's defaults, as upstream's do.

    Args:
        fields: As :class:`~refitkit.builtin.torch_tensorrt.metadata.Metadata` has them.
        engine: Name of the engine, for messages.

    Raises:
        UnsupportedTargetError: Fields are unknown, of another type, or there is no device.
    """
    cls = _settings_class()
    wanted = {one.name: one.type for one in dataclasses.fields(cls)}
    problems = []
    values = {}
    for name, encoded in fields.items():
        if name in _RETIRED and name not in wanted:
            continue
        if name not in wanted:
            problems.append(Problem(name, "unknown setting", repr(encoded)[:80]))
            continue
        value = _real(encoded)
        if not matches_type(value, wanted[name]):
            problems.append(Problem(name, "type", repr(encoded)[:80], str(wanted[name])))
        values[name] = value
    if "device" not in fields:
        problems.append(Problem("device", "missing"))
    if problems:
        raise UnsupportedTargetError(
            f"The compilation settings of the engine {engine!r} are not those of this version.",
            problems=problems,
            hint="Was it compiled with a newer Torch-TensorRT? Then install that one.",
        )
    try:
        return cls(**values)
    except Exception as exc:
        raise_if_resource(exc, f"Settings of the engine {engine!r} cannot be read")
        raise UnsupportedTargetError(
            f"torch_tensorrt refuses the settings of the engine {engine!r}: {exc}"
        ) from exc


def shared_settings(settings: Mapping[str, Any]) -> Any:
    """The settings that all engines share.

    Args:
        settings: Each engine's ``CompilationSettings``, by the engine's name; at least one.

    Raises:
        UnsupportedTargetError: They differ; lists every field of every engine that does.
    """
    (first, wanted), *others = settings.items()
    texts = {name: _all_text(one) for name, one in others}
    reference = _all_text(wanted)
    problems = [
        Problem(f"{name}: {key}", "differs", text.get(key, "nothing"), reference.get(key, "none"))
        for name, text in texts.items()
        for key in sorted(text.keys() | reference.keys())
        if text.get(key) != reference.get(key)
    ]
    if problems:
        raise UnsupportedTargetError(
            f"Engines of one module were compiled with settings other than those of {first!r}.",
            problems=problems,
            hint="Compile the whole model in one go.",
        )
    return wanted


def check_refittable(settings: Any, engine: str) -> None:
    """Check that engines with these settings can take new weights.

    Engines that were stripped of their weights (``strip_engine_weights``) can: they answer with
    zeros until the first full refit.

    Raises:
        NotRefittableError: They cannot; names the flags to set.
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
                "TensorRT does not define what refitting it with other weights does",
            )
        )
    if problems:
        flags = ", ".join(problem.wanted for problem in problems)
        raise NotRefittableError(
            "The module was compiled so that it cannot take other weights.",
            problems=problems,
            hint=f"Recompile it with {flags}.",
        )


def is_stripped(settings: Any) -> bool:
    """Whether engines with these settings hold no weights until they are refitted in full."""
    return bool(getattr(settings, "strip_engine_weights", False))


def settings_text(settings: Any) -> dict[str, str]:
    """The settings that decide how a model is cut and how slots are called, for fingerprints."""
    texts = _all_text(settings)
    return {name: text for name, text in texts.items() if name not in _WITHOUT_EFFECT}


def _all_text(settings: Any) -> dict[str, str]:
    return {name: _text(value) for name, value in sorted(vars(settings).items())}


def _text(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_text(one) for one in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(one) for one in value) + "]"
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    return str(value)


def _part(name: str) -> Any:
    upstream.torch_tensorrt()
    return importlib.import_module(f"torch_tensorrt.{name}")


def _settings_class() -> Any:
    return _part("dynamo._settings").CompilationSettings


def _real(encoded: Any) -> Any:
    """What encoded data stands for."""
    if isinstance(encoded, EnumValue):
        return _enum_member(encoded)
    if isinstance(encoded, DeviceValue):
        return _device(encoded)
    if isinstance(encoded, str) and encoded.startswith("torch.") and encoded.count(".") == 1:
        dtype = getattr(torch, encoded.removeprefix("torch."), encoded)
        return dtype if isinstance(dtype, torch.dtype) else encoded
    if isinstance(encoded, frozenset):
        return {_real(one) for one in encoded}
    return encoded


def _enum_member(encoded: EnumValue) -> Any:
    enum = getattr(_part("_enums"), encoded.enum)
    try:
        return enum(encoded.value)
    except Exception:  # noqa: BLE001 - upstream's enums raise what their look-ups raise
        return encoded


def _device(encoded: DeviceValue) -> Any:
    cls = upstream.torch_tensorrt().Device
    device = cls.__new__(cls)
    kinds = {"gpu_id": int, "dla_core": int, "allow_gpu_fallback": bool}
    for name, value in encoded.fields:
        real = _real(value)
        matches = type(real) is kinds[name] if name in kinds else _is_device_type(name, real)
        if not matches:
            return encoded
        setattr(device, name, real)
    return device


def _is_device_type(name: str, value: Any) -> bool:
    kind = _part("_enums").DeviceType
    return name == "device_type" and isinstance(value, kind)


def matches_type(value: Any, wanted: Any) -> bool:
    """Whether a value is of the type that upstream's dataclass declares."""
    origin = typing.get_origin(wanted)
    if origin in {typing.Union, types.UnionType}:
        return any(matches_type(value, one) for one in typing.get_args(wanted))
    if origin is not None and issubclass(origin, collections.abc.Collection):
        several = isinstance(value, (set, frozenset, list, tuple))
        return several and all(isinstance(one, str) or _is_enum(one) for one in value)
    return isinstance(wanted, type) and _is_one(value, wanted)


def _is_one(value: Any, wanted: type) -> bool:
    if wanted is float:
        return type(value) in {int, float}
    if wanted in {bool, int, str}:
        return type(value) is wanted
    return isinstance(value, wanted) or (_is_dtype(wanted) and isinstance(value, torch.dtype))


def _is_enum(value: Any) -> bool:
    return isinstance(value, _part("_enums").dtype)


def _is_dtype(wanted: type) -> bool:
    return wanted is _part("_enums").dtype


# MERGED options: The user's options as ``torch_tensorrt.dynamo.CompilationSettings``.

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


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
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


def options_from_file(options: Mapping[str, Any], file: str) -> dict[str, Any]:
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
        options: What ``plain_options`` gave.

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
    problems += unknown_options(options.keys() - _OURS.keys(), fields)
    problems += [
        Problem(name, "type", repr(value), str(fields[name]))
        for name, value in given.items()
        if name in fields and name not in _OURS and not matches_type(value, fields[name])
    ]
    if problems:
        raise ConfigError("These options cannot be used.", problems=problems)
    return CompilationSettings(
        **given, immutable_weights=True, device=torch_tensorrt.Device("cuda:0")
    )


def unknown_options(options: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
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


# MERGED plan_key: What plans of these backends depend on, before they are made: keys of the plan
# cache.

_REGISTRY = "torch_tensorrt.dynamo.conversion._ConverterRegistry"
_OF_UPSTREAM = ("torch_tensorrt.", "modelopt.")


def key_of_options(options: Mapping[str, Any]) -> PlanKey | None:
    """Of a plan that a session makes; None where sessions import modules of the user's.

    Raises:
        ConfigError: An option has no text.
    """
    chosen = plain_options(options)
    if chosen.get(IMPORTS):
        return None
    return _key(json.dumps(chosen, sort_keys=True), "cpu", None)


def key_of_settings(settings: Mapping[str, str]) -> PlanKey | None:
    """Of a plan that is made in this process; None where converters of the user's may serve.

    Args:
        settings: Settings of the target on which slots depend, as text.
    """
    if any(not name.startswith(_OF_UPSTREAM) for name in _converters()):
        return None
    return _key(json.dumps(dict(settings), sort_keys=True), "cuda", settings)


def _key(text: str, device: str, settings: Mapping[str, str] | None) -> PlanKey:
    where = f"{platform.system()} {platform.machine()} {device}"
    return PlanKey(text=text, versions=versions(), platform=where, settings=settings)


def _converters() -> Iterator[str]:
    """Modules of all registered converters.

    ``DYNAMO_ATEN_CONVERTERS`` in ``dynamo/conversion/_ConverterRegistry.py``, 2.11 to 2.14.
    """
    registry = sys.modules.get(_REGISTRY)
    for found in getattr(registry, "DYNAMO_ATEN_CONVERTERS", {}).values():
        for one in found:
            yield f"{one.converter_implementation.__module__}."
