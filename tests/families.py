"""A tiny model of transformers for every family and variant that is supported, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

_COMMON = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_LLAMA = _COMMON | {"num_hidden_layers": 4, "intermediate_size": 48, "num_key_value_heads": 2}
_FALCON = _COMMON | {"num_hidden_layers": 4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA | {"num_key_value_heads": 4}),
    "llama tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "llama3": ("llama", _LLAMA | {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16}),
    "mistral": ("mistral", _LLAMA | {"head_dim": 8, "sliding_window": 7}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2 tied": ("qwen2", _LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "glm": ("glm", _LLAMA | {"head_dim": 16, "pad_token_id": 3, "eos_token_id": [1, 2]}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "bloom of six heads": ("bloom", {"hidden_size": 48, "n_layer": 4, "n_head": 6}),
    "opt": ("opt", _COMMON | {"num_hidden_layers": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 80}),
    "falcon 7b": ("falcon", _FALCON),
    "falcon of many keys, biased": ("falcon", _FALCON | {"multi_query": False, "bias": True, "num_kv_heads": 4}),
    "falcon 11b": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2},
    ),
    "falcon 40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def make_model(name: str, vocab_size: int = 97, dtype: torch.dtype = torch.float32) -> Any:
    """Weights are wide enough for every part to show in the logits; biases and norms are no exception."""
    model_type, options = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=vocab_size, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15, generator=generator)
    return model.to(dtype)


def save_model(name: str, folder: Path, **options: Any) -> Any:
    model = make_model(name, **options)
    model.save_pretrained(folder)
    return model
