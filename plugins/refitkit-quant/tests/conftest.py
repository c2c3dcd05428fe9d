"""Models that are quantized and compiled once for each rule."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import refitkit
import torch

import refitkit_quant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.pipeline import CompiledModule, Pipeline

    from refitkit_quant import Scheme

IDS = torch.tensor([[1, 7, 3], [0, 9, 2]])


class Net(torch.nn.Module):
    """An embedding tied to the last of three linear layers; one of them has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(10, 32)
        self.a = torch.nn.Linear(32, 64)
        self.b = torch.nn.Linear(64, 32, bias=False)
        self.head = torch.nn.Linear(32, 10)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(torch.relu(self.a(self.emb(ids)))))


def float_net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


@dataclass(frozen=True)
class Quantized:
    """A compiled quantized model, with a function that quantizes others by the same rule."""

    config: Any
    dtype: torch.dtype
    scheme: Scheme
    pipeline: Pipeline
    compiled: CompiledModule

    def eager(self, model: torch.nn.Module) -> torch.nn.Module:
        """A float model that torchao quantized and unwrapped."""
        from torchao.quantization import quantize_
        from torchao.utils import unwrap_tensor_subclass

        model = copy.deepcopy(model)
        quantize_(model, self.config)
        return unwrap_tensor_subclass(model)

    def floats(self, seed: int) -> Net:
        return float_net(seed, self.dtype)

    def slots(self) -> dict[str, torch.Tensor]:
        return slots_of(self.compiled)

    def refit(self, weights: Any, **how: Any) -> Any:
        return self.pipeline.refit(self.compiled, weights, **how).report


def slots_of(compiled: CompiledModule) -> dict[str, torch.Tensor]:
    (engine,) = compiled.opened.engines.values()
    return {name: engine.read(name).clone() for name in engine.slots}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether all bits are equal."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(bits(a[n]), bits(b[n]))
        for n in a
    )


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def with_scheme(scheme: Scheme | None, **more: Any) -> Pipeline:
    """A pipeline with a scheme in the settings of the plugin."""
    settings = {"scheme": scheme, **more}
    return refitkit.Pipeline({"plugin_settings": {"quant": settings}})


def make(config: Any, dtype: torch.dtype) -> Quantized:
    from torchao.quantization import quantize_
    from torchao.utils import unwrap_tensor_subclass

    original = float_net(0, dtype)
    model = copy.deepcopy(original)
    quantize_(model, config)
    scheme = refitkit_quant.scheme_of(model, original)
    program = torch.export.export(unwrap_tensor_subclass(model), (IDS,))
    pipeline = with_scheme(scheme)
    return Quantized(config, dtype, scheme, pipeline, pipeline.compile(program))


def configs() -> dict[str, Callable[[], tuple[Any, torch.dtype]]]:
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
    )

    def int8(granularity: Any) -> Any:
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)

    def int4(granularity: Any, mapping: Any = MappingType.SYMMETRIC, **more: Any) -> Any:
        return IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity, mapping_type=mapping, **more
        )

    return {
        "int8-row": lambda: (int8(PerRow()), torch.float32),
        "int8-group": lambda: (int8(PerGroup(16)), torch.float32),
        "int8-tensor": lambda: (int8(PerTensor()), torch.float32),
        "int8-row-bf16": lambda: (int8(PerRow()), torch.bfloat16),
        "int4-group-8": lambda: (int4(PerGroup(8)), torch.float32),
        "int4-row-asymmetric": lambda: (int4(PerAxis(0), MappingType.ASYMMETRIC), torch.float32),
        "int4-group-32-no-clipping-fp16": lambda: (
            int4(PerGroup(32), MappingType.SYMMETRIC_NO_CLIPPING_ERR),
            torch.float16,
        ),
        "int4-group-16-bf16-scales-fp32": lambda: (
            int4(PerGroup(16), scale_dtype=torch.float32),
            torch.bfloat16,
        ),
    }


