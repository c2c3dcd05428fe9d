"""Small configurations of models of transformers, by the names of their classes."""

from __future__ import annotations

from typing import Any

VOCABULARY = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
EAGER: dict[str, Any] = {"experts_implementation": "eager"}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "Albert": {**TEXT, "embedding_size": 16},
    "Bert": TEXT,
    "ConvBert": {**TEXT, "embedding_size": 16},
    "Deberta": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
    },
    "Electra": {**TEXT, "embedding_size": 16},
    "FNet": TEXT,
    "Funnel": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 64,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    "IBert": TEXT,
    "MobileBert": {
        **TEXT,
        "intra_bottleneck_size": 16,
        "embedding_size": 16,
        "num_feedforward_networks": 2,
        "true_hidden_size": 16,
    },
    "ModernBert": {**TEXT, "pad_token_id": 0, "reference_compile": False},
    "MPNet": TEXT,
    "RemBert": {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16},
    "Roberta": {**TEXT, "pad_token_id": 0},
    "RoFormer": {**TEXT, "embedding_size": 32},
    "SqueezeBert": {**TEXT, "embedding_size": 32},
    "Yoso": TEXT,
}
DECODERS: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "CodeGen": {**GPT, "rotary_dim": 4},
    "Cohere": DECODER,
    "Falcon": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "Gemma": {**DECODER, "head_dim": 8},
    "Gemma2": {**DECODER, "head_dim": 8},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTNeo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "GPTNeoX": TEXT,
    "Llama": DECODER,
    "Mistral": DECODER,
    "Mixtral": {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, **EAGER},
    "Mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 64,
    },
    "OPT": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "Olmo2": DECODER,
    "Phi": DECODER,
    "Phi3": DECODER,
    "Qwen2": DECODER,
    "Qwen3": {**DECODER, "head_dim": 8},
}
IMAGES: dict[str, dict[str, Any]] = {
    "Beit": {**VISION, "use_relative_position_bias": True},
    "Bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
    "CLIPVision": VISION,
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "DeiT": VISION,
    "Dinov2": {**VISION, "num_hidden_layers": 2},
    "MobileNetV2": {"image_size": 32, "depth_multiplier": 0.35},
    "MobileViT": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 24, 24, 32, 48],
    },
    "PoolFormer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "RegNet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "groups_width": 8,
    },
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "Segformer": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 16, 32, 32],
        "num_attention_heads": [1, 1, 2, 2],
    },
    "SiglipVision": VISION,
    "SwiftFormer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "image_size": 64},
    "Swin": SWIN,
    "Swinv2": SWIN,
    "ViT": VISION,
    "Yolos": {**VISION, "image_size": [32, 32], "num_detection_tokens": 4},
}
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "vocab_size": 32,
}
SPEECH: dict[str, dict[str, Any]] = {
    "Wav2Vec2": AUDIO,
    "Hubert": AUDIO,
    "SEW": {**AUDIO, "squeeze_factor": 2},
    "WavLM": AUDIO,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
TEXT_TOWER: dict[str, Any] = {
    **TEXT,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "projection_dim": 16,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
TRANSLATOR: dict[str, Any] = {
    **SEQ2SEQ,
    "decoder_start_token_id": 2,
}
WHISPER: dict[str, Any] = {
    **SEQ2SEQ,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 20,
}
SPECTROGRAM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 8,
    "max_length": 32,
    "num_mel_bins": 16,
    "frequency_stride": 8,
    "time_stride": 8,
}
ENCODEC: dict[str, Any] = {
    "num_filters": 4,
    "hidden_size": 16,
    "upsampling_ratios": [4, 2],
    "num_lstm_layers": 1,
    "codebook_size": 16,
}
IN_HALF = {
    "Albert",
    "Bert",
    "DistilBert",
    "Electra",
    "GPT2",
    "GPTNeoX",
    "Gemma",
    "Llama",
    "Mistral",
    "OPT",
    "Phi",
    "Qwen2",
    "Roberta",
    "ConvNext",
    "DeiT",
    "Swin",
    "ViT",
}
