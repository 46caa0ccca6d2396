"""Published shapes by name (`--model`). Sources: the models' papers and their config.json files.

LLaMA: arXiv 2302.13971, table 2. Llama 2: arXiv 2307.09288. Llama 3: arXiv 2407.21783, table 3.
TinyLlama: arXiv 2401.02385. Chinese-LLaMA: arXiv 2304.08177 (LLaMA with 49953 pieces). Mistral: arXiv 2310.06825.
Qwen2.5: arXiv 2412.15115. Qwen3: arXiv 2505.09388. GLM-4: arXiv 2406.12793. BLOOM: arXiv 2211.05100, table 3.
OPT: arXiv 2205.01068, table 1. Falcon: arXiv 2311.16867. GPT-2: Radford et al. 2019, table 2.
"""

import dataclasses

from megatron_ext.errors import RequestError
from megatron_ext.models.config import ModelConfig

_LLAMA3_ROPE = {"rotary_base": 500000.0, "max_position_embeddings": 8192}
_LLAMA31_ROPE = {
    **_LLAMA3_ROPE,
    "max_position_embeddings": 131072,
    "rope_scaling": "llama3",
    "rope_scaling_factor": 8.0,
}
_LLAMA32_ROPE = {**_LLAMA31_ROPE, "rope_scaling_factor": 32.0}

_QWEN_ROPE = {"rotary_base": 1000000.0, "norm_epsilon": 1e-6}
_TIED = {"untie_embeddings_and_output_weights": False}
_LAYER_NORM = {"normalization": "LayerNorm"} | _TIED
_BLOOM = _LAYER_NORM | {
    "activation": "gelu-tanh",
    "position_embedding_type": "alibi",
    "embed_layernorm": True,
    "add_bias_linear": True,
}
_OPT = _LAYER_NORM | {
    "activation": "relu",
    "position_embedding_type": "learned_absolute",
    "position_embedding_offset": 2,
    "add_bias_linear": True,
}
_GPT2 = _LAYER_NORM | {
    "activation": "gelu-tanh",
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    "max_position_embeddings": 1024,
}
_FALCON = _LAYER_NORM | {"activation": "gelu"}
_GLM = {"add_qkv_bias": True, "rotary_percent": 0.5, "rotary_interleaved": True, "norm_epsilon": 1.5625e-07}


def _shape(layers: int, hidden: int, ffn: int, heads: int, vocab: int = 32000, **rest: object) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        vocab_size=vocab,
        **rest,  # type: ignore[arg-type]
    )


