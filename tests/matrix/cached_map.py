"""Real cached maps of torch-tensorrt 2.11 and 2.12, and what upstream makes of them; no GPU."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.builtin.torch_tensorrt.networks import Network


def cached_map(network: Network) -> dict[str, Any] | None:
    """The map that upstream's interpreter stores; None where this version stores none."""
    interpreter = network._interpreter
    if not hasattr(interpreter, "_save_weight_mapping"):
        return None
    with _on_cpu():
        interpreter._save_weight_mapping()
    found: dict[str, Any] = interpreter.weight_name_map
    return found


def applied_by_upstream(
    name_map: Mapping[str, Any], state: Mapping[str, torch.Tensor], settings: Any
) -> dict[str, torch.Tensor]:
    """Flat values of all slots that upstream's map serves from a lowered part's state_dict."""
    from torch_tensorrt.dynamo import _refit

    names = {slot: entry for slot, entry in name_map.items() if slot != "constant_mapping"}
    with _on_cpu():
        values = _refit.construct_refit_mapping_from_weight_name_map(names, dict(state), settings)
    return {slot: value for slot, (value, _) in values.items()}


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Upstream puts all weights onto the GPU first; where there is none they stay."""
    from torch_tensorrt.dynamo import _refit
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter

    with ExitStack() as stack:
        for module in (_refit, _TRTInterpreter):
            cpu = mock.patch.object(module, "to_torch_device", return_value=torch.device("cpu"))
            stack.enter_context(cpu)
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor))
        yield
