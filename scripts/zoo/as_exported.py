"""Models as users export them: whole, by keyword, with losses, with what they return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scripts.zoo import transformers_configs as configs
from scripts.zoo.entry import F32, Entry
from scripts.zoo.transformers_configs import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, LENGTH = 2, 10
GPT: dict[str, Any] = {**configs.GPT, "use_cache": False}
DECODER: dict[str, Any] = {**configs.DECODER, "use_cache": False}
MOE: dict[str, Any] = {
    **DECODER,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "norm_topk_prob": True,
    "experts_implementation": "batched_mm",
}
MAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "state_size": 4,
    "conv_kernel": 2,
    "time_step_rank": 4,
    "use_cache": False,
    "use_mambapy": False,
}
CLASSES: dict[str, Any] = {"num_labels": 3}


def entries() -> Iterator[Entry]:
    """All of them."""
    yield from _encoders()
    yield from _decoders()
    yield from _both()
    yield from _others()
    yield from _timm_and_torchvision()


def _encoders() -> Iterator[Entry]:
    text, classes = configs.TEXT, {**configs.TEXT, **CLASSES}
    yield _entry("Bert", "BertModel", text, _text)
    yield _entry("Bert", "BertModel", text, _text, ", only its hidden states", take=_hidden)
    yield _entry("Bert", "BertForSequenceClassification", classes, _labelled)
    yield _entry("Bert", "BertForMaskedLM", text, _tokens_labelled)
    yield _entry("Roberta", "RobertaForTokenClassification", classes, _token_classes)
    yield _entry(
        "DistilBert", "DistilBertForQuestionAnswering", configs.ENCODERS["DistilBert"], _spans
    )
    yield _entry("Albert", "AlbertModel", configs.ENCODERS["Albert"], _text)
    yield _entry("Electra", "ElectraForPreTraining", configs.ENCODERS["Electra"], _text)
    yield _entry("DebertaV2", "DebertaV2Model", configs.ENCODERS["DebertaV2"], _text)
    yield _entry("ModernBert", "ModernBertForMaskedLM", configs.ENCODERS["ModernBert"], _text)
    yield _entry("MPNet", "MPNetModel", text, _text)
    yield _entry("FNet", "FNetModel", configs.ENCODERS["FNet"], _ids)
    yield _entry("RoFormer", "RoFormerForMaskedLM", configs.ENCODERS["RoFormer"], _text)


def _decoders() -> Iterator[Entry]:
    yield _entry("GPT2", "GPT2LMHeadModel", GPT, _tokens_labelled)
    tied = {**DECODER, "tie_word_embeddings": True}
    llama = _entry("Llama", "LlamaForCausalLM", tied, _text)
    length = {1: torch.export.Dim("length", min=2, max=64)}
    yield llama.named(
        ", tied, dynamic length", dynamic={"input_ids": length, "attention_mask": length}
    )
    yield llama.named(", bfloat16", dtypes=("bfloat16",))
    yield llama.named(", strict", strict=True)
    for name in ("Qwen2", "Gemma2", "Phi3", "Olmo2"):
        own = {"head_dim": 8} if name == "Gemma2" else {}
        yield _entry(name, f"{name}ForCausalLM", {**DECODER, **own}, _tokens_labelled)
    mistral = {**DECODER, "sliding_window": 4}
    yield _entry("Mistral", "MistralForCausalLM", mistral, _text, ", sliding window")
    yield _entry("Mixtral", "MixtralForCausalLM", MOE, _text)
    yield _entry("Qwen3Moe", "Qwen3MoeForCausalLM", MOE, _text)
    for name in ("OPT", "Bloom", "Falcon", "GPTNeoX"):
        config = {**configs.DECODERS[name], "use_cache": False}
        yield _entry(name, f"{name}ForCausalLM", config, _text)
    yield _entry("Mamba", "MambaForCausalLM", MAMBA, _few_ids)
    mamba2 = {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    yield _entry("Mamba2", "Mamba2ForCausalLM", mamba2, _few_ids)
    griffin = {**DECODER, "lru_width": 32, "block_types": ["recurrent", "attention"]}
    yield _entry("RecurrentGemma", "RecurrentGemmaForCausalLM", griffin, _few_ids)
    yield Entry(
        "transformers/Llama with a static cache",
        _llama_with_cache,
        (),
        values=lambda _: (torch.tensor([[5]]), None, torch.tensor([0])),
        others=lambda _: [(torch.tensor([[7 + n]]), None, torch.tensor([n])) for n in (1, 2)],
        stateful=True,
    )


def _both() -> Iterator[Entry]:
    """Encoders with decoders, and two towers."""
    t5 = {**configs.T5, "use_cache": False, "decoder_start_token_id": 0, "pad_token_id": 0}
    yield _entry("T5", "T5ForConditionalGeneration", t5, _pair)
    translator = {**configs.TRANSLATOR, "use_cache": False}
    yield _entry("Bart", "BartForConditionalGeneration", translator, _pair)
    yield _entry("Marian", "MarianMTModel", translator, _pair)
    whisper = {**configs.WHISPER, "use_cache": False, "decoder_start_token_id": 2}
    yield _entry("Whisper", "WhisperForConditionalGeneration", whisper, _spectrogram)
    towers = {
        "text_config": configs.TEXT_TOWER,
        "vision_config": configs.VISION,
        "projection_dim": 16,
    }
    yield _entry("CLIP", "CLIPModel", towers, _text_and_image)
    siglip = {"text_config": configs.TEXT_TOWER, "vision_config": configs.VISION}
    yield _entry("Siglip", "SiglipModel", siglip, _text_and_image)


def _others() -> Iterator[Entry]:
    """Images and sound."""
    vision = {**configs.VISION, **CLASSES}
    yield _entry("ViT", "ViTForImageClassification", vision, _image_labelled)
    yield _entry("Swin", "SwinForImageClassification", {**configs.SWIN, **CLASSES}, _image_labelled)
    stages = {**configs.STAGES, **CLASSES}
    yield _entry("ConvNextV2", "ConvNextV2ForImageClassification", stages, _image_labelled)
    segformer = {**configs.IMAGES["Segformer"], **CLASSES, "decoder_hidden_size": 16}
    yield _entry("Segformer", "SegformerForSemanticSegmentation", segformer, _image)
    yield _entry("Dinov2", "Dinov2Model", configs.IMAGES["Dinov2"], _image)
    yield _entry("Yolos", "YolosForObjectDetection", configs.IMAGES["Yolos"], _image)
    yield _entry("ResNet", "ResNetForImageClassification", configs.IMAGES["ResNet"], _image)
    yield _entry("Wav2Vec2", "Wav2Vec2ForCTC", configs.AUDIO, _sound)
    yield _entry("AST", "ASTForAudioClassification", configs.SPECTROGRAM, _spectrogram_of_ast)


def _timm_and_torchvision() -> Iterator[Entry]:
    image = ((1, 3, 64, 64),)
    yield Entry("timm/resnet10t, features", _features("resnet10t"), image)
    yield Entry(
        "timm/convnext_atto, features", _features("convnext_atto", depths=(1, 1, 1, 1)), image
    )
    yield Entry("torchvision/deeplab behind 'out'", _segmentation, ((1, 3, 32, 32),))


def _entry(
    name: str,
    model: str,
    config: dict[str, Any],
    keywords: Callable[[torch.dtype], dict[str, Any]],
    suffix: str = "",
    take: Callable[[Any], Any] | None = None,
) -> Entry:
    def make() -> torch.nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        made = getattr(transformers, model)(getattr(transformers, f"{name}Config")(**config))
        return Taking(made, take) if take else made

    return Entry(
        f"transformers/{model}{suffix}", make, (), F32, keywords=keywords, values=lambda _: ()
    )


class Taking(torch.nn.Module):
    """A model, and the only result that its user takes."""

    def __init__(self, model: torch.nn.Module, take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.take = model, take

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        return self.take(self.model(**given))


def _hidden(found: Any) -> Any:
    return found.last_hidden_state


# -- inputs -----------------------------------------------------------------------------------


def _random(*shape: int, below: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(3, below, shape)


def _ids(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": _random(ROWS, LENGTH)}


def _few_ids(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": _random(1, 4)}


def _text(kind: torch.dtype) -> dict[str, Any]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    return {**_ids(kind), "attention_mask": mask}


def _labelled(kind: torch.dtype) -> dict[str, Any]:
    return {**_text(kind), "labels": torch.tensor([2, 0])}


def _tokens_labelled(kind: torch.dtype) -> dict[str, Any]:
    labels = _random(ROWS, LENGTH)
    labels[:, :2] = -100
    return {**_text(kind), "labels": labels}


def _token_classes(kind: torch.dtype) -> dict[str, Any]:
    return {**_text(kind), "labels": torch.randint(0, 3, (ROWS, LENGTH))}


def _spans(kind: torch.dtype) -> dict[str, Any]:
    return {
        **_text(kind),
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 5]),
    }


def _pair(kind: torch.dtype) -> dict[str, Any]:
    return {**_text(kind), "labels": _random(ROWS, 6)}


def _text_and_image(kind: torch.dtype) -> dict[str, Any]:
    return {"input_ids": _random(ROWS, LENGTH), **_images(kind, ROWS), "return_loss": True}


def _images(kind: torch.dtype, count: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(count, 3, 32, 32).to(kind)}


def _image(kind: torch.dtype) -> dict[str, Any]:
    return _images(kind, 1)


def _image_labelled(kind: torch.dtype) -> dict[str, Any]:
    return {**_images(kind, ROWS), "labels": torch.tensor([2, 0])}


def _sound(kind: torch.dtype) -> dict[str, Any]:
    return {"input_values": torch.randn(1, 1600).to(kind)}


def _spectrogram(kind: torch.dtype) -> dict[str, Any]:
    return {"input_features": torch.randn(1, 16, 40).to(kind), "labels": _random(1, 6)}


def _spectrogram_of_ast(kind: torch.dtype) -> dict[str, Any]:
    return {"input_values": torch.randn(1, 32, 16).to(kind)}


# -- models that take more than a config --------------------------------------------------------


def _llama_with_cache() -> torch.nn.Module:
    """One step of decoding, with the keys and values of the steps before in buffers."""
    import transformers
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    config = transformers.LlamaConfig(**{**DECODER, "use_cache": True})
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=8,
        cache_config={"batch_size": 1, "max_cache_len": 8},
    )
    return TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=8)


def _features(name: str, **arguments: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import timm

        made: torch.nn.Module = timm.create_model(
            name, pretrained=False, features_only=True, **arguments
        )
        return made

    return make


def _segmentation() -> torch.nn.Module:
    """It is trained with a second head, of which nobody takes the result here."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    made = deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    return Out(made)


class Out(torch.nn.Module):
    """The main result of a model that gives several."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x)["out"]
        return found
