"""Read from torchao's tensors how a model is quantized, and prove it with the original weights.

:func:`read` finds all quantized tensors. The fields of a tensor allow several rules; quantizing the
original weight with each of them shows which one gives the same bits. The second half of the module
lists the rules that the fields of a tensor allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from refitkit.errors import Problem
from refitkit.program.bits import same_bits
from refitkit.program.dtypes import dtype_name
from torch._functorch._aot_autograd import subclass_parametrization
from torch.nn.utils import parametrize
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.utils import TorchAOBaseTensor, UnwrapTensorSubclass

from refitkit_quant.scheme import Int8WeightOnly, IntxWeightOnly, TensorSpec, TorchaoWeight
from refitkit_quant.torchao_rules.quantizing import parts_of, quantized

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
class UnclearRule:
    """A weight that several rules may have made; the original or the config would decide.

    Attributes:
        problem: Problem that lists the rules.
    """

    problem: Problem


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor of a model.

    Attributes:
        fqn: FQN of the weight before quantization.
        tensor: Tensor of one of torchao's classes.
        unwrapped: Prefix of the names of the parts in an exported program.
    """

    fqn: str
    tensor: Any
    unwrapped: str


def find(model: torch.nn.Module) -> Iterator[QuantizedTensor]:
    """All tensors of a model that torchao quantized, unwrapped or not."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in _tensor_names(module):
            # getattr also returns parametrized tensors, which unwrap_tensor_subclass makes.
            value = getattr(module, name)
            if isinstance(value, TorchAOBaseTensor):
                lead = f"{prefix}." if prefix else ""
                path = f"{lead}parametrizations.{name}.original"
                yield QuantizedTensor(f"{lead}{name}", value, path)


def _tensor_names(module: torch.nn.Module) -> list[str]:
    names = list(module._parameters)  # noqa: SLF001 - without those of parametrizations
    if parametrize.is_parametrized(module):
        lists = module.parametrizations.items()  # type: ignore[union-attr, operator]
        names += [name for name, chain in lists if any(isinstance(p, _UNWRAPPING) for p in chain)]
    return names


def read(
    model: torch.nn.Module, originals: Originals | None, config: Any
) -> Iterator[TorchaoWeight | Problem | UnclearRule]:
    """How each weight of a model that torchao quantized was quantized.

    Args:
        model: Quantized model.
        originals: Float tensors by FQN; tied tensors under all their names. None if unknown.
        config: torchao's config; None if unknown.

    Yields:
        The weight; or a problem if it has no rule; or the rules between which ``originals`` or
        ``config`` would have to decide.
    """
    for found in find(model):
        why = why_unsupported(found.tensor)
        yield Problem(found.fqn, "no rule", why) if why else _read(found, originals, config)


def _read(
    found: QuantizedTensor, originals: Originals | None, config: Any
) -> TorchaoWeight | Problem | UnclearRule:
    tensor = found.tensor
    said = rule_of(config, tensor) if config is not None else None
    if config is not None and said is None:
        return Problem(found.fqn, "not by this config", type(tensor).__name__, repr(config))
    # A config names one rule. It is still proved if the originals are given.
    rules = [said] if said else candidates(tensor)
    if originals is None:
        fitting = rules
    elif found.fqn not in originals:
        return Problem(found.fqn, "not in the original")
    else:
        fitting = [rule for rule in rules if _gives(rule, originals[found.fqn], tensor)]
    if not fitting:
        hint = "pass the weights that it was made from, and use the torchao that quantized it"
        return Problem(found.fqn, "not made from the original", hint=hint)
    if len(fitting) > 1:
        texts = " or ".join(sorted(_text(rule) for rule in fitting))
        return UnclearRule(Problem(found.fqn, "several rules", texts, "one", _ON_AMBIGUOUS))
    return _weight(found, fitting[0], originals or {})


def _gives(rule: Rule, original: torch.Tensor, tensor: Any) -> bool:
    """Whether a rule makes the bits of a quantized tensor from the original weight."""
    # Otherwise torchao would raise, or quantize in another dtype.
    if original.shape != tensor.shape or original.dtype != tensor.dtype:
        return False
    made, had = parts_of(quantized(rule, original)), parts_of(tensor)
    return len(made) == len(had) and all(map(same_bits, made, had))


def _weight(found: QuantizedTensor, rule: Rule, originals: Originals) -> TorchaoWeight | Problem:
    tensor, parts = found.tensor, parts_of(found.tensor)
    # The dtypes and shapes of the parts follow from the rule. Check them with a trial.
    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    trial = parts_of(quantized(rule, zeros))
    if [_dtype_and_shape(part) for part in trial] != [_dtype_and_shape(part) for part in parts]:
        found_text = ", ".join(_dtype_and_shape(part) for part in parts)
        wanted = ", ".join(_dtype_and_shape(part) for part in trial)
        return Problem(found.fqn, "other parts than its rule gives", found_text, wanted)
    # unwrap_tensor_subclass numbers the parts, unless there is only one.
    numbers = range(len(parts))
    names = [f"{found.unwrapped}{i}" for i in numbers] if len(parts) > 1 else [found.unwrapped]
    return TorchaoWeight(
        weight=TensorSpec(
            name=found.fqn, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape)
        ),
        also=tuple(_tied_names(found.fqn, originals)),
        rule=rule,
        parts=tuple(
            TensorSpec(name=name, dtype=dtype_name(part.dtype), shape=tuple(part.shape))
            for name, part in zip(names, parts, strict=True)
        ),
    )


def _tied_names(fqn: str, originals: Originals) -> Iterator[str]:
    """Other names of an original tensor."""
    # Tied names share memory in the originals; quantization breaks the tie.
    mine = originals.get(fqn)
    for name, other in originals.items():
        if mine is not None and name != fqn and _memory_key(other) == _memory_key(mine):
            yield name


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _dtype_and_shape(part: torch.Tensor) -> str:
    return f"{dtype_name(part.dtype)} {tuple(part.shape)}"


def _text(rule: Rule) -> str:
    fields = rule.model_dump(exclude_none=True, exclude={"kind"})
    return f"{rule.kind}({', '.join(f'{key}={value}' for key, value in fields.items())})"


# -- the rules that the fields of a tensor allow --------------------------------------------------

MappingName: TypeAlias = Literal["symmetric", "asymmetric", "symmetric_no_clipping_err"]
QParamsAlgorithm: TypeAlias = Literal["affine", "hqq_scale_only"]

_MAPPINGS: tuple[MappingName, ...] = ("symmetric", "symmetric_no_clipping_err", "asymmetric")
_SUPPORTED = "only Int8Tensor of weight-only quantization and IntxUnpackedToInt8Tensor have a rule"


def why_unsupported(tensor: Any) -> str:
    """Why this plugin has no rule for a quantized tensor; empty if it has one."""
    # type() instead of isinstance: a subclass may quantize in another way.
    if type(tensor) is Int8Tensor:
        static = (tensor.act_quant_scale, tensor.act_quant_zero_point, tensor.act_pre_scale)
        if tensor.act_quant_kwargs is not None or any(part is not None for part in static):
            return "its activations are quantized or scaled as well"
        # Int8WeightOnlyConfig sets neither a reduced range nor zero points.
        if tensor.reduce_range or _has_zero_points(tensor):
            return "Int8WeightOnlyConfig does not make an Int8Tensor like this"
        return "" if _granularity(tensor) else f"blocks of {tuple(tensor.block_size)}"
    if type(tensor) is IntxUnpackedToInt8Tensor:
        if tensor.activation_quantization is not None:
            return "its activations are quantized as well"
        return "" if _is_by_rows(tensor) else f"blocks of {tuple(tensor.block_size)}"
    return f"a {type(tensor).__name__}; {_SUPPORTED}"


def candidates(tensor: Any) -> list[Rule]:
    """All rules that the fields and zero points of a tensor allow."""
    if type(tensor) is Int8Tensor:
        return [_int8(tensor)]
    has_zero_points = _has_zero_points(tensor)
    rules: list[Rule] = [
        _intx(tensor, mapping, "affine")
        for mapping in _MAPPINGS
        if mapping == "asymmetric" or not has_zero_points
    ]
    if not has_zero_points and tensor.dim() == 2:  # noqa: PLR2004 - hqq is for matrices only
        rules.append(_intx(tensor, "symmetric", "hqq_scale_only"))
    return rules


def rule_of(config: Any, tensor: Any) -> Rule | None:
    """The rule of one of torchao's configs; None if the tensor was not made by it."""
    rule: Rule
    if isinstance(config, Int8WeightOnlyConfig) and type(tensor) is Int8Tensor:
        rule = _int8(tensor)
        given = config.granularity
        named = {PerRow: "row", PerTensor: "tensor", PerGroup: "group"}.get(type(given))
        size = getattr(given, "group_size", None)
        same = named == rule.granularity and size == rule.group_size
        # A group as long as the row is the same as one scale for each row.
        whole_row = isinstance(given, PerGroup) and size == tensor.shape[-1]
        return rule if same or (whole_row and rule.granularity == "row") else None
    if isinstance(config, IntxWeightOnlyConfig) and type(tensor) is IntxUnpackedToInt8Tensor:
        mapping = cast("MappingName", config.mapping_type.name.lower())
        algorithm = cast("QParamsAlgorithm", config.intx_choose_qparams_algorithm.value)
        rule = _intx(tensor, mapping, algorithm)
        size = getattr(config.granularity, "group_size", _row(tensor))
        bits = int(dtype_name(config.weight_dtype).removeprefix("int"))
        found = (rule.bits, rule.group_size or _row(tensor))
        return rule if found == (bits, size) else None
    return None


