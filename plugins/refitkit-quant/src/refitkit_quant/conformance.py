"""Suites of the conformance kit for this plugin: ``refitkit plugins check quant`` runs them.

The expected tensors are computed without this plugin's code: by torchao's ``quantize_`` on a
module, and by plain arithmetic for ModelOpt.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from refitkit.protocols import TransformRequest
from refitkit.recipe import TensorMap
from refitkit.testing import TransformSuite
from refitkit.testing.scenes import make_plan, make_slot, recipe_row

from refitkit_quant.scheme import ModeloptWeight, Scheme, TensorSpec
from refitkit_quant.transform import QuantTransform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.protocols import WeightTransform

_SHAPE = (24, 32)


class _Quantizing(TransformSuite):
    """Checks of the transform with one scheme.

    Attributes:
        scheme: Scheme of the transform.
    """

    scheme: Scheme

    def make_transform(self) -> WeightTransform:
        return QuantTransform(self.scheme, 1.0)

    def request(self, weights: Mapping[str, torch.Tensor], *, partial: bool = False) -> Any:
        """A request with these weights, for a plan with the entries of the scheme and a bias."""
        entries = [entry for weight in self.scheme.weights for entry in weight.entries]
        slots = [make_slot(entry.name, entry.shape, entry.dtype) for entry in entries]
        plan = make_plan([recipe_row(slot) for slot in [*slots, make_slot("l.bias", (24,))]])
        return TransformRequest(plan, TensorMap(weights), partial)

    def make_request(self, seed: int) -> TransformRequest:
        request: TransformRequest = self.request(self.given(seed))
        return request

    def given(self, seed: int) -> dict[str, torch.Tensor]:
        """The entries of a checkpoint."""
        return {"l.weight": _weight(seed), "l.bias": torch.ones(24)}


class TorchaoSuite(_Quantizing):
    """Weights that torchao quantizes with one config.

    Attributes:
        config: Config of torchao.
    """

    config: Any

    @cached_property
    def scheme(self) -> Scheme:  # type: ignore[override]
        from refitkit_quant import scheme_of

        return scheme_of(self._module(1), config=self.config)

    def _module(self, seed: int) -> torch.nn.Module:
        from torchao.quantization import quantize_

        module = torch.nn.ModuleDict({"l": torch.nn.Linear(_SHAPE[1], _SHAPE[0])})
        module["l"].weight = torch.nn.Parameter(_weight(seed), requires_grad=False)
        quantize_(module, self.config)
        return module

    def _quantized(self, seed: int) -> Any:
        return self._module(seed)["l"].weight  # type: ignore[index]

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        tensor = self._quantized(seed)
        # Written out instead of calling parts_of: an oracle must not use the plugin's code.
        names, _ = tensor.__tensor_flatten__()
        lead = "l.parametrizations.weight.original"
        return {f"{lead}{i}": getattr(tensor, name) for i, name in enumerate(names)}

    def expected_errors(self, seed: int) -> Mapping[str, float]:
        error = (self._quantized(seed).dequantize() - _weight(seed)).abs().max()
        return {"l.parametrizations.weight.original0": float(error)}

    def make_alone(self) -> TransformRequest:
        scale = "l.parametrizations.weight.original1"
        request: TransformRequest = self.request({scale: self.expected(1)[scale]}, partial=True)
        return request


class _ModeloptSuite(_Quantizing):
    scheme = Scheme(
        weights=(
            ModeloptWeight(
                weight=TensorSpec(name="l.weight", dtype="float32", shape=_SHAPE),
                format="fp8",
                amax=TensorSpec(name="l.weight_quantizer._amax", dtype="float32", shape=()),
                input_amax=TensorSpec(name="l.input_quantizer._amax", dtype="float32", shape=()),
            ),
        )
    )

    def make_plain(self) -> TransformRequest:
        """A bias only: the transform takes float weights, too, to measure their error."""
        request: TransformRequest = self.request({"l.bias": torch.ones(24)}, partial=True)
        return request


class ModeloptSuite(_ModeloptSuite):
    """Float weights, from which the transform computes FP8 scales."""

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        weight = _weight(seed)
        return {"l.weight": weight, "l.weight_quantizer._amax": weight.abs().amax()}

    def make_alone(self) -> TransformRequest:
        lone = {"l.weight_quantizer._amax": torch.tensor(1.0)}
        request: TransformRequest = self.request(lone, partial=True)
        return request


class ExportedSuite(_ModeloptSuite):
    """FP8 weights and scales as ModelOpt exports them."""

    def given(self, seed: int) -> dict[str, torch.Tensor]:
        scale = _weight(seed).abs().amax() / 448
        values = (_weight(seed) / scale).to(torch.float8_e4m3fn)
        inputs = torch.tensor(float(seed)) / 448
        return {"l.weight": values, "l.weight_scale": scale, "l.input_scale": inputs}

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        given = self.given(seed)
        return {
            "l.weight": given["l.weight"].float() * given["l.weight_scale"],
            "l.weight_quantizer._amax": _weight(seed).abs().amax(),
            "l.input_quantizer._amax": torch.tensor(float(seed)),
        }

    def make_alone(self) -> TransformRequest:
        request: TransformRequest = self.request({"l.input_scale": torch.ones(())}, partial=True)
        return request


def _weight(seed: int) -> torch.Tensor:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed))


def suites() -> list[type[TransformSuite]]:
    """The suites that can run on this machine: torchao's only if it is installed."""
    found: list[type[TransformSuite]] = [ModeloptSuite, ExportedSuite]
    # modelopt itself is not needed: its formulas are plain arithmetic.
    if find_spec("torchao") is not None:
        found += _of_torchao()
    return found


def _of_torchao() -> list[type[TransformSuite]]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    class Int8Suite(TorchaoSuite):
        """int8 with one scale for each row."""

        config = Int8WeightOnlyConfig(set_inductor_config=False)

    class Int4Suite(TorchaoSuite):
        """int4 with one scale for eight elements."""

        int4 = torch.int4  # type: ignore[attr-defined]
        config = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(8))

    return [Int8Suite, Int4Suite]
