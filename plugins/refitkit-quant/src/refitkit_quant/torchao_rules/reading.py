"""How torchao quantized a model, read off its tensors and proved on the original weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from refitkit.errors import Problem
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from torch._functorch._aot_autograd import subclass_parametrization
from torch.nn.utils import parametrize
from torchao.utils import TorchAOBaseTensor, UnwrapTensorSubclass

from refitkit_quant.scheme import Entry, TorchaoWeight
from refitkit_quant.torchao_rules.quantizing import parts_of, quantized
from refitkit_quant.torchao_rules.rules import candidates, refusal, rule_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit_quant.scheme import Rule

Originals: TypeAlias = Mapping[str, torch.Tensor]

_UNWRAPPING = (UnwrapTensorSubclass, subclass_parametrization.UnwrapTensorSubclass)
_ON_AMBIGUOUS = (
    "pass the float weights, scheme_of(model, original=...), or torchao's config, "
    "scheme_of(model, config=...)"
)


@dataclass(frozen=True)
class Unclear:
    """A weight that several rules may have made: the original or the config would tell which."""

    problem: Problem


@dataclass(frozen=True)
class Found:
    """A quantized tensor of a model.

    Attributes:
        fqn: Its name, as it was before quantization.
        tensor: The tensor, of a class of torchao's.
        unwrapped: Prefix of the names of its parts in an exported program.
    """

    fqn: str
    tensor: Any
    unwrapped: str


def find(model: torch.nn.Module) -> Iterator[Found]:
    """All tensors of a model that torchao quantized, unwrapped or not."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in _tensor_names(module):
            value = getattr(module, name)
            if isinstance(value, TorchAOBaseTensor):
                lead = f"{prefix}." if prefix else ""
                path = f"{lead}parametrizations.{name}.original"
                yield Found(f"{lead}{name}", value, path)


def _tensor_names(module: torch.nn.Module) -> list[str]:
    names = list(module._parameters)  # noqa: SLF001 - without what parametrizations hold
    if parametrize.is_parametrized(module):
        lists = module.parametrizations.items()  # type: ignore[union-attr, operator]
        names += [name for name, chain in lists if any(isinstance(p, _UNWRAPPING) for p in chain)]
    return names


def read(
    model: torch.nn.Module, originals: Originals | None, config: Any
) -> Iterator[TorchaoWeight | Problem | Unclear]:
    """Every weight that torchao quantized: how, or why there is no telling.

    Args:
        model: The quantized model.
        originals: Float tensors by FQN, those that are one under all names.
        config: torchao's config; None where nobody said.

    Yields:
        The weight; or why it has no rule; or between which rules ``originals`` or ``config``
        would have to decide.
    """
    for found in find(model):
        why = refusal(found.tensor)
        yield Problem(found.fqn, "no rule", why) if why else _read(found, originals, config)


def _read(
    found: Found, originals: Originals | None, config: Any
) -> TorchaoWeight | Problem | Unclear:
    tensor = found.tensor
    said = rule_of(config, tensor) if config is not None else None
    if config is not None and said is None:
        return Problem(found.fqn, "not by this config", type(tensor).__name__, repr(config))
    rules = [said] if said else candidates(tensor)
    if originals is None:
        fitting = rules
    elif found.fqn not in originals:
        return Problem(found.fqn, "not in the original")
    else:
        fitting = [rule for rule in rules if _gives(rule, originals[found.fqn], tensor)]
    if not fitting:
        hint = "were these its weights, and is this the torchao that quantized them?"
        return Problem(found.fqn, "not made from the original", hint=hint)
    if len(fitting) > 1:
        texts = " or ".join(sorted(_text(rule) for rule in fitting))
        return Unclear(Problem(found.fqn, "several rules", texts, "one", _ON_AMBIGUOUS))
    return _weight(found, fitting[0], originals or {})


def _gives(rule: Rule, original: torch.Tensor, tensor: Any) -> bool:
    """Whether a rule makes of the original weight the very bits that the model has."""
    if original.shape != tensor.shape or original.dtype != tensor.dtype:
        return False
    made, had = parts_of(quantized(rule, original)), parts_of(tensor)
    return len(made) == len(had) and all(map(same_bits, made, had))


def _weight(found: Found, rule: Rule, originals: Originals) -> TorchaoWeight | Problem:
    tensor, parts = found.tensor, parts_of(found.tensor)
    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    trial = parts_of(quantized(rule, zeros))
    if [_facts(part) for part in trial] != [_facts(part) for part in parts]:
        found_text = ", ".join(_facts(part) for part in parts)
        wanted = ", ".join(_facts(part) for part in trial)
        return Problem(found.fqn, "other parts than its rule gives", found_text, wanted)
    numbers = range(len(parts))
    names = [f"{found.unwrapped}{i}" for i in numbers] if len(parts) > 1 else [found.unwrapped]
    return TorchaoWeight(
        weight=Entry(name=found.fqn, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape)),
        also=tuple(_twins(found.fqn, originals)),
        rule=rule,
        parts=tuple(
            Entry(name=name, dtype=dtype_name(part.dtype), shape=tuple(part.shape))
            for name, part in zip(names, parts, strict=True)
        ),
    )


def _twins(fqn: str, originals: Originals) -> Iterator[str]:
    """Other names of the original tensor."""
    mine = originals.get(fqn)
    for name, other in originals.items():
        if mine is not None and name != fqn and _place(other) == _place(mine):
            yield name


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _facts(part: torch.Tensor) -> str:
    return f"{dtype_name(part.dtype)} {tuple(part.shape)}"


def _text(rule: Rule) -> str:
    told = rule.model_dump(exclude_none=True, exclude={"kind"})
    return f"{rule.kind}({', '.join(f'{key}={value}' for key, value in told.items())})"