CASES = (
    "int8-row",
    "int8-group",
    "int8-tensor",
    "int8-row-bf16",
    "int4-group-8",
    "int4-row-asymmetric",
    "int4-group-32-no-clipping-fp16",
    "int4-group-16-bf16-scales-fp32",
)


@pytest.fixture(scope="session")
def made() -> Callable[[str], Quantized]:
    """A function that returns a case by name; each is compiled once."""
    pytest.importorskip("torchao")
    kept: dict[str, Quantized] = {}

    def get(name: str) -> Quantized:
        if name not in kept:
            kept[name] = make(*configs()[name]())
        return kept[name]

    return get


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, made: Callable[[str], Quantized]) -> Quantized:
    """Each case in turn."""
    return made(request.param)


@pytest.fixture
def int8(made: Callable[[str], Quantized]) -> Quantized:
    """The int8 case with the weights of seed 0."""
    found = made("int8-row")
    found.pipeline.refit(found.compiled, found.floats(0))
    return found


@pytest.fixture(scope="session", name="ids")
def _ids() -> torch.Tensor:
    return IDS


@pytest.fixture(scope="session", name="same")
def _same() -> Callable[..., bool]:
    return same


@pytest.fixture(scope="session", name="with_scheme")
def _with_scheme() -> Callable[..., Pipeline]:
    return with_scheme


@pytest.fixture(scope="session", name="float_net")
def _float_net() -> Callable[..., Net]:
    return float_net


# -- ModelOpt -----------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Two linear layers, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(16, 32)
        self.b = torch.nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Modelopt:
    """The steps of a test that ModelOpt does: quantize, export programs and checkpoints."""

    def __init__(self, form: str) -> None:
        self.form = form

    def floats(self, seed: int, dtype: torch.dtype = torch.float32) -> Layers:
        torch.manual_seed(seed)
        return Layers().to(dtype).eval()

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def quantized(self, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """A float model by seed, quantized and calibrated with inputs of the same seed."""
        import modelopt.torch.quantization as mtq

        config = {"fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_DEFAULT_CFG}[self.form]
        inputs = self.inputs(seed, dtype)
        return mtq.quantize(
            self.floats(seed, dtype), copy.deepcopy(config), forward_loop=lambda m: m(inputs)
        )

    def program(self, model: torch.nn.Module) -> Any:
        """The program to compile. Without CUDA, INT8 exports only without a guard on values."""
        from modelopt.torch.quantization import tensor_quant
        from modelopt.torch.quantization.utils import export_torch_mode

        def unguarded(
            inputs: torch.Tensor, amax: torch.Tensor, num_bits: int, *_: bool
        ) -> torch.Tensor:
            bound = torch.full_like(amax.float(), 2.0 ** (num_bits - 1) - 1)
            scale = bound / amax.float()
            rounded = torch.clamp((inputs.float() * scale).round(), -bound - 1, bound)
            return (rounded / scale).to(inputs.dtype)

        dtype = next(model.parameters()).dtype
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), export_torch_mode():
            patch.setattr(tensor_quant, "_tensor_quant", unguarded)
            return torch.export.export(model, (self.inputs(0, dtype),), strict=False)

    def checkpoint(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Quantized weights and scales as ModelOpt exports them for Hugging Face."""
        from modelopt.torch.export.unified_export_hf import _export_quantized_weight

        model = copy.deepcopy(model)
        for layer in (model.a, model.b):
            _export_quantized_weight(layer, torch.float32)
        state = model.state_dict()
        return {name: value for name, value in state.items() if "quantizer" not in name}

    def calibrated(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Float weights, and the calibration of layer inputs."""
        state = model.state_dict()
        return {n: v for n, v in state.items() if "weight_quantizer" not in n}


@pytest.fixture(scope="session")
def modelopt() -> Callable[[str], Modelopt]:
    pytest.importorskip("modelopt")
    return Modelopt
