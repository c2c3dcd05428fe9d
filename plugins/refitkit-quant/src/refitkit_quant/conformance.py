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
_LAYERS = ("l", "m")
"""Two layers, because schemes have full names: one is converted as well as the other."""


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
        weights = {f"{layer}.weight": _weight(seed, layer) for layer in _LAYERS}
        return {**weights, "l.bias": torch.ones(24)}


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

        module = torch.nn.ModuleDict({n: torch.nn.Linear(_SHAPE[1], _SHAPE[0]) for n in _LAYERS})
        for layer in _LAYERS:
            weight = torch.nn.Parameter(_weight(seed, layer), requires_grad=False)
            module[layer].weight = weight
        quantize_(module, self.config)
        return module

    def _quantized(self, seed: int) -> dict[str, Any]:
        module: Any = self._module(seed)
        return {layer: module[layer].weight for layer in _LAYERS}

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for layer, tensor in self._quantized(seed).items():
            # Written out instead of calling parts_of: an oracle must not use the plugin's code.
            names, _ = tensor.__tensor_flatten__()
            lead = f"{layer}.parametrizations.weight.original"
            found |= {f"{lead}{i}": getattr(tensor, name) for i, name in enumerate(names)}
        return found

    def expected_errors(self, seed: int) -> Mapping[str, float]:
        return {
            f"{layer}.parametrizations.weight.original0": float(
                (tensor.dequantize() - _weight(seed, layer)).abs().max()
            )
            for layer, tensor in self._quantized(seed).items()
        }

    def make_alone(self) -> TransformRequest:
        scale = "l.parametrizations.weight.original1"
        request: TransformRequest = self.request({scale: self.expected(1)[scale]}, partial=True)
        return request


class _ModeloptSuite(_Quantizing):
    scheme = Scheme(
        weights=tuple(
            ModeloptWeight(
                weight=TensorSpec(name=f"{n}.weight", dtype="float32", shape=_SHAPE),
                format="fp8",
                amax=TensorSpec(name=f"{n}.weight_quantizer._amax", dtype="float32", shape=()),
                input_amax=TensorSpec(name=f"{n}.input_quantizer._amax", dtype="float32", shape=()),
            )
            for n in _LAYERS
        )
    )

    def make_plain(self) -> TransformRequest:
        """A bias only: the transform takes float weights, too, to measure their error."""
        request: TransformRequest = self.request({"l.bias": torch.ones(24)}, partial=True)
        return request


class ModeloptSuite(_ModeloptSuite):
    """Float weights, from which the transform computes FP8 scales."""

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        weights = {f"{layer}.weight": _weight(seed, layer) for layer in _LAYERS}
        return weights | {f"{n}_quantizer._amax": w.abs().amax() for n, w in weights.items()}

    def make_alone(self) -> TransformRequest:
        lone = {"l.weight_quantizer._amax": torch.tensor(1.0)}
        request: TransformRequest = self.request(lone, partial=True)
        return request


class ExportedSuite(_ModeloptSuite):
    """FP8 weights and scales as ModelOpt exports them."""

    def given(self, seed: int) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        for layer in _LAYERS:
            scale = _weight(seed, layer).abs().amax() / 448
            values = (_weight(seed, layer) / scale).to(torch.float8_e4m3fn)
            given |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale}
            given[f"{layer}.input_scale"] = torch.tensor(float(seed)) / 448
        return given

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        given, found = self.given(seed), {}
        for layer in _LAYERS:
            scale = given[f"{layer}.weight_scale"]
            found[f"{layer}.weight"] = given[f"{layer}.weight"].float() * scale
            found[f"{layer}.weight_quantizer._amax"] = _weight(seed, layer).abs().amax()
            found[f"{layer}.input_quantizer._amax"] = torch.tensor(float(seed))
        return found

    def make_alone(self) -> TransformRequest:
        request: TransformRequest = self.request({"l.input_scale": torch.ones(())}, partial=True)
        return request


def _weight(seed: int, layer: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * seed + _LAYERS.index(layer))
    return torch.randn(_SHAPE, generator=generator)


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
