"""What a float checkpoint has of a weight that torchao quantizes, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import Problem, WeightMismatchError
from refitkit.protocols import Made, WeightGroup

from refitkit_quant.given import info_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from refitkit_quant.given import Given
    from refitkit_quant.scheme import TorchaoWeight

_ON_TORN = "the parts of a quantized weight move together: pass all, or the float weight"
_ON_TWICE = "pass one of them"


def offered(weight: TorchaoWeight, given: Given, versions: Mapping[str, str]) -> list[WeightGroup]:
    """A group, if the source has the weight in float; none, if it has its parts or nothing.

    Raises:
        WeightMismatchError: What it has cannot be used; lists all of it.
        ConfigError: torchao is not installed, or is another version than the scheme is of.
    """
    name = _name_in(weight, given)
    problems = list(_problems(weight, name, given))
    if problems:
        raise WeightMismatchError("A weight does not fit its scheme.", problems=problems)
    if name is None or weight.parts[0].name in given.names:
        return []
    from refitkit_quant.torchao_rules.installed import require_version

    require_version(versions)
    return [_group(weight, name, given)]


def _name_in(weight: TorchaoWeight, given: Given) -> str | None:
    """Under which name the source has the float weight."""
    return next((n for n in (weight.weight.name, *weight.also) if n in given.names), None)


def _problems(weight: TorchaoWeight, name: str | None, given: Given) -> Iterator[Problem]:
    parts = [part.name for part in weight.parts]
    present = [part for part in parts if part in given.names]
    lacking = ", ".join(part for part in parts if part not in given.names)
    if name == weight.weight.name and present:
        yield Problem(name, "given twice", wanted=", ".join(present), hint=_ON_TWICE)
    elif present and lacking:
        yield Problem(", ".join(present), "part without the others", "", lacking, _ON_TORN)
    elif name is not None and not present:
        yield from given.misfits(weight.weight, name)
    elif name is None and not present and not given.partial:
        yield Problem(weight.weight.name, "missing", wanted=str(weight.weight), hint=_also(weight))


def _also(weight: TorchaoWeight) -> str:
    others = f", or its other names {weight.also}" if weight.also else ""
    return f"pass it{others}; to leave it as it is: partial=True"


def _group(weight: TorchaoWeight, name: str, given: Given) -> WeightGroup:
    gives = {part.name: info_of(part) for part in weight.parts}
    kept = given.is_read(name)  # a tied weight that the program also reads as it is
    if kept:
        gives[name] = given.info(name)

    def look() -> Iterable[Problem]:
        return given.not_finite(name)

    def make() -> Made:
        from refitkit_quant.torchao_rules.quantizing import parts_of, quantized

        given.require(look)
        value = given.read(name)
        tensor = quantized(weight.rule, value)
        values: dict[str, torch.Tensor] = {
            part.name: made for part, made in zip(weight.parts, parts_of(tensor), strict=True)
        }
        if kept:
            values[name] = value
        measure = given.measure(weight.parts[0].name, value, tensor.dequantize())
        return Made(values, (measure,))

    given.watch(look)
    return WeightGroup((name,), gives, make)
