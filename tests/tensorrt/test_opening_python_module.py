"""``PythonTorchTensorRTModule`` of torch-tensorrt 2.11 and 2.12, which 2.14 no longer has.

The stand-in has upstream's methods that touch an engine, as
``torch_tensorrt/dynamo/runtime/_PythonTorchTensorRTModule.py`` of 2.11.0 has them.
"""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.module import EngineFactory, TorchTensorRTOpened, open_target
from refitkit.errors import EngineError, UnsupportedTargetError
from tests.tensorrt.targets import REFUSED, CudaEngine, compilation_settings

FIRST = "_run_on_acc_0"
BYTES, FRESH = b"vtrt compiled", b"vtrt refitted"
FACTORY = EngineFactory(engine=lambda handle: handle, torch_part=lambda *part: part)  # type: ignore[arg-type, return-value]


class PythonTorchTensorRTModule(torch.nn.Module):
    """Upstream's, without the rest."""

    __module__ = "torch_tensorrt.dynamo.runtime._PythonTorchTensorRTModule"

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self._register_state_dict_hook(PythonTorchTensorRTModule._on_state_dict)
        self.serialized_engine = BYTES
        self.input_names, self.output_names = ["x"], ["output0"]
        self.settings = settings
        self.weight_name_map = {"a CONSTANT": ["a.weight", torch.float32], "constant_mapping": {}}
        self.engine: Any = None
        self.cudagraph: Any = None
        self.runtime_states = SimpleNamespace(context_changed=False)
        if not settings.lazy_engine_init:
            self.setup_engine()

    def setup_engine(self) -> None:
        self.engine = None if self.serialized_engine == REFUSED else CudaEngine(BYTES)
        self.context = self.engine.made_for = object()
        self.engine.engine_bytes = self.serialized_engine

    def _on_state_dict(self, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        state_dict[prefix + "engine"] = self.serialized_engine

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("engine", None)
        state.pop("context", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.setup_engine()

    def __deepcopy__(self, memo: Any) -> PythonTorchTensorRTModule:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        result.__setstate__(self.__getstate__())
        return result

    def _reset_captured_graph(self) -> None:
        if self.cudagraph:
            self.cudagraph.reset()
            self.cudagraph = None


class Target(torch.nn.Module):
    def __init__(self, child: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(FIRST, child)
        self.add_module("_run_on_gpu_1", torch.nn.Linear(2, 2))
        self.register_buffer("own", torch.ones(1))


@pytest.fixture
def child(torch_tensorrt: Any) -> Any:
    return PythonTorchTensorRTModule(compilation_settings(torch_tensorrt))


@pytest.fixture
def opened(child: Any) -> TorchTensorRTOpened:
    module = open_target(Target(child), FACTORY)
    assert module is not None
    return module


def test_it_is_opened(opened: TorchTensorRTOpened, child: Any) -> None:
    (engine,) = opened.target.engines.values()
    assert (engine.name, engine.runtime) == (FIRST, "python")
    assert engine.cuda_engine() is child.engine
    assert engine.weight_name_map is child.weight_name_map
    assert (engine.input_names, engine.output_names) == (("x",), ("output0",))
    assert engine.engine_bytes() == BYTES
    assert list(opened.target.torch_parts) == ["_run_on_gpu_1", "_rest"]
    (own,) = opened.target.torch_parts["_rest"].buffers()
    assert own is opened.target.module.own
    part = opened.target.torch_parts["_run_on_gpu_1"]
    linear: Any = opened.target.module.get_submodule("_run_on_gpu_1")
    assert dict(part.named_parameters())["weight"] is linear.weight


@pytest.mark.parametrize("reader", ["state_dict", "deepcopy", "getstate", "attribute", "reduce"])
def test_nobody_sees_stale_bytes(reader: str, opened: TorchTensorRTOpened, child: Any) -> None:
    opened.target.engines[FIRST].on_stale(lambda: FRESH)
    read = {
        "state_dict": lambda: opened.target.module.state_dict()[f"{FIRST}.engine"],
        "deepcopy": lambda: (
            copy.deepcopy(opened.target.module).get_submodule(FIRST).engine.engine_bytes
        ),
        "getstate": lambda: child.__getstate__()["serialized_engine"],
        "attribute": lambda: child.serialized_engine,
        "reduce": lambda: child.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[2]["serialized_engine"],
    }[reader]
    assert read() == FRESH
    assert type(child) is PythonTorchTensorRTModule


def test_another_engine_is_live_and_stored(opened: TorchTensorRTOpened, child: Any) -> None:
    child.cudagraph = SimpleNamespace(reset=lambda: None)
    opened.target.engines[FIRST].replace(FRESH)
    assert child.engine.engine_bytes == child.serialized_engine == FRESH
    assert child.cudagraph is None
    assert child.runtime_states.context_changed  # else it would replay what is gone


def test_a_refused_engine_leaves_the_old_one(opened: TorchTensorRTOpened, child: Any) -> None:
    engine, context = child.engine, child.context
    with pytest.raises(EngineError, match=FIRST):
        opened.target.engines[FIRST].replace(REFUSED)
    assert child.engine is engine
    assert child.context is context
    assert child.serialized_engine == BYTES


def test_a_second_module_is_independent(opened: TorchTensorRTOpened, child: Any) -> None:
    opened.target.engines[FIRST].on_stale(lambda: FRESH)
    second = opened.reopen().target.engines[FIRST]
    assert second.cuda_engine() is not child.engine
    assert second.cuda_engine().engine_bytes == FRESH


def test_lazy_ones_need_a_gpu(torch_tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = compilation_settings(torch_tensorrt, lazy_engine_init=True)
    module = open_target(Target(PythonTorchTensorRTModule(settings)), FACTORY)
    assert module is not None
    with pytest.raises(UnsupportedTargetError, match="needs a GPU"):
        module.target.engines[FIRST].cuda_engine()
    monkeypatch.setattr(upstream, "has_gpu", lambda: True)
    assert module.target.engines[FIRST].cuda_engine().engine_bytes == BYTES


def test_it_cannot_be_saved(opened: TorchTensorRTOpened, tmp_path: Any) -> None:
    with pytest.raises(UnsupportedTargetError, match="use_python_runtime=False"):
        opened.save(tmp_path / "model.ep", {})
