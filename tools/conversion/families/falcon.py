"""Falcon 7B, 11B, 40B, 180B (transformers' `falcon`): attention and feed-forward network side by side, multi-query.

Sources: modeling_falcon.py; arXiv 2311.16867, section 4. Falcon-RW, with ALiBi and one after the other, is refused.
"""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.bloom import LAYER, layer_rules
from tools.conversion.families.family import Family
from tools.conversion.rows import Rule

_NORMS = ("input_layernorm", "post_attention_layernorm")
_ONE_NORM = {"input_layernorm": ("input_layernorm",)}
_TWO_NORMS = {"ln_attn": ("input_layernorm",), "ln_mlp": ("post_attention_layernorm",)}


def _two_norms(model: ModelConfig) -> bool:
    return model.parallel_residual == "two-norms"


def _one_norm(model: ModelConfig) -> bool:
    return not _two_norms(model)


def _read_more(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    if config.get("new_decoder_architecture", False):
        norms = config.get("num_ln_in_parallel_attn") or 2
        if norms not in (1, 2):
            raise RequestError(f"config.json: num_ln_in_parallel_attn {norms} is not supported; 1 and 2 are")
        kv_heads = config.get("num_kv_heads") or heads
    else:
        norms, kv_heads = 1, 1 if config.get("multi_query", True) else heads
    return {
        "num_query_groups": kv_heads,
        "parallel_residual": "two-norms" if norms == 2 else "one-norm",
        "ffn_hidden_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
    }


def _write_more(model: ModelConfig) -> dict[str, Any]:
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    new = _two_norms(model) or kv_heads not in (1, heads)
    return {
        "new_decoder_architecture": new,
        "num_kv_heads": kv_heads if new else heads,
        "num_ln_in_parallel_attn": (2 if _two_norms(model) else 1) if new else None,
        "multi_query": kv_heads == 1,
        "ffn_hidden_size": model.ffn_hidden_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_method_std",
        "bias": "add_bias_linear",
    },
    aliases={"n_embed": "hidden_size"},
    absent={
        "num_hidden_layers": 32,
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    rules=(
        Rule("transformer.word_embeddings.weight", ("embed_tokens.weight",)),
        *layer_rules({theirs: ours for theirs, ours in LAYER.items() if theirs not in _NORMS}),
        *layer_rules(_ONE_NORM, _one_norm),
        *layer_rules(_TWO_NORMS, _two_norms),
        Rule("transformer.ln_f.weight", ("norm.weight",)),
        Rule("transformer.ln_f.bias", ("norm.bias",)),
        Rule("lm_head.weight", ("lm_head.weight",)),
    ),
    fixed={"normalization": "LayerNorm", "activation": "gelu"},
    demanded={"alibi": False, "parallel_attn": True, "activation": "gelu"},
    read_more=_read_more,
    write_more=_write_more,
    optional_prefix="transformer.",
)
