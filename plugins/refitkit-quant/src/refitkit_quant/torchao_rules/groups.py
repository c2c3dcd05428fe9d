"""The groups for weights that torchao quantizes, and the check of torchao's version."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem, WeightMismatchError
from refitkit.protocols import Made, WeightGroup

from refitkit_quant.scheme import WHERE
from refitkit_quant.source import info_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from refitkit_quant.scheme import TorchaoWeight
    from refitkit_quant.source import TransformSource


_ON_INCOMPLETE = "pass all parts of the quantized weight, or the float weight"
_ON_TWICE = "pass one of them"


def weight_groups(
    weight: TorchaoWeight, source: TransformSource, versions: Mapping[str, str]
) -> list[WeightGroup]:
    """One group if the source has the weight in float; none if it has the parts, or nothing.

    Raises:
        WeightMismatchError: The entries of the source cannot be used; lists every problem.
        ConfigError: torchao is not installed, or has another minor version than the scheme.
    """
    name = _name_in(weight, source)
    problems = list(_problems(weight, name, source))
    if problems:
        raise WeightMismatchError("A weight does not fit its scheme.", problems=problems)
    # Parts in the source pass through unchanged, so they need no torchao.
    if name is None or weight.parts[0].name in source.names:
        return []

    require_version(versions)
    return [_group(weight, name, source)]


def _name_in(weight: TorchaoWeight, source: TransformSource) -> str | None:
    """The name of the float weight in the source; None if it has none."""
    return next((n for n in (weight.weight.name, *weight.also) if n in source.names), None)


def _problems(
    weight: TorchaoWeight, name: str | None, source: TransformSource
) -> Iterator[Problem]:
    parts = [part.name for part in weight.parts]
    present = [part for part in parts if part in source.names]
    lacking = ", ".join(part for part in parts if part not in source.names)
    # Under another tied name, the float weight and the parts can be different tensors.
    if name == weight.weight.name and present:
        yield Problem(name, "given twice", wanted=", ".join(present), hint=_ON_TWICE)
    elif present and lacking:
        yield Problem(", ".join(present), "part without the others", "", lacking, _ON_INCOMPLETE)
    elif name is not None and not present:
        yield from source.misfits(weight.weight, name)
    elif name is None and not present and not source.partial:
        yield Problem(weight.weight.name, "missing", wanted=str(weight.weight), hint=_also(weight))


def _also(weight: TorchaoWeight) -> str:
    others = f", or its other names {weight.also}" if weight.also else ""
    return f"pass it{others}; or keep its value with partial=True"


def _group(weight: TorchaoWeight, name: str, source: TransformSource) -> WeightGroup:
    gives = {part.name: info_of(part) for part in weight.parts}
    # The program may also read a tied weight unchanged. Then the group passes it on.
    kept = source.is_read(name)
    if kept:
        gives[name] = source.info(name)

    def check() -> Iterable[Problem]:
        return source.not_finite(name)

    def make() -> Made:
        # torchao is optional and slow to import: only a weight that has to be quantized needs it.
        from refitkit_quant.torchao_rules.quantizing import parts_of, quantized

        source.require_valid(check)
        value = source.read(name)
        tensor = quantized(weight.rule, value)
        values: dict[str, torch.Tensor] = {
            part.name: made for part, made in zip(weight.parts, parts_of(tensor), strict=True)
        }
        if kept:
            values[name] = value
        measure = source.measure(weight.parts[0].name, value, tensor.dequantize())
        return Made(values, (measure,))

    # make() may never run for this group, but its values belong to the list of problems.
    source.add_check(check)
    return WeightGroup((name,), gives, make)


# -- the version of torchao: another one may round differently -----------------------------------

TORCHAO = "torchao"


@cache
def installed_version() -> str | None:
    """The version of torchao; None if it is not installed."""
    try:
        return version(TORCHAO)
    except PackageNotFoundError:
        return None


def require_version(versions: Mapping[str, str]) -> None:
    """Check that the installed torchao has the minor version that the scheme was read with.

    Args:
        versions: Versions in the scheme.

    Raises:
        ConfigError: torchao is not installed, or has another minor version.
    """
    found, wanted = installed_version(), versions.get(TORCHAO, "")
    if found is None:
        raise ConfigError(
            "torchao, which has to quantize the weights, is not installed.",
            hint="Install it: pip install 'refitkit-quant[torchao]'.",
        )
    # Patch releases do not change roundings; minor releases of torchao may.
    if _minor(found) != _minor(wanted):
        raise ConfigError(
            "The quantization scheme is of another torchao, which may round differently.",
            problems=[Problem(f"{WHERE}.scheme.versions.{TORCHAO}", "differs", found, wanted)],
            hint="Install that version, or read the scheme again with the installed one.",
        )


def _minor(text: str) -> list[str]:
    return text.split("+", maxsplit=1)[0].split(".")[:2]
