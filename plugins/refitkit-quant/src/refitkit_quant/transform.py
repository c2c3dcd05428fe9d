"""The transform that makes the entries of a quantized program from a float checkpoint.

The rules for torchao and ModelOpt are in two packages of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem, WeightMismatchError

from refitkit_quant import modelopt_rules, torchao_rules
from refitkit_quant.scheme import WHERE, TorchaoWeight
from refitkit_quant.source import TransformSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.model import Leaf
    from refitkit.protocols import TransformRequest, WeightGroup

    from refitkit_quant.scheme import QuantizedWeight, Scheme

_ON_MISFIT = (
    "Read the scheme from the model that was exported: refitkit_quant.scheme_of(model). For "
    "torchao, call torchao.utils.unwrap_tensor_subclass(model) before torch.export.export."
)


class QuantTransform:
    """A weight transform that quantizes by a scheme, each weight together with its scale."""

    name = "quant"
    priority = 50  # after transforms that rename, pack and cast weights

    def __init__(self, scheme: Scheme, error_limit: float) -> None:
        """Set the scheme.

        Args:
            scheme: Scheme of the model.
            error_limit: Largest error that passes, relative to a weight's largest absolute element.
        """
        self._scheme, self._limit = scheme, error_limit

    def groups(self, request: TransformRequest) -> Iterable[WeightGroup]:
        """One group for each quantized weight that the source has in another form.

        Raises:
            ConfigError: The scheme and the program differ; lists every difference.
            WeightMismatchError: The source has a scale without its weight, or a weight that differs
                from the scheme; lists every problem.
        """
        leaves = {leaf.fqn: leaf for leaf in request.plan.data.leaves}
        # Check the scheme first: with the wrong scheme, problems of the weights would mislead.
        misfits = list(self._misfits(leaves))
        if misfits:
            message = "The quantization scheme is not of this program."
            raise ConfigError(message, problems=misfits, hint=_ON_MISFIT)
        source = TransformSource(
            request.source, leaves.keys(), self._limit, partial=request.partial
        )
        groups: list[WeightGroup] = []
        problems: list[Problem] = []
        for weight in self._scheme.weights:
            # Collect all problems, so that one error lists them.
            try:
                groups += self._groups_of(weight, source)
            except WeightMismatchError as exc:
                problems += exc.problems
        if problems:
            message = f"{request.source.description} does not fit the quantization scheme."
            raise WeightMismatchError(message, problems=problems)
        return groups

    def _groups_of(self, weight: QuantizedWeight, source: TransformSource) -> list[WeightGroup]:
        if isinstance(weight, TorchaoWeight):
            return torchao_rules.weight_groups(weight, source, self._scheme.versions)
        return modelopt_rules.weight_groups(weight, source)

    def _misfits(self, leaves: Mapping[str, Leaf]) -> Iterator[Problem]:
        """Differences between the scheme and the leaves of the program."""
        for weight in self._scheme.weights:
            for entry in weight.entries:
                leaf, where = leaves.get(entry.name), f"{WHERE}.scheme: {entry.name}"
                if leaf is None:
                    yield Problem(where, "not in the program", wanted=str(entry))
                elif (leaf.dtype, leaf.shape) != (entry.dtype, entry.shape):
                    found = f"{leaf.dtype} {leaf.shape}"
                    yield Problem(where, "differs", f"{found} in the program", str(entry))
