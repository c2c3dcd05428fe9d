"""Which inductor options users may set, and which refits rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor.container import can_fill
from refitkit.errors import ConfigError, NotRefittableError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUIRED: dict[str, Any] = {
    # without it small constants are inlined, and a refit of them is silently lost
    "always_keep_tensor_constants": True,
    # names of weights are lost with it
    "freezing": False,
    # every expression of weights with one element is replaced by its value of compile time
    "joint_graph_constant_folding": False,
    # values folded from weights would go stale in the buffer that refits write to
    "aot_inductor.use_runtime_constant_folding": False,
}
"""Values that a refittable engine needs. Setting them otherwise is refused."""

OURS = frozenset({"aot_inductor.package", "aot_inductor.output_path"})
"""Options that this backend sets for itself."""

WEIGHTS_BESIDE: dict[str, Any] = {"aot_inductor.package_constants_on_disk_format": "binary_blob"}
"""Keeps the weights out of the shared library: a saved file then holds them once.

Where torch cannot do that, the library keeps those of its compilation as dead freight.
"""


def merged(options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options together with those that refits rely on.

    Args:
        options: Names and values of ``torch._inductor.config``.

    Raises:
        ConfigError: Options that do not exist, or that this backend sets; names all of them.
        NotRefittableError: Options that would make the engine unfit for refits; names all of them.
    """
    known = _known()
    unknown = [
        Problem(name, "no such option of torch._inductor.config")
        for name in options
        if name not in known
    ]
    unknown += [Problem(name, "set by refitkit") for name in sorted(OURS & options.keys())]
    if unknown:
        raise ConfigError("AOTInductor cannot be given these options.", problems=unknown)
    known_required = {name: value for name, value in REQUIRED.items() if name in known}
    unfit = [
        Problem(name, "makes the engine unfit for refits", repr(options[name]), repr(value))
        for name, value in known_required.items()
        if name in options and options[name] != value
    ]
    if unfit:
        raise NotRefittableError("An engine compiled so could not be refitted.", problems=unfit)
    beside = WEIGHTS_BESIDE if can_fill() and WEIGHTS_BESIDE.keys() <= known else {}
    return {**beside, **options, **known_required}


def _known() -> frozenset[str]:
    from torch._inductor import config  # noqa: PLC0415 - slow to import

    return frozenset(config.get_config_copy())
