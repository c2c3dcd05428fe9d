"""Bases in every kind of memory, for engines on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import refitkit
import torch
from peft_models import assert_close, bits, make_adapter, open_weights, same, weights_of
from refitkit.builtin.torch_tensorrt import upstream

import refitkit_peft
from refitkit_peft import Lora, stores

pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"
)
HOST = {"given": "cuda", "host": "cpu", "pinned": "cpu", "mapped": "cpu", "device": "cuda"}
"""Where sums are made: where the base is, and the given one is on the GPU."""
TOLERANCE = 1e-2
"""Of outputs, absolute and relative: TensorRT computes in TF32. Sums are compared to rounding."""
TRT = {"min_block_size": 1, "use_python_runtime": True}


class Small(torch.nn.Module):
    """Convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stem(x)).mean((2, 3))
        return self.head(h + self.down(torch.relu(self.up(h))))


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adapters")
    x, y = ["stem", "up", "down", "head"], ["up", "head"]
    return {
        "x": make_adapter(model, folder / "x", 1, target_modules=x),
        "y": make_adapter(model, folder / "y", 2, target_modules=y, use_dora=True, r=8),
    }


def base_of(model: Small, made: dict[str, Any], kind: str, **settings: Any) -> refitkit_peft.Base:
    state = {name: value.to("cuda") for name, value in model.state_dict().items()}
    base = refitkit_peft.Base(state, kind, **settings)
    for name, one in made.items():
        base.add(name, one.path)
    return base


@pytest.fixture(scope="module", params=["aotinductor", "torch_tensorrt"])
def compiled(request, model) -> Any:
    if request.param == "torch_tensorrt" and not upstream.is_installed():
        pytest.skip("torch_tensorrt is not installed")
    x = torch.randn(2, 3, 8, 8, device="cuda")
    program = torch.export.export(copy.deepcopy(model).cuda(), (x,))
    options = TRT if request.param == "torch_tensorrt" else {}
    return refitkit.compile(program, request.param, options, prove=False), x


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kind", stores.MEMORY_KINDS)
def test_there_and_back(compiled, model, made, kind, delta) -> None:
    module, x = compiled
    base = base_of(model, made, kind)
    refitkit.refit(module, Lora(base, {}))
    first = module(x).clone()
    for name, scale in (("x", 1.0), ("y", 0.5), ("x", -1.0)):
        refitkit.refit(module, Lora(base, {name: scale}), delta=delta)
        wanted = copy.deepcopy(model)
        wanted.load_state_dict(made[name].merged(scale))
        with torch.no_grad():
            expected = wanted.cuda()(x)
        assert torch.allclose(module(x), expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert not torch.equal(module(x), first)
    refitkit.refit(module, Lora(base, {}), delta=delta)
    assert torch.equal(bits(module(x)), bits(first))


@pytest.mark.parametrize("kind", stores.MEMORY_KINDS)
def test_sums_are_made_where_the_base_is(model, made, kind) -> None:
    base = base_of(model, made, kind)
    for name in made:
        source = open_weights(Lora(base, {name: 1.0}))
        assert {source.get(one).device.type for one in source.touched} == {HOST[kind]}
        found = {one: value.cpu() for one, value in weights_of(source).items()}
        for one, value in made[name].merged().items():
            assert_close(found[one], value, f"{name} {one}")


@pytest.fixture(params=["high", "medium", "one by one"])
def low_precision(request):
    if request.param == "one by one":
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "tf32"
        yield
        settings.fp32_precision = before
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(request.param)
        yield
        torch.set_float32_matmul_precision(before)


def test_sums_are_of_full_precision_whatever_is_allowed(made, model, low_precision) -> None:
    wide = torch.randn(256, 256, device="cuda")
    error = (wide @ wide - (wide.double() @ wide.double())).abs().max()
    assert error > 1e-3  # the setting lowers the precision of products
    source = open_weights(Lora(base_of(model, made, "device"), {"x": 1.0}))
    found = {one: value.cpu() for one, value in weights_of(source).items()}
    for one, value in made["x"].merged().items():
        assert_close(found[one], value, one)


def test_copies_are_where_they_are_said_to_be(model, made) -> None:
    size = sum(value.nbytes for value in model.state_dict().values())
    before = torch.cuda.memory_allocated()
    base = refitkit_peft.Base(model, "device")
    assert torch.cuda.memory_allocated() - before >= size
    assert base.memory.base == size
    pinned = refitkit_peft.Base(model, "pinned")
    assert all(value.is_pinned() for value in weights_of_store(pinned).values())


def test_ready_sums_of_a_pinned_base_are_pinned(model, made) -> None:
    """A GPU reads pageable memory several times as slowly."""
    for keep in (0, 1):
        source = open_weights(Lora(base_of(model, made, "pinned", keep=keep), {"x": 1.0}))
        assert {source.get(name).is_pinned() for name in source.touched} == {keep == 1}


def weights_of_store(base: refitkit_peft.Base) -> dict[str, torch.Tensor]:
    source = open_weights(Lora(base, {}))
    return {name: source.get(name) for name in source.names()}


def late(monkeypatch) -> None:
    """Make the device compute sums long after the call that requests them."""
    quick = refitkit_peft.source.summed

    def slow(*args: Any) -> torch.Tensor:
        found = quick(*args)
        if found.device.type == "cpu":
            return found
        copied = torch.zeros_like(found)
        torch.cuda._sleep(100_000_000)
        return copied.copy_(found)

    monkeypatch.setattr(refitkit_peft.source, "summed", slow)


def test_sets_that_another_stream_prepares(model, made, monkeypatch) -> None:
    wanted = weights_of(open_weights(Lora(base_of(model, made, "device"), {"x": 1.0})))
    base = base_of(model, made, "device")
    late(monkeypatch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        base.prepare({"x": 1.0})
    found = weights_of(open_weights(Lora(base, {"x": 1.0})))
    torch.cuda.synchronize()
    assert same(found, wanted)


def test_a_refit_from_what_another_stream_prepared(compiled, model, made, monkeypatch) -> None:
    module, x = compiled
    base = base_of(model, made, "device")
    refitkit.refit(module, Lora(base, {"x": 1.0}))
    wanted = module(x).clone()
    refitkit.refit(module, Lora(base, {}))
    again = base_of(model, made, "device")
    late(monkeypatch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again.prepare({"x": 1.0})
    refitkit.refit(module, Lora(again, {"x": 1.0}))
    assert torch.equal(bits(module(x)), bits(wanted))
