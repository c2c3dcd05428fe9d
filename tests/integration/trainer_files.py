"""Checkpoints as trainers leave them, of one small language model.

``FILES`` names them. Where torch can make the names itself (``DataParallel``, ``torch.compile``,
checkpointed layers, averaged models, distributed checkpoints) it does; others are written as the
trainers' documentation and sources show them.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, torch.Tensor]


class Trunk(nn.Module):
    """Embedding, layers, norm, and a buffer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.rand(width) + 0.5)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.norm(x) * self.scale


class LM(nn.Module):
    """A language model with the names of transformers: ``model.`` in front, a tied head."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.model = Trunk(width, layers)
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.lm_head(self.model(ids))


def model_of(seed: int, **sizes: int) -> LM:
    """A model with weights of its own."""
    torch.manual_seed(seed)
    model = LM(**sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@dataclass(frozen=True)
class File:
    """One checkpoint.

    Attributes:
        make: Writes it into a folder and returns its path, or returns weights in memory.
        flag: What the error has to name, if it is refused; empty where it is taken.
        rules: That flag as rules.
        of_bf16: Whether it holds the weights in bfloat16.
        note: Words that the report's notes have; empty where names fit as they are.
    """

    make: Callable[[LM, Path], Any]
    flag: str = ""
    rules: dict[str, Any] | None = None
    of_bf16: bool = False
    note: str = ""


def state_of(model: nn.Module) -> State:
    """Copies of all weights; names that share memory go on to share it."""
    state = model.state_dict()
    copies = {value.data_ptr(): value.clone() for value in state.values()}
    return {name: copies[value.data_ptr()] for name, value in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def without_head(state: State) -> State:
    """As ``save_pretrained`` does it: of tied weights one."""
    return {name: value for name, value in state.items() if name != "lm_head.weight"}


def layerwise(model: LM, wrap: Callable[[nn.Module], nn.Module]) -> LM:
    """A copy of a model whose layers are wrapped."""
    model = copy.deepcopy(model)
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = wrap(layer)
    return model


def saved(of: Callable[[LM], Any], name: str = "weights.pt") -> Callable[[LM, Path], Path]:
    """What makes a file of ``torch.save``."""

    def make(model: LM, folder: Path) -> Path:
        torch.save(of(model), folder / name)
        return folder / name

    return make


def tensors(of: Callable[[LM], State], name: str = "model.safetensors") -> Any:
    """What makes a folder with a file of safetensors."""

    def make(model: LM, folder: Path) -> Path:
        state = {n: value.clone().contiguous() for n, value in of(model).items()}
        save_file(state, folder / name)
        return folder

    return make


def sharded(model: LM, folder: Path) -> Path:
    """A folder with two shards and their index, as ``save_pretrained`` writes it."""
    state = without_head(state_of(model))
    home: dict[str, str] = {}
    for number in range(2):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = dict(list(state.items())[number::2])
        save_file(part, folder / file)
        home |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def distributed(of: Callable[[LM], dict[str, Any]]) -> Callable[[LM, Path], Path]:
    """What makes a folder of ``torch.distributed.checkpoint``."""

    def make(model: LM, folder: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.save(  # type: ignore[attr-defined]
                of(model), checkpoint_id=folder / "dcp", no_dist=True
            )
        return folder / "dcp"

    return make


def moments(state: State) -> dict[str, State]:
    """State of an optimizer by names of parameters: each piece looks like a whole model."""
    return {kind: {n: v.square() for n, v in state.items()} for kind in ("exp_avg", "exp_avg_sq")}


def lightning(state: State) -> dict[str, Any]:
    """What Lightning's trainer writes around a state_dict."""
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [{"last_epoch": 3}],
    }


def averaged(model: LM) -> State:
    return state_of(AveragedModel(model))


def fsdp1(state: State, *inner: str) -> State:
    """Names of ``FullyShardedDataParallel``, around the model and around each layer."""
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[3:3] = ["_fsdp_wrapped_module", *inner]
        found[".".join(["_fsdp_wrapped_module", *parts])] = value
    return found


def bf16(state: State) -> State:
    return {name: value.bfloat16() for name, value in state.items()}


