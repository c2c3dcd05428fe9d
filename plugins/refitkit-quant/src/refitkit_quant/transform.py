"""The transform: what a float checkpoint has becomes what a quantized program reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import ConfigError, Problem, WeightMismatchError

from refitkit_quant import modelopt_rules, torchao_rules
from refitkit_quant.given import Given
from refitkit_quant.scheme import TorchaoWeight
from refitkit_quant.settings import WHERE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit.model import Leaf
    from refitkit.protocols import TransformRequest, WeightGroup

    from refitkit_quant.scheme import QuantizedWeight, Scheme

_ON_MISFIT = (
    "Read the scheme off the very model that was exported: refitkit_quant.scheme_of(model). For "
    "torchao, call torchao.utils.unwrap_tensor_subclass(model) before torch.export.export."
)


class QuantTransform:
    """Quantizes weights as a scheme says; scales move with them."""

    name = "quant"
    priority = 50  # after names are changed, weights packed and dtypes cast

    def __init__(self, scheme: Scheme, error_limit: float) -> None:
        """Of one pipeline.

        Args:
            scheme: How each weight was quantized.
            error_limit: Largest error that passes, relative to a weight's largest element.
        """
        self._scheme, self._limit = scheme, error_limit

    def groups(self, request: TransformRequest) -> Iterable[WeightGroup]:
        """One group for each quantized weight that the source has in another form.

        Raises:
            ConfigError: The scheme is not that of the program; lists every difference.
            WeightMismatchError: A scale without its weight, or a weight that is not what the scheme
                says; lists all of them.
        """
        leaves = {leaf.fqn: leaf for leaf in request.plan.data.leaves}
        misfits = list(self._misfits(leaves))
        if misfits:
            message = "The scheme of quantization is not that of the program."
            raise ConfigError(message, problems=misfits, hint=_ON_MISFIT)
        given = Given(request.source, leaves.keys(), self._limit, partial=request.partial)
        groups: list[WeightGroup] = []
        problems: list[Problem] = []
        for weight in self._scheme.weights:
            try:
                groups += self._offered(weight, given)
            except WeightMismatchError as exc:
                problems += exc.problems
        if problems:
            message = f"{request.source.description} does not fit the scheme of quantization."
            raise WeightMismatchError(message, problems=problems)
        return groups

    def _offered(self, weight: QuantizedWeight, given: Given) -> list[WeightGroup]:
        if isinstance(weight, TorchaoWeight):
            return torchao_rules.offered(weight, given, self._scheme.versions)
        return modelopt_rules.offered(weight, given)

    def _misfits(self, leaves: Mapping[str, Leaf]) -> Iterator[Problem]:
        """Where the program does not read what the scheme says."""
        for weight in self._scheme.weights:
            for entry in weight.entries:
                leaf, where = leaves.get(entry.name), f"{WHERE}.scheme: {entry.name}"
                if leaf is None:
                    yield Problem(where, "not in the program", wanted=str(entry))
                elif (leaf.dtype, leaf.shape) != (entry.dtype, entry.shape):
                    found = f"{leaf.dtype} {leaf.shape}"
                    yield Problem(where, "differs", f"{found} in the program", str(entry))