def _presets() -> dict[str, ModelConfig]:
    llama = {
        "llama-7b": _shape(32, 4096, 11008, 32, norm_epsilon=1e-6),
        "llama-13b": _shape(40, 5120, 13824, 40, norm_epsilon=1e-6),
        "llama-30b": _shape(60, 6656, 17920, 52, norm_epsilon=1e-6),
        "llama-65b": _shape(80, 8192, 22016, 64, norm_epsilon=1e-5),
    }
    chinese = {
        f"chinese-{name}": dataclasses.replace(config, vocab_size=49953)
        for name, config in llama.items()
        if name != "llama-65b"
    }
    return {
        "tiny": _shape(4, 128, 344, 4, num_query_groups=2, vocab=1024, max_position_embeddings=512),
        "tinyllama-1.1b": _shape(22, 2048, 5632, 32, num_query_groups=4),
        **llama,
        **chinese,
        "llama2-7b": _shape(32, 4096, 11008, 32, max_position_embeddings=4096),
        "llama2-13b": _shape(40, 5120, 13824, 40, max_position_embeddings=4096),
        "llama2-70b": _shape(80, 8192, 28672, 64, num_query_groups=8, max_position_embeddings=4096),
        "llama3-8b": _shape(32, 4096, 14336, 32, 128256, num_query_groups=8, **_LLAMA3_ROPE),
        "llama3-70b": _shape(80, 8192, 28672, 64, 128256, num_query_groups=8, **_LLAMA3_ROPE),
        "llama3.1-8b": _shape(32, 4096, 14336, 32, 128256, num_query_groups=8, **_LLAMA31_ROPE),
        "llama3.1-70b": _shape(80, 8192, 28672, 64, 128256, num_query_groups=8, **_LLAMA31_ROPE),
        "llama3.1-405b": _shape(126, 16384, 53248, 128, 128256, num_query_groups=8, **_LLAMA31_ROPE),
        "llama3.2-1b": _shape(16, 2048, 8192, 32, 128256, num_query_groups=8, **_TIED, **_LLAMA32_ROPE),
        "llama3.2-3b": _shape(28, 3072, 8192, 24, 128256, num_query_groups=8, **_TIED, **_LLAMA32_ROPE),
        "mistral-7b": _shape(32, 4096, 14336, 32, num_query_groups=8, window_size=4096, max_position_embeddings=32768),
        **_qwen(),
        "glm4-9b": _shape(
            40, 4096, 13696, 32, 151552, num_query_groups=2, kv_channels=128, max_position_embeddings=131072, **_GLM
        ),
        "bloom-560m": _shape(24, 1024, 4096, 16, 250880, **_BLOOM),
        "bloom-7b1": _shape(30, 4096, 16384, 32, 250880, **_BLOOM),
        "bloom-176b": _shape(70, 14336, 57344, 112, 250880, **_BLOOM),
        "opt-125m": _shape(12, 768, 3072, 12, 50272, **_OPT),
        "opt-6.7b": _shape(32, 4096, 16384, 32, 50272, **_OPT),
        "opt-13b": _shape(40, 5120, 20480, 40, 50272, **_OPT),
        "opt-30b": _shape(48, 7168, 28672, 56, 50272, **_OPT),
        "opt-66b": _shape(64, 9216, 36864, 72, 50272, **_OPT),
        "falcon-7b": _shape(32, 4544, 18176, 71, 65024, num_query_groups=1, parallel_residual="one-norm", **_FALCON),
        "falcon-40b": _shape(60, 8192, 32768, 128, 65024, num_query_groups=8, parallel_residual="two-norms", **_FALCON),
        "gpt2": _shape(12, 768, 3072, 12, 50257, **_GPT2),
        "gpt2-medium": _shape(24, 1024, 4096, 16, 50257, **_GPT2),
        "gpt2-large": _shape(36, 1280, 5120, 20, 50257, **_GPT2),
        "gpt2-xl": _shape(48, 1600, 6400, 25, 50257, **_GPT2),
    }


def _qwen() -> dict[str, ModelConfig]:
    qwen2 = {"add_qkv_bias": True, **_QWEN_ROPE}
    qwen3 = {"qk_layernorm": True, "kv_channels": 128, "max_position_embeddings": 40960, **_QWEN_ROPE}
    long = {"max_position_embeddings": 131072}
    return {
        "qwen2.5-0.5b": _shape(
            24, 896, 4864, 14, 151936, num_query_groups=2, max_position_embeddings=32768, **_TIED, **qwen2
        ),
        "qwen2.5-7b": _shape(28, 3584, 18944, 28, 152064, num_query_groups=4, **long, **qwen2),
        "qwen2.5-72b": _shape(
            80, 8192, 29568, 64, 152064, num_query_groups=8, **long, **qwen2 | {"norm_epsilon": 1e-5}
        ),
        "qwen3-0.6b": _shape(28, 1024, 3072, 16, 151936, num_query_groups=8, **_TIED, **qwen3),
        "qwen3-8b": _shape(36, 4096, 12288, 32, 151936, num_query_groups=8, **qwen3),
    }


def preset_names() -> tuple[str, ...]:
    return tuple(_presets())


def preset(name: str) -> ModelConfig:
    """The published shape called `name`. Raises RequestError, naming the known ones."""
    shapes = _presets()
    if name not in shapes:
        raise RequestError(f"--model {name}: unknown; known are {', '.join(shapes)}")
    return shapes[name]
