"""LLaMA's names and fields at Hugging Face against ours: one table, read in both directions.

Weights: ours is Hugging Face's without the leading `model.`; layouts are equal, nothing is permuted.
"""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig

# config.json's field -> ModelConfig's
_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
    "mlp_bias": "add_bias_linear",
}
_LLAMA3_ROPE = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def from_hf_name(name: str) -> str:
    return name.removeprefix("model.")


def is_derived(name: str) -> bool:
    """Not a weight: old folders also store the frequencies of the rotation, which follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def token_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Those of config.json's fields that name special tokens; an id, or (of ends) several."""
    return {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the same model, readable by transformers 4 and 5, with LLaMA's own ids of special tokens.

    Raises RequestError where LLaMA has no word.
    """
    if model.add_qkv_bias and not model.add_bias_linear:
        raise RequestError("add_qkv_bias without add_bias_linear: Hugging Face's LLaMA cannot express it")
    values = {"num_query_groups": model.kv_heads, "kv_channels": model.head_dim}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {theirs: values.get(ours, getattr(model, ours)) for theirs, ours in _FIELDS.items()}
    config |= {
        "attention_bias": model.add_bias_linear,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tied,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
        if model.rope_scaling == "llama3":
            scaling |= {theirs: getattr(model, ours) for theirs, ours in _LLAMA3_ROPE.items()}
        config["rope_scaling"] = scaling
    return config


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """The shape that config.json describes. Raises RequestError naming what is not supported or missing."""
    if config.get("model_type") != "llama":
        raise RequestError(f"config.json: model_type {config.get('model_type')!r} is not supported; llama is")
    if config.get("hidden_act", "silu") != "silu":
        raise RequestError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; silu is")
    if config.get("attention_bias", False) != config.get("mlp_bias", False):
        raise RequestError("config.json: attention_bias and mlp_bias differ, which is not supported")
    # transformers 5 keeps theta and scaling together, transformers 4 apart
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values = {ours: config[theirs] for theirs, ours in _FIELDS.items() if config.get(theirs) is not None}
    values["rotary_base"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("linear", "llama3"):
        values |= {"rope_scaling": kind, "rope_scaling_factor": rope["factor"]}
        values |= {ours: rope[theirs] for theirs, ours in _LLAMA3_ROPE.items() if theirs in rope}
    elif kind != "default":
        raise RequestError(f"config.json: rope scaling {kind!r} is not supported; linear and llama3 are")
    try:
        model = ModelConfig(**values, untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False))
    except TypeError as error:
        raise RequestError(f"config.json: {error}") from error
    model.validate()
    return model