def with_mask(state: State) -> State:
    """Buffers that older versions of transformers saved."""
    return {
        **state,
        "model.embed_tokens.position_ids": torch.arange(11)[None],
        "model.layers.0.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.0.attn.bias": torch.ones(1, 1, 7, 7).tril(),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    }


def gguf(model: LM, folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    return folder / "model.gguf"


def other(state: State) -> State:
    """Another version of the same weights."""
    return {name: value * 0.5 for name, value in state.items()}


def _compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module)  # type: ignore[return-value] # compiles nothing before a call


FILES: dict[str, File] = {
    # -- names as they are
    "state_dict": File(saved(state_of)),
    "save_pretrained, tied": File(tensors(lambda m: without_head(state_of(m)))),
    "save_pretrained, both names": File(tensors(state_of)),
    "save_pretrained, the head alone": File(
        tensors(lambda m: {n: v for n, v in state_of(m).items() if "embed" not in n})
    ),
    "save_pretrained, sharded": File(sharded),
    "pytorch_model.bin": File(saved(state_of, "pytorch_model.bin")),
    "diffusers": File(tensors(state_of, "diffusion_pytorch_model.safetensors")),
    "FSDP2": File(distributed(state_of)),
    "PEFT, merged and unloaded": File(tensors(lambda m: without_head(state_of(m)))),
    # -- wrappers
    "DataParallel": File(saved(lambda m: state_of(nn.DataParallel(m)))),
    "DataParallel, live": File(lambda m, _: nn.DataParallel(m)),
    "DDP": File(saved(lambda m: under("module.", state_of(m)))),
    "accelerate, DDP in bf16": File(
        tensors(lambda m: bf16(under("module.", state_of(m)))),
        "rules.cast to 'lossless'",
        {"cast": "lossless"},
        of_bf16=True,
    ),
    "torch.compile": File(saved(lambda m: state_of(_compiled(m)))),
    "torch.compile, live": File(lambda m, _: _compiled(m)),
    "torch.compile by layer": File(saved(lambda m: state_of(layerwise(m, _compiled)))),
    "torch.compile by layer, then DDP": File(
        saved(lambda m: state_of(nn.DataParallel(layerwise(m, _compiled))))
    ),
    "checkpointed layers": File(saved(lambda m: fsdp1(state_of(m), "_checkpoint_wrapped_module"))),
    "checkpointed layers, live": File(lambda m, _: layerwise(m, checkpoint_wrapper)),
    "FSDP1": File(saved(lambda m: fsdp1(state_of(m)))),
    "FSDP1, checkpointed and compiled": File(
        saved(lambda m: fsdp1(state_of(m), "_checkpoint_wrapped_module", "_orig_mod"))
    ),
    "Fabric": File(saved(lambda m: under("_forward_module.", state_of(m)))),
    "AveragedModel": File(saved(averaged), note="'n_averaged'"),
    "AveragedModel, live": File(lambda m, _: AveragedModel(m), note="'n_averaged'"),
    # -- one subtree
    "Lightning": File(
        saved(lambda m: lightning(under("net.", state_of(m)))), note="under 'state_dict.net.'"
    ),
    "Lightning, named model": File(
        saved(lambda m: lightning(under("model.", state_of(m)))), note="under 'state_dict.model.'"
    ),
    "Lightning, compiled": File(
        saved(lambda m: lightning(under("net._orig_mod.", state_of(m)))), note="under 'state_dict."
    ),
    "Lightning, in memory": File(
        lambda m, _: lightning(under("net.", state_of(m))), note="under 'state_dict.net.'"
    ),
    "Lightning, in bf16": File(
        saved(lambda m: lightning(bf16(under("net.", state_of(m))))),
        "rules.cast to 'lossless'",
        {"cast": "lossless"},
        of_bf16=True,
    ),
    "Lightning, a loss with weights beside": File(
        saved(lambda m: lightning({**under("net.", state_of(m)), "loss.weight": torch.ones(11)})),
        note="under 'state_dict.net.'",
    ),
    "DeepSpeed": File(
        saved(lambda m: {"module": state_of(m), "optimizer": None, "ds_version": "0.16"}),
    ),
    "a trainer's dictionary": File(
        saved(lambda m: {"model": state_of(m), "optimizer": {"state": {}}, "iteration": 3}),
    ),
    "distributed, with an optimizer": File(
        distributed(lambda m: {"model": state_of(m), "optim": moments(state_of(m))}),
        note="left out 1",
    ),
    "distributed, an application": File(
        distributed(
            lambda m: {"app": {"net": state_of(m), "optim": {"state": moments(state_of(m))}}}
        ),
        note="under 'app.net.'",
    ),
    "EMA alone": File(saved(lambda m: {"ema": state_of(m)}), note="under 'ema.'"),
    "PEFT, merged with its prefix": File(
        saved(lambda m: under("base_model.model.", state_of(m))), note="under 'base_model.model.'"
    ),
    "student of a larger teacher": File(
        saved(
            lambda m: {
                "student": state_of(m),
                "teacher": state_of(model_of(7, width=16)),
            }
        ),
        note="under 'student.'",
    ),
    # -- entries that are no weights
    "old transformers": File(saved(lambda m: with_mask(state_of(m))), note="'model.layers.0.attn."),
    "a head beside": File(
        saved(lambda m: {**state_of(m), "score.weight": torch.ones(3, 8)}),
        r"--ignore 'score\..*'",
        {"ignore": [r"score\..*"]},
        note="rules.ignore",
    ),
    "adapters in every layer": File(
        saved(
            lambda m: {
                **state_of(m),
                **{f"model.layers.{n}.scorer.weight": torch.ones(2, 8) for n in range(2)},
            }
        ),
        r"--ignore 'model\.layers\.\d+\.scorer\..*'",
        {"ignore": [r"model\.layers\.\d+\.scorer\..*"]},
        note="rules.ignore",
    ),
    "a buffer beside, in a trainer's file": File(
        saved(lambda m: lightning({**under("net.", state_of(m)), "net.odd": torch.ones(2)})),
        r"--ignore 'state_dict\.net\.odd'",
        {"ignore": [r"state_dict\.net\.odd"]},
        note="rules.ignore",
    ),
    # -- several that fit
    "EMA beside the model": File(
        saved(lambda m: {"ema": state_of(m), "net": other(state_of(m))}),
        "--subtree 'ema.'",
        {"subtree": "ema."},
    ),
    "EMA beside a wrapped model": File(
        saved(
            lambda m: {
                **under("model_ema.module.", state_of(m)),
                **under("model.", other(state_of(m))),
            }
        ),
        "--subtree 'model_ema.module.'",
        {"subtree": "model_ema.module."},
    ),
    "timm": File(
        saved(
            lambda m: {
                "arch": "lm",
                "state_dict": other(state_of(m)),
                "state_dict_ema": state_of(m),
            }
        ),
        "--subtree 'state_dict_ema.'",
        {"subtree": "state_dict_ema."},
    ),
    "EMA beside plain names": File(
        saved(lambda m: {**state_of(m), **under("ema.", other(state_of(m)))}),
        r"--ignore 'ema\..*'",
        {"ignore": [r"ema\..*"]},
    ),
    "two wrapped models": File(
        saved(
            lambda m: {**under("model.", state_of(m)), **under("module.", other(state_of(m)))},
        ),
        "--subtree 'model.'",
        {"subtree": "model."},
    ),
}

WRONG: dict[str, Callable[[LM], Any]] = {
    "another model's": lambda _: {"net": state_of(nn.Sequential(nn.Linear(8, 8)))},
    "of another width": lambda _: {"net": state_of(model_of(5, width=16))},
    "of another width, wrapped": lambda _: under("module.", state_of(model_of(5, width=16))),
    "with a layer less": lambda _: {"net": state_of(model_of(5, layers=1))},
    "with a layer more": lambda _: {"net": state_of(model_of(5, layers=3))},
    "without a bias": lambda m: {
        "net": {n: v for n, v in state_of(m).items() if n != "model.layers.1.bias"}
    },
    "in two halves": lambda m: {
        "a": dict(list(state_of(m).items())[:3]),
        "b": dict(list(state_of(m).items())[3:]),
    },
    "an optimizer's alone": lambda m: {"optimizer": {"state": moments(state_of(m))}},
    "PEFT, not merged": lambda m: {
        name.replace(".weight", ".base_layer.weight"): value
        for name, value in under("base_model.model.", state_of(m)).items()
    },
    "on the meta device": lambda m: under("net.", state_of(m.to("meta"))),
}
"""Checkpoints that no rule makes fit, or that are of another model."""
