"""Published shapes by name (`--model`). Sources: the models' papers and their config.json files.

LLaMA: arXiv 2302.13971, table 2. Llama 2: arXiv 2307.09288. Llama 3: arXiv 2407.21783, table 3.
TinyLlama: arXiv 2401.02385. Chinese-LLaMA: arXiv 2304.08177 (LLaMA with 49953 pieces).
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
        "llama3.2-1b": _shape(
            16, 2048, 8192, 32, 128256, num_query_groups=8, untie_embeddings_and_output_weights=False, **_LLAMA32_ROPE
        ),
        "llama3.2-3b": _shape(
            28, 3072, 8192, 24, 128256, num_query_groups=8, untie_embeddings_and_output_weights=False, **_LLAMA32_ROPE
        ),
    }


def preset_names() -> tuple[str, ...]:
    return tuple(_presets())


def preset(name: str) -> ModelConfig:
    """The published shape called `name`. Raises RequestError, naming the known ones."""
    shapes = _presets()
    if name not in shapes:
        raise RequestError(f"--model {name}: unknown; known are {', '.join(shapes)}")
    return shapes[name]
