"""Models of transformers with small random configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scripts.zoo import transformers_configs as configs
from scripts.zoo.entry import F32, HALF, Entry
from scripts.zoo.transformers_configs import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKENS = ((1, 12),)


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, config in configs.ENCODERS.items():
        yield _entry(name, config, TOKENS, tokens=VOCABULARY)
    for name, config in configs.DECODERS.items():
        yield _entry(name, config, TOKENS, tokens=VOCABULARY, use_cache=False)
    for name, config in configs.IMAGES.items():
        size = config.get("image_size", 32)
        sides = size if isinstance(size, list) else [size, size]
        yield _entry(name, config, ((1, 3, *sides),))
    for name, config in configs.SPEECH.items():
        yield _entry(name, config, ((1, 1600),))
    yield from _parts()
    yield from _variants()


def _entry(
    name: str, config: dict[str, Any], inputs: Any, *, tokens: int = 0, **arguments: Any
) -> Entry:
    dtypes = HALF if name in configs.IN_HALF else F32
    make = _of(f"{name}Config", f"{name}Model", config, **arguments)
    return Entry(f"transformers/{name}", make, inputs, dtypes, tokens=tokens)


def _parts() -> Iterator[Entry]:
    """Encoders and decoders of models that have both, and towers of those that have two."""
    t5, umt5 = (_of(f"{n}Config", f"{n}EncoderModel", configs.T5) for n in ("T5", "UMT5"))
    yield Entry("transformers/T5 encoder", t5, TOKENS, HALF, tokens=VOCABULARY)
    yield Entry("transformers/UMT5 encoder", umt5, TOKENS, tokens=VOCABULARY)
    clip, siglip = (
        _of(f"{n}TextConfig", f"{n}TextModel", configs.TEXT_TOWER) for n in ("CLIP", "Siglip")
    )
    yield Entry("transformers/CLIPText", clip, TOKENS, HALF, tokens=VOCABULARY)
    yield Entry("transformers/SiglipText", siglip, TOKENS, tokens=VOCABULARY)
    for name in ("Bart", "Marian"):
        make = _part("encoder", name, configs.TRANSLATOR)
        yield Entry(f"transformers/{name} encoder", make, TOKENS, tokens=VOCABULARY)
    make = _part("encoder", "Whisper", configs.WHISPER)
    yield Entry("transformers/Whisper encoder", make, ((1, 16, 40),), HALF)
    make = _of("ASTConfig", "ASTModel", configs.SPECTROGRAM)
    yield Entry("transformers/AST", make, ((1, 32, 16),))
    for part, shape in (("encoder", (1, 1, 64)), ("decoder", (1, 16, 8))):
        make = _part(part, "Encodec", configs.ENCODEC)
        yield Entry(f"transformers/Encodec {part}", make, (shape,))


def _part(part: str, name: str, values: dict[str, Any]) -> Callable[[], torch.nn.Module]:
    return _of(f"{name}Config", f"{name}Model", values, part)


def _variants() -> Iterator[Entry]:
    """Heads that share weights, dynamic shapes, several engines, other attention."""
    length = {1: torch.export.Dim("length", min=2, max=64)}
    silu, gelu = "torch.ops.aten.silu.default", "torch.ops.aten.gelu.default"
    text: dict[str, Any] = {"inputs": TOKENS, "tokens": VOCABULARY}
    masked = _of("BertConfig", "BertForMaskedLM", configs.TEXT)
    bert = Entry("transformers/Bert, masked LM", masked, dtypes=HALF, **text)
    yield bert
    yield bert.named(", in several engines", options={"torch_executed_ops": [gelu]})
    yield bert.named(", dynamic length", dynamic=(length,))
    tied = {**configs.DECODER, "tie_word_embeddings": True}
    llama = Entry(
        "transformers/Llama, tied LM",
        _of("LlamaConfig", "LlamaForCausalLM", tied, use_cache=False),
        dtypes=HALF,
        **text,
    )
    yield llama
    yield llama.named(", in several engines", options={"torch_executed_ops": [silu]})
    yield llama.named(", dynamic length", dynamic=(length,))
    eager = {**configs.DECODER, "attn_implementation": "eager"}
    make = _of("LlamaConfig", "LlamaModel", eager, use_cache=False)
    yield Entry("transformers/Llama, eager attention", make, **text)
    make = _of("GPT2Config", "GPT2LMHeadModel", configs.GPT, use_cache=False)
    yield Entry("transformers/GPT2, tied LM", make, dtypes=HALF, **text)


def _of(
    config: str, model: str, values: dict[str, Any], part: str = "", **arguments: Any
) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        made = getattr(transformers, model)(getattr(transformers, config)(**values))
        return Plain(getattr(made, part) if part else made, arguments)

    return make


class Plain(torch.nn.Module):
    """A model of transformers with plain tensors as results."""

    def __init__(self, model: torch.nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All its tensors."""
        found = self.model(given, **self.arguments)
        values = [found] if isinstance(found, torch.Tensor) else list(found.values())
        return tuple(value for value in values if isinstance(value, torch.Tensor))