def _int8(tensor: Any) -> Int8WeightOnly:
    granularity = cast("Literal['row', 'group', 'tensor']", _granularity(tensor))
    size = tensor.block_size[-1] if granularity == "group" else None
    return Int8WeightOnly(granularity=granularity, group_size=size)


def _granularity(tensor: Any) -> str:
    """The unit that has a scale: row, tensor or group; empty if no rule has this unit."""
    blocks, shape = tuple(tensor.block_size), tuple(tensor.shape)
    if blocks == (*(1,) * (len(shape) - 1), shape[-1]):
        return "row"
    if blocks == shape:
        return "tensor"
    return "group" if set(blocks[:-1]) <= {1} else ""


def _intx(tensor: Any, mapping: MappingName, algorithm: QParamsAlgorithm) -> IntxWeightOnly:
    size, own = tensor.block_size[1], tensor.scale.dtype != tensor.dtype
    return IntxWeightOnly(
        bits=int(dtype_name(tensor.target_dtype).removeprefix("int")),
        group_size=None if size == _row(tensor) else size,
        mapping=mapping,
        algorithm=algorithm,
        scale_dtype=dtype_name(tensor.scale.dtype) if own else None,
    )


def _is_by_rows(tensor: Any) -> bool:
    """Whether blocks are parts of rows: of a matrix, or along input channels of a convolution."""
    blocks = tuple(tensor.block_size)
    return len(blocks) in {2, 4} and blocks[0] == 1 and set(blocks[2:]) <= {1}


def _row(tensor: Any) -> int:
    return int(tensor.shape[1])


def _has_zero_points(tensor: Any) -> bool:
    points = tensor.zero_point
    return points is not None and bool((points != 0).any())
