"""BLOOM (transformers' `bloom`): ALiBi, a norm after the embedding, one matrix for query, key and value of every head.

Sources: modeling_bloom.py; arXiv 2211.05100, section 3.2.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.models import ModelConfig
from tools.conversion.families.family import Family
from tools.conversion.rows import Rule, always, key_value_heads, one

# theirs -> ours, of every layer; each has a weight and a bias
LAYER = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.dense_h_to_4h": ("mlp.up_proj",),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}


def layer_rules(names: Mapping[str, tuple[str, ...]], when: Callable[[ModelConfig], bool] = always) -> list[Rule]:
    """Weight and bias of every layer's modules; fused ones are grouped by key/value head."""
    return [
        Rule(
            f"transformer.h.{{}}.{theirs}.{kind}",
            tuple(f"layers.{{}}.{name}.{kind}" for name in ours),
            key_value_heads if len(ours) > 1 else one,
            when,
        )
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    ]


def _read_more(config: dict[str, Any]) -> dict[str, Any]:
    return {"ffn_hidden_size": 4 * config["hidden_size"]}


def _write_more(model: ModelConfig) -> dict[str, Any]:
    return {"hidden_dropout": 0.0, "attention_dropout": 0.0}


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    fields={
        "n_layer": "num_layers",
        "hidden_size": "hidden_size",
        "n_head": "num_attention_heads",
        "vocab_size": "vocab_size",
        "seq_length": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_method_std",
    },
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    absent={
        "n_layer": 2,
        "hidden_size": 64,
        "n_head": 8,
        "vocab_size": 250880,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    rules=(
        Rule("transformer.word_embeddings.weight", ("embed_tokens.weight",)),
        Rule("transformer.word_embeddings_layernorm.weight", ("embed_layernorm.weight",)),
        Rule("transformer.word_embeddings_layernorm.bias", ("embed_layernorm.bias",)),
        *layer_rules(LAYER),
        Rule("transformer.ln_f.weight", ("norm.weight",)),
        Rule("transformer.ln_f.bias", ("norm.bias",)),
        Rule("lm_head.weight", ("lm_head.weight",)),
    ),
    fixed={
        "normalization": "LayerNorm",
        "activation": "gelu-tanh",
        "position_embedding_type": "alibi",
        "embed_layernorm": True,
        "add_bias_linear": True,
    },
    demanded={"apply_residual_connection_post_layernorm": False},
    rotary=False,
    read_more=_read_more,
    write_more=_write_more,
    optional_prefix="transformer.",
)
