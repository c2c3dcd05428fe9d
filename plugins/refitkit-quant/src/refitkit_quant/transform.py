"""The transform that makes the entries of a quantized program from a float checkpoint.

The rules for torchao and ModelOpt are in two packages of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from refitkit.errors import ConfigError, Problem, WeightMismatchError
from refitkit.recipe.weak_cache import cached_per_object

from refitkit_quant import modelopt_rules, torchao_rules
from refitkit_quant.ops import register_ops
from refitkit_quant.scheme import PLUGIN, WHERE, Scheme, TorchaoWeight, problems_of
from refitkit_quant.source import TransformSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.model import Leaf
    from refitkit.protocols import Plan, TransformRequest, WeightGroup

    from refitkit_quant.scheme import QuantizedWeight

_ON_MISFIT = (
    "Read the scheme from the model that was exported: refitkit_quant.scheme_of(model). For "
    "torchao, call torchao.utils.unwrap_tensor_subclass(model) before torch.export.export."
)


class QuantTransform:
    """A weight transform that quantizes by a scheme, each weight together with its scale.

    The scheme of the settings is kept in each plan that is made with it, so later refits need no
    settings. A scheme in the settings comes first.
    """

    name = PLUGIN
    priority = 50  # after transforms that rename, pack and cast weights

    def __init__(self, scheme: Scheme | None, error_limit: float) -> None:
        """Set the scheme.

        Args:
            scheme: Scheme of the model; None: the plan's, if it has one.
            error_limit: Largest error that passes, relative to a weight's largest absolute element.
        """
        self._scheme, self._limit = scheme, error_limit

    def attach(self, _program: object, _plan: Plan) -> Any:
        """The scheme of the settings, as plain data; None without one."""
        return None if self._scheme is None else self._scheme.model_dump(mode="json")

    def _scheme_for(self, plan: Plan) -> Scheme | None:
        if self._scheme is None and PLUGIN in plan.data.attached:
            return attached_scheme(plan)
        return self._scheme

    def groups(self, request: TransformRequest) -> Iterable[WeightGroup]:
        """One group for each quantized weight that the source has in another form.

        Raises:
            ConfigError: The scheme and the program differ; lists every difference.
            WeightMismatchError: The source has a scale without its weight, or a weight that differs
                from the scheme; lists every problem.
        """
        scheme = self._scheme_for(request.plan)
        if scheme is None:
            return []
        leaves = {leaf.fqn: leaf for leaf in request.plan.data.leaves}
        # Check the scheme first: with the wrong scheme, problems of the weights would mislead.
        misfits = list(_misfits(scheme, leaves))
        if misfits:
            message = "The quantization scheme is not of this program."
            raise ConfigError(message, problems=misfits, hint=_ON_MISFIT)
        source = TransformSource(
            request.source, leaves.keys(), self._limit, partial=request.partial
        )
        groups: list[WeightGroup] = []
        problems: list[Problem] = []
        for weight in scheme.weights:
            # Collect all problems, so that one error lists them.
            try:
                groups += _groups_of(weight, source, scheme)
            except WeightMismatchError as exc:
                problems += exc.problems
        if problems:
            message = f"{request.source.description} does not fit the quantization scheme."
            raise WeightMismatchError(message, problems=problems)
        return groups


@cached_per_object
def attached_scheme(plan: Plan) -> Scheme:
    """The scheme that a plan keeps; registers the ops of its tools.

    Raises:
        ConfigError: It is not a scheme; lists every problem.
    """
    try:
        scheme = Scheme.model_validate(plan.data.attached[PLUGIN])
    except ValidationError as exc:
        message = "The quantization scheme that the plan keeps is invalid."
        raise ConfigError(message, problems=problems_of(exc)) from exc
    # the plan's program has these ops, and a verifier may run it
    register_ops(scheme)
    return scheme


def _groups_of(
    weight: QuantizedWeight, source: TransformSource, scheme: Scheme
) -> list[WeightGroup]:
    if isinstance(weight, TorchaoWeight):
        return torchao_rules.weight_groups(weight, source, scheme.versions)
    return modelopt_rules.weight_groups(weight, source)


def _misfits(scheme: Scheme, leaves: Mapping[str, Leaf]) -> Iterator[Problem]:
    """Differences between a scheme and the leaves of the program."""
    for weight in scheme.weights:
        for entry in weight.entries:
            leaf, where = leaves.get(entry.name), f"{WHERE}.scheme: {entry.name}"
            if leaf is None:
                yield Problem(where, "not in the program", wanted=str(entry))
            elif (leaf.dtype, leaf.shape) != (entry.dtype, entry.shape):
                found = f"{leaf.dtype} {leaf.shape}"
                yield Problem(where, "differs", f"{found} in the program", str(entry))
